"""What stages ask of the machinery that runs them, and the reference that runs everything in this process."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from cvdd_ray.core.committee import LocalCommittee, Voter
from cvdd_ray.core.experts import ExpertSpec, prepare_torch
from cvdd_ray.data.storage import Store
from cvdd_ray.stages.grouptask import GroupTask, VoterSettings, run_group

Report = Callable[[str, dict], None]


class Runtime(Protocol):
    """Runs independent pieces of work; results come as they finish, and do not depend on where or when they ran."""

    def map(
        self, function: Callable, items: Mapping[str, Any], shared: tuple, on_report: Report
    ) -> Iterator[tuple[str, Any]]:
        """Yield (name, function(item, *shared, report=...)) for every item; `shared` travels once per machine."""
        ...

    def distill(
        self, tasks: Mapping[str, GroupTask], experts: Mapping[str, ExpertSpec], voter: VoterSettings, store: Store,
        on_report: Report,
    ) -> Iterator[tuple[str, bytes]]:  # fmt: skip
        """Yield (name, final state) for every group of synthesis jobs, voted on by the experts."""
        ...

    def close(self) -> None: ...


class LocalRuntime:
    """Everything in this process, one piece after the other."""

    def __init__(self, threads: int = 1):
        self._device = prepare_torch(threads)

    def map(self, function, items, shared=(), on_report=lambda name, report: None):
        for name, item in items.items():
            yield name, function(item, *shared, report=lambda report, name=name: on_report(name, report))

    def distill(self, tasks, experts, voter, store, on_report=lambda name, report: None):
        committee = local_committee(experts, voter, self._device)
        for name, task in tasks.items():
            yield (
                name,
                run_group(committee, task, store, self._device, lambda report, name=name: on_report(name, report)),
            )

    def close(self) -> None:
        pass


def local_committee(experts: Mapping[str, ExpertSpec], voter: VoterSettings, device) -> LocalCommittee:
    """Return a committee whose experts are built on `device` of this process."""
    return LocalCommittee({name: local_voter(spec, voter, device) for name, spec in experts.items()})


def local_voter(spec: ExpertSpec, voter: VoterSettings, device) -> Voter:
    """Return one expert built on `device`, ready to vote."""
    return Voter(spec.build(device), bn_weight=voter.bn_weight, first_bn_multiplier=voter.first_bn_multiplier)
