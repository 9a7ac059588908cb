"""ImageNet-1K at full width and small depth: 1,000 classes with every job, piece and shard of the real run, but tiny
images, light experts and few iterations.

    make dry-run     # everything below a temporary folder; prints counts, times and peak memory

--folder keeps the run and writes the figures to dry_run.json there. The number of shards follows from bytes, so the limit
of a shard is scaled down with the pixels.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cvdd_ray.core.models import build_seeded, save_weights
from cvdd_ray.data import images, shards
from cvdd_ray.recipes import load_config
from cvdd_ray.runner import start_runtime
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import run_all

EXPERTS = ("shufflenet_v2", "mobilenet_v2")
REAL_SIZE = 224


def make_images(root: Path, num_classes: int, per_class: int, size: int, listed: int = 0) -> None:
    """Write train/ and val/ with noisy gradients of a colour per class: `per_class` and one JPEG file of each; further
    names of the first file make `listed` train images."""
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 25, (16, size, size + 8, 3))
    ramp = np.linspace(-60, 60, size + 8)[None, :, None]
    for label in range(num_classes):
        colour = draw.uniform(60, 195, 3)
        for split, count in (("train", per_class), ("val", 1)):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + ramp + noise[(label + i) % 16], 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
        for i in range(per_class, listed):
            os.link(root / "train" / f"n{label:08d}" / "0.JPEG", root / "train" / f"n{label:08d}" / f"{i}.JPEG")


def make_weights(root: Path, num_classes: int, size: int) -> dict[str, str]:
    """Write weights of the two experts with the statistics of one batch of noise; return their files by name."""
    root.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in EXPERTS:
        model = build_seeded(name, num_classes, size, seed=0).train()
        with torch.no_grad():
            model(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)))
        files[name] = str(root / f"{name}.safetensors")
        Path(files[name]).write_bytes(save_weights(model))
    return files


def dry_config(
    root: Path, *, num_classes: int, size: int, ipc: int, per_class: int, iterations: int, epochs: int, factor: int = 2
):
    """Return the recipe imagenet1k-ipc10, small where that changes no count."""
    weights = make_weights(root / "weights", num_classes, size)
    return load_config(
        "imagenet1k-ipc10",
        [
            f"data={{source: imagenet, path: {root / 'images'}, image_size: {size}, holdout: 0.0005}}",
            f"ipc=[{ipc}]",
            f"committee.experts=[{', '.join(EXPERTS)}]",
            f"committee.weights={json.dumps(weights)}",
            "prior.values={shufflenet_v2: 43.73, mobilenet_v2: 39.15}",
            f"initialize={{images_per_class: {per_class - 1}, num_crops: 1, factor: {factor}}}",
            f"synthesize.iterations={iterations}",
            f"relabel={{epochs: {epochs}, teachers: [shufflenet_v2]}}",
            "evaluate={students: [shufflenet_v2], epochs: 1, seeds: 1, baselines: []}",
            "runtime={num_cpus: 2, object_store_mb: 1024, placement: colocate}",
        ],
    )


class Timings:
    """Progress that remembers how long every part of a stage took, in seconds."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def start(self, title: str, total: float, unit: str) -> None:
        self._title, self._began = f"{title} ({total:.0f} {unit})", time.monotonic()
        print(self._title, flush=True)

    def update(self, done: float, note: str = "", detail: str = "") -> None: ...

    def finish(self, note: str = "") -> None:
        self.seconds[self._title] = time.monotonic() - self._began

    def say(self, text: str) -> None:
        print(text, flush=True)


class PeakMemory(threading.Thread):
    """Watches this process and all it started; `peaks`: MiB of private memory, the largest of each kind of process."""

    def __init__(self, every_s: float = 0.5):
        super().__init__(daemon=True)
        self.peaks: Counter[str] = Counter()
        self._every_s, self._stopped = every_s, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._every_s):
            for pid in self._family():
                try:
                    status = dict(
                        line.split(":\t", 1)
                        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                        if ":\t" in line
                    )
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    kind = "driver" if pid == os.getpid() else words[0].decode().split("/")[-1]
                    self.peaks[kind] = max(self.peaks[kind], int(status["RssAnon"].split()[0]) // 1024)
                except (OSError, KeyError):
                    continue  # it has ended

    def _family(self) -> list[int]:
        parents = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit():
                    parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
        own = {os.getpid()}
        while more := {pid for pid, parent in parents.items() if parent in own} - own:
            own |= more
        return sorted(own)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def dry_run(root: Path, *, listed: int = 0, **numbers) -> dict:
    """Make images and weights below `root`, run all stages on a private Ray into root/run, and return
    what was measured."""
    make_images(root / "images", numbers["num_classes"], numbers["per_class"], numbers["size"], listed)
    config = dry_config(root, **numbers)
    shards.SHARD_BYTES = round(shards.SHARD_BYTES * (numbers["size"] / REAL_SIZE) ** 2)
    images.VERIFY_LIMIT = 0  # as for a set of 1.28 million
    timings, memory, began = Timings(), PeakMemory(), time.monotonic()
    memory.start()
    run = Run(config, str(root / "run"), progress=timings)
    run.runtime = start_runtime(config.runtime, run.store, timings.say)
    try:
        run_all(run)
    finally:
        memory.stop()
        run.close()
    written = [path for path in (root / "run").rglob("*") if path.is_file()]
    return {
        "seconds": timings.seconds,
        "wall_s": time.monotonic() - began,
        "peaks": memory.peaks,
        "files": Counter(path.relative_to(root / "run").parts[0] for path in written),
        "bytes": sum(path.stat().st_size for path in written),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("num-classes", 1000), ("size", 72), ("ipc", 10), ("per-class", 46), ("listed", 1281), ("iterations", 2), ("epochs", 30),
        ("factor", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path)
    numbers = vars(parser.parse_args())
    kept = numbers.pop("folder")
    with tempfile.TemporaryDirectory() as temporary:
        found = dry_run(kept or Path(temporary), **numbers)
    for title, seconds in found["seconds"].items():
        print(f"{seconds:8.1f} s  {title}")
    print(f"{found['wall_s']:8.1f} s  in all")
    for kind, peak in sorted(found["peaks"].items()):
        print(f"{peak:6d} MiB  {kind}")
    print(f"files: {dict(found['files'])}, {found['bytes'] / 2**20:.0f} MiB")
    if kept:
        (kept / "dry_run.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
