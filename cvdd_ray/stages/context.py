"""What every stage is given: the settings, the artifacts, the machinery, and a place to show progress."""

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from cvdd_ray.config import RunConfig
from cvdd_ray.core.experts import ExpertSpec
from cvdd_ray.data.artifacts import Artifacts, Manifest, StagePlan, Written
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.shards import shard_tasks, written_set
from cvdd_ray.data.sources import RealData, load_real
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError
from cvdd_ray.stages.parts import Parts, Receipt
from cvdd_ray.stages.runtime import LocalRuntime, Runtime, read_and_work


class Progress(Protocol):
    """Where stages show what they do; `done` and `total` count `unit`s. `detail` is for terminals alone: lines below."""

    def start(self, title: str, total: float, unit: str) -> None: ...
    def update(self, done: float, note: str = "", detail: str = "") -> None: ...
    def finish(self, note: str = "") -> None: ...
    def say(self, text: str) -> None: ...


class Silent:
    """Progress that shows nothing: the default of library use."""

    def start(self, title: str, total: float, unit: str) -> None: ...
    def update(self, done: float, note: str = "", detail: str = "") -> None: ...
    def finish(self, note: str = "") -> None: ...
    def say(self, text: str) -> None: ...


class Run:
    """One run: `config`, its `artifacts` in a store, a `runtime` and a `progress`.

    `out` is a directory (or s3:// URI) of its own, or the artifacts it shares with others. Without a `runtime` this
    process does the work, or what `start` returns when work first comes up; real data is loaded when first asked for,
    unless it is given.
    """

    def __init__(
        self,
        config: RunConfig,
        out: str | Artifacts,
        *,
        runtime: Runtime | None = None,
        start: Callable[[], Runtime] | None = None,
        progress: Progress | None = None,
        real: RealData | None = None,
        overwrite: bool = False,
    ):
        self.config = config
        self.artifacts = out if isinstance(out, Artifacts) else Artifacts(Store(out), overwrite)
        self.store = self.artifacts.store
        self._runtime, self._start = runtime, start or (lambda: LocalRuntime(config.runtime.threads_per_actor))
        self.progress = progress or Silent()
        if real is not None:
            self.real = real

    @property
    def runtime(self) -> Runtime:
        """What runs the work; started when it is first needed."""
        if self._runtime is None:
            self._runtime = self._start()
        return self._runtime

    @runtime.setter
    def runtime(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def close(self) -> None:
        """Let go of the runtime, if there is one."""
        if self._runtime is not None:
            self._runtime.close()

    @cached_property
    def real(self) -> RealData:
        data = load_real(self.config.data, self.config.seed)
        for split in (data.train, data.holdout, data.test):
            if split.bad:
                self.progress.say(f"left out {len(split.bad)} unreadable images, first: {split.bad[0]}")
        return data

    @property
    def info(self) -> DatasetInfo:
        return self.real.info

    @property
    def classes(self) -> tuple[str, ...]:
        return self.real.train.classes

    @property
    def width(self) -> float:
        """Channel multiplier of the students."""
        return self.config.evaluate.width or self.config.committee.width

    def plan(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> StagePlan:
        """Return the plan of a stage of this run; the dataset's constants (mean, std, size, roll, chunk), class list
        and seed are part of every plan."""
        return StagePlan(stage, {"dataset": asdict(self.info), **settings}, inputs, self.classes, self.config.seed)

    def require(self, stage: str, verb: str) -> Manifest:
        """Return the manifest of a finished stage.  Raises ArtifactError when it is not there, or was made for other
        classes or another order of them."""
        manifest = self.artifacts.require(stage, verb)
        there = tuple(manifest.identity["classes"])
        if there != self.classes:
            at = next((i for i, (a, b) in enumerate(zip(there, self.classes, strict=False)) if a != b), "the end")
            raise ArtifactError(
                f"{self.store.display(stage)} was made for {len(there)} classes, the data has {len(self.classes)}; the "
                f"lists differ at label {at}; use the data it was made from, or another --out"
            )
        return manifest

    def expert(self, name: str, weights: bytes) -> ExpertSpec:
        return ExpertSpec(name, len(self.classes), self.info.image_size, self.config.committee.width, weights)

    @contextmanager
    def stage(self, plan: StagePlan, title: str) -> Iterator["StageWork | None"]:
        """Enter a stage: yields None when its artifact is already there, else the means to make it."""
        found = self.artifacts.finished(plan)
        if found is None:
            with self.artifacts.making(plan):
                found = self.artifacts.finished(plan)  # another process may have made it meanwhile
                if found is None:
                    yield StageWork(self, plan, title)
                    return
        self.progress.say(f"{title}: already there ({found.wall_s:.0f} s when it was made)")
        yield None


class StageWork:
    """A stage being made: resumable pieces of work (parts.py), then one commit."""

    def __init__(self, run: Run, plan: StagePlan, title: str):
        self.run, self.plan, self.title = run, plan, title
        self.partial = run.artifacts.partial(plan)
        self._parts = Parts(run.store, self.partial)
        self.checkpoint, self.piece = self._parts.checkpoint, self._parts.file
        self._started = time.monotonic()

    def each(
        self, function: Callable[..., bytes], items: Mapping[str, Any], shared: tuple = (), *, doing: str = "",
        num_workers: int = 1, written: Receipt | None = None,
    ) -> dict[str, bytes]:  # fmt: skip
        """Return function(item, *shared, report=...) for every item, as bytes; finished items survive an interruption.
        With several workers per item they run it together, see Runtime.train. `written` says which file an item has left,
        by its name and result; one that was altered meanwhile is made again."""

        def start(todo, on_report):
            if num_workers == 1:
                return self.run.runtime.map(function, todo, shared, on_report)
            return self.run.runtime.train(function, todo, shared, num_workers, on_report)

        return self._collect(items, dict.fromkeys(items, 1.0), "pieces", doing, start, written)

    def stream(
        self, read: Callable, worker: type, items: Mapping[str, Any], shared: tuple, *, stream: bool, doing: str = ""
    ) -> dict[str, bytes]:
        """Return for every item the rows (npy bytes) that `worker(*shared)` makes of the blocks of `read(item, *shared)`;
        finished items survive an interruption. With `stream` reading runs ahead of working, on other cores and machines."""

        def start(todo, on_report):
            runtime = self.run.runtime
            if stream:
                found = runtime.stream(read, worker, todo, shared, on_report)
            else:
                found = runtime.map(read_and_work, todo, (read, worker, *shared), on_report)
            for name, rows in found:
                buffer = io.BytesIO()
                np.save(buffer, rows, allow_pickle=False)
                yield name, buffer.getvalue()

        return self._collect(items, dict.fromkeys(items, 1.0), "pieces", doing, start)

    def distill(self, tasks, experts, voter, *, doing: str = "") -> dict[str, bytes]:
        """Return what `run_group` returns for every group of synthesis jobs; finished groups survive, others go on from their
        last checkpoint."""
        steps = {name: float(len(task.jobs) * task.settings.iterations) for name, task in tasks.items()}
        return self._collect(
            tasks, steps, "job iterations", doing,
            lambda todo, on_report: self.run.runtime.distill(todo, experts, voter, self.run.store, on_report),
            lambda name, receipt: Written(tasks[name].piece, json.loads(receipt)["sha256"]),
        )  # fmt: skip

    def image_set(
        self, base: str, ipc: int, write: Callable[..., bytes], shared: tuple, about: Mapping[str, Any]
    ) -> tuple[dict[str, Written], str]:
        """Write an image set, one file or several side by side, and return what to commit and the content hash.

        `write(task, store, classes, metadata, *shared, report)` writes the image indices of one file (data/shards.py).
        """
        run = self.run
        metadata = {"dataset": run.info.name, "mean": run.info.mean, "std": run.info.std, "ipc": ipc, **about}
        tasks = shard_tasks(self.partial, base, ipc, run.info.index_bytes)
        items = {f"{name}.receipt": task for name, task in tasks.items()}
        shared = (run.store, run.classes, metadata, *shared)
        if len(items) == 1:
            receipts = {name: write(task, *shared, report=None) for name, task in items.items()}
        else:

            def file(name: str, receipt: bytes) -> Written:
                return Written(items[name].name, json.loads(receipt)["sha256"])

            receipts = self.each(write, items, shared, doing=f"write {base} images", written=file)
        return written_set(tasks, {name: receipts[f"{name}.receipt"] for name in tasks})

    def commit(self, files: Mapping[str, bytes | Written], **facts: Any) -> Manifest:
        return self.run.artifacts.commit(self.plan, files, wall_s=time.monotonic() - self._started, facts=facts)

    def _collect(self, items, sizes, unit, doing, start, written: Receipt | None = None) -> dict[str, bytes]:
        progress, found = self.run.progress, self._parts.find(items, written)
        results = dict(found.results)
        todo = {name: item for name, item in items.items() if name not in results}
        shares = dict.fromkeys(results, 1.0)
        notes: dict[str, tuple] = {}
        progress.start(f"{self.title}{': ' + doing if doing else ''}", sum(sizes.values()), unit)
        if results:
            progress.update(sum(sizes[name] for name in results), f"{len(results)} of {len(items)} were already there")
        for name in found.damaged:
            progress.say(f"{self.run.store.display(self._parts.result(name))} is damaged; it is made again")

        def on_report(name: str, report: dict) -> None:
            if "say" in report:
                progress.say(report["say"])
            shares[name] = max(shares.get(name, 0.0), float(report.get("done", 0.0)))
            for expert, terms in report.get("experts", {}).items():
                notes[expert] = terms
            note = report.get("note") or "  ".join(
                f"{e} ce {ce:.2f} bn {bn:.0f}" for e, (ce, bn) in sorted(notes.items())
            )
            progress.update(sum(sizes[piece] * share for piece, share in shares.items()), note)

        for name, result in start(todo, on_report) if todo else ():
            self._parts.commit(name, result)
            results[name] = result
            on_report(name, {"done": 1.0})
        progress.finish()
        return {name: results[name] for name in items}
