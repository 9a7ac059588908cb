"""calibrate: how many jobs a group has where `synthesize.jobs_per_group` is auto.

Made before the work of the stages that need it, as an artifact of its own: the last bits of images depend on how jobs are
grouped, so the number that was found once stays, whatever machine goes on.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch

from cvdd_ray.core.committee import Ballot
from cvdd_ray.core.costs import Network, vote_cost
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.synthesis import Job
from cvdd_ray.data.artifacts import sha256
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.grouptask import VoterSettings
from cvdd_ray.stages.groupwork import committee_bytes, fits, workers_per_gpu
from cvdd_ray.stages.runtime import local_voter

AUTO = "auto"
CALIBRATION = "calibration.json"
CPU_BYTES = 2**31  # that a group may take where there is no GPU, whose free memory would say
BUDGET_S = 120.0  # after so many seconds no larger size is tried
ENOUGH = 0.97  # of the best rate: the smallest size that has it is taken, since more groups keep more workers busy
REPEATS = 2  # of a vote, after one that is not timed

Sets = Sequence[Sequence[Job]]
Calls = Counter[tuple[str, int, int]]
"""How often an expert is asked, by name, jobs and images per job."""


def job_groups(jobs: Sequence[Job], jobs_per_group: int) -> list[tuple[Job, ...]]:
    """Cut jobs into groups of one chunk each; the cut depends on the number and job ids alone, never on timing."""
    groups = []
    for chunk in sorted({job.chunk for job in jobs}):
        members = [job for job in jobs if job.chunk == chunk]
        groups += [tuple(members[k : k + jobs_per_group]) for k in range(0, len(members), jobs_per_group)]
    return groups


def group_size(
    run: Run, name: str, sets: Sets, specs: Mapping[str, ExpertSpec], voter: Callable[[], VoterSettings]
) -> int:
    """Return the jobs per group of some sets of jobs: as it is set, or as the stage `calibrate/<name>` has found it, which is
    made if it is not there; on Ray as one task, where experts would be.

    Raises ArtifactError where that stage was made for other jobs.
    """
    given = run.config.synthesize.jobs_per_group
    if given != AUTO:
        return given
    s = run.config.synthesize
    settings = {"width": run.config.committee.width, "synthesize": s.counted(include={"precision", "matching"})}
    asked = [[(*asdict(replace(job, weights=())).values(),) for job in jobs] for jobs in sets]
    plan = run.plan(f"calibrate/{name}", settings, {"jobs": sha256(json.dumps(asked).encode())})
    with run.stage(plan, f"calibrate {name}") as work:
        if work is not None:
            used = {expert for jobs in sets for job in jobs for expert in job.voters}
            shared = {n: spec for n, spec in specs.items() if n in used}, voter(), run.config.runtime.gpus_per_actor
            found = work.each(measure_sizes, {CALIBRATION: tuple(map(tuple, sets))}, shared)[CALIBRATION]
            about = json.loads(found)
            work.commit({CALIBRATION: found}, jobs_per_group=about["jobs_per_group"], flops=about["flops"])
            rates = ", ".join(f"{size}: {rate:.3g}" for size, rate in about["images_per_s"].items())
            run.progress.say(f"calibrate {name}: {about['jobs_per_group']} jobs per group (images/s by size: {rates})")
    manifest = run.require(f"calibrate/{name}", "synthesize")
    return json.loads(run.artifacts.read(manifest, CALIBRATION))["jobs_per_group"]


def candidate_sizes(sets: Sets) -> list[int]:
    """Return the sizes to try, at most the jobs of the largest chunk: what divides their number, and powers of two."""
    largest = max(max(Counter(job.chunk for job in jobs).values()) for jobs in sets)
    return [n for n in range(1, largest + 1) if largest % n == 0 or n & (n - 1) == 0]


def calls_of(groups: Sequence[Sequence[Job]]) -> Calls:
    """Return what is asked of the experts while every group does one iteration, or one round where voters take turns."""
    calls: Calls = Counter()
    for jobs in groups:
        for turn in range(jobs[0].turns):
            asked = Counter(name for job in jobs for name in job.asked(turn))
            calls.update((name, number, jobs[0].num_images) for name, number in asked.items())
    return calls


def measured_rates(
    sets: Sets,
    vote_s: Callable[[str, int, int], float],
    fitting: Callable[[Sequence[Sequence[Job]]], bool],
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[dict], None] = lambda report: None,
) -> dict[int, float]:
    """Return images per second and iteration of every size that was tried: size 1, then larger ones as long as their groups
    are `fitting` and there is time.

    `vote_s(expert, jobs, images per job)` measures a vote. A rate is that of all groups of all sets, one after the other:
    experts vote on as many jobs of a group as they have a say in.
    """
    sizes, rates, known, started = candidate_sizes(sets), {}, {}, clock()
    num_images = sum(job.num_images * job.turns for jobs in sets for job in jobs)
    for number, size in enumerate(sizes):
        groups = [group for jobs in sets for group in job_groups(jobs, size)]
        if rates and (clock() - started > BUDGET_S or not fitting(groups)):
            break
        calls = calls_of(groups)
        for call in calls:
            if call not in known:
                known[call] = vote_s(*call)
        rates[size] = num_images / sum(times * known[call] for call, times in calls.items())
        report({"done": (number + 1) / len(sizes), "note": f"{size} jobs {rates[size]:.3g} images/s"})
    return rates


def best_size(rates: Mapping[int, float]) -> int:
    """Return the smallest size that is about as fast as the fastest."""
    return min(size for size, rate in rates.items() if rate >= ENOUGH * max(rates.values()))


class VoteTimer:
    """Times votes on random views on this process's device, and counts their FLOPs."""

    def __init__(self, specs: Mapping[str, ExpertSpec], networks: Mapping[str, Network], voter: VoterSettings):
        self._specs, self._networks, self._settings = specs, networks, voter
        self._device, self._voters, self.flops = work_device(), {}, 0

    def __call__(self, name: str, num_jobs: int, num_images: int) -> float:
        """Return the seconds of an expert's vote, the fastest of `REPEATS`."""
        if name not in self._voters:
            self._voters[name] = local_voter(self._specs[name], self._settings, self._device)
        size = self._networks[name].image_size
        ballot = Ballot(
            torch.randn(num_jobs, num_images, 3, size, size).to(self._device),
            torch.zeros(num_jobs, num_images, dtype=torch.long, device=self._device),
            *((torch.zeros(num_jobs, 0), torch.arange(num_jobs)) if self._settings.matching else ()),
        )
        self.flops += (REPEATS + 1) * vote_cost(self._networks[name], num_jobs, num_images).flops
        return min([self._once(name, ballot) for _ in range(REPEATS + 1)][1:])

    def _once(self, name: str, ballot: Ballot) -> float:
        started = time.perf_counter()
        self._voters[name].vote(ballot)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started


def device_memory() -> int:
    """Return the bytes a group may take here: those that are free on the GPU, else `CPU_BYTES`."""
    return torch.cuda.mem_get_info()[0] if work_device().type == "cuda" else CPU_BYTES


def measure_sizes(
    sets: Sets, specs: Mapping[str, ExpertSpec], voter: VoterSettings, gpus_per_actor: float | None,
    report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Return as JSON the `jobs_per_group` that is best here, `images_per_s` by size, and the `flops` it took to find out.
    Votes are measured as they are without `compile`."""
    tile = voter.matching and voter.matching.patch_size
    networks = {n: Network(s.name, s.num_classes, s.image_size, s.width, tile) for n, s in specs.items()}
    workers, memory = workers_per_gpu(gpus_per_actor), device_memory()
    timer = VoteTimer(specs, networks, replace(voter, compile=False))
    rates = measured_rates(
        sets, timer, lambda groups: fits(workers * committee_bytes(groups, networks), memory), report=report
    )
    return json.dumps({"jobs_per_group": best_size(rates), "images_per_s": rates, "flops": timer.flops}).encode()
