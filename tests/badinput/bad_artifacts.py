"""Results of earlier stages that were altered, are incomplete, or lead elsewhere."""

import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml
from badinput import Bad

import cvdd_ray
from cvdd_ray.config import RunConfig

EVALUATE = "evaluate --out run --overwrite --set evaluate.lr=0.5"
RELABEL = "relabel --out run --overwrite --set relabel.batch_size=5"


@functools.cache
def finished_run() -> Path:
    """Return the directory of a tiny finished run, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="cvdd-badinput-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = {
        "ipc": [1],
        "data": {"source": "digits", "flip": False, "max_per_class": 20, "max_test": 20},
        "committee": {"experts": ["resnet18", "shufflenet_v2"], "width": 0.125},
        "pretrain": {"epochs": 1},
        "prior": {"method": "given", "values": {"resnet18": 50, "shufflenet_v2": 40}},
        "initialize": {"images_per_class": 5, "num_crops": 1},
        "synthesize": {"iterations": 1},
        "relabel": {"epochs": 1, "batch_size": 10},
        "evaluate": {"seeds": 1, "baselines": []},
        "runtime": {"engine": "local"},
    }
    cvdd_ray.run(RunConfig.model_validate(settings), str(folder / "run"))
    return folder / "run"


def _run(name: str, command: str, says: str, change: Callable[[Path], object], theirs: str = "") -> Bad:
    def prepare(folder: Path) -> None:
        shutil.copytree(finished_run(), folder / "run")
        change(folder / "run")

    return Bad("artifact", name, command, says, prepare, theirs)


def _flip(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 0x01
        (run / name).write_bytes(content)

    return change


def _manifest(stage: str, **changes) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / stage / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _identity(folder: str, **changes) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / folder / "manifest.json"
        about = json.loads(path.read_text())
        about["identity"] |= changes
        path.write_text(json.dumps(about))

    return change


def _text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _gone(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def _replaced(stage: str, name: str, content: bytes) -> Callable[[Path], None]:
    """Put another file in a stage's place, with a manifest that says so."""

    def change(run: Path) -> None:
        (run / stage / name).write_bytes(content)
        path = run / stage / "manifest.json"
        about = json.loads(path.read_text())
        about["files"][name] = hashlib.sha256(content).hexdigest()
        path.write_text(json.dumps(about))

    return change


def _link_out(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        shutil.move(run / name, run.parent / "elsewhere")
        os.symlink("../" * name.count("/") + "../elsewhere", run / name)

    return change


EXPERT, IMAGES, LABELS = "pretrain/resnet18", "synthesize/ipc1", "relabel/ipc1/distilled"
SHA = "does not have the sha256 its manifest says"
DAMAGED = "is damaged or of another schema"
CASES = [
    _run("a flipped bit in an expert", "relabel --out run --overwrite --set relabel.batch_size=5", SHA,
         _flip(f"{EXPERT}/model.safetensors")),
    _run("a flipped bit in distilled images", RELABEL, SHA, _flip(f"{IMAGES}/distilled.arrow")),
    _run("a flipped bit in distilled images, to show", "show run", SHA, _flip(f"{IMAGES}/distilled.arrow")),
    _run("a flipped bit in soft labels", EVALUATE, SHA, _flip(f"{LABELS}/labels.arrow")),
    _run("a flipped bit in soft labels, to export", "export run --to hub --dest {out}", SHA, _flip(f"{LABELS}/labels.arrow")),
    _run("a flipped bit in an expert, to export", "export run --to hub --dest {out}", SHA, _flip(f"{EXPERT}/model.safetensors")),
    _run("a flipped bit in priors", "show run", SHA, _flip("prior/priors.json")),
    _run("a flipped bit in results", "show run", SHA, _flip("evaluate/ipc1/results.json")),
    _run("truncated images", RELABEL, SHA, lambda run: os.truncate(run / IMAGES / "distilled.arrow", 500)),
    _run("truncated labels", EVALUATE, SHA, lambda run: os.truncate(run / LABELS / "labels.arrow", 500)),
    _run("an expert that is gone", RELABEL, "is not there", _gone(f"{EXPERT}/model.safetensors")),
    _run("images that are gone", "show run", "is not there", _gone(f"{IMAGES}/distilled.arrow")),
    _run("labels that are gone", "show run", "is gone", _gone(f"{LABELS}/labels.arrow")),
    _run("a stage that is not finished", RELABEL, "is not finished", _gone(f"{IMAGES}/manifest.json")),
    _run("a manifest of another schema", "show run", DAMAGED, _identity(IMAGES, schema=99)),
    _run("a manifest of another stage", "show run", DAMAGED, _identity(IMAGES, stage="pretrain/resnet18")),
    _run("a manifest that is empty", "show run", DAMAGED, _text(f"{IMAGES}/manifest.json", "")),
    _run("a manifest that is a list", "show run", DAMAGED, _text(f"{IMAGES}/manifest.json", "[]")),
    _run("a manifest that is binary", "show run", DAMAGED, _text(f"{IMAGES}/manifest.json", b"\xff\xfe\0")),
    _run("a manifest nested 100,000 deep", "show run", DAMAGED, _text(f"{IMAGES}/manifest.json", "[" * 100_000)),
    _run("a manifest without classes", "show run", DAMAGED, _identity(IMAGES, classes=None)),
    _run("a manifest whose files are a list", "show run", DAMAGED, _manifest(IMAGES, files=["distilled.arrow"])),
    _run("a manifest with an unknown key", "show run", DAMAGED, _manifest(IMAGES, speed=9)),
    _run("a manifest without hashes", "show run", DAMAGED, _manifest(IMAGES, files={"distilled.arrow": None})),
    _run("a manifest that names an absolute file", "show run", DAMAGED, _manifest(IMAGES, files={"/etc/passwd": "0" * 64})),
    _run("a manifest that names a file above", "show run", DAMAGED, _manifest(IMAGES, files={"../../../x.arrow": "0" * 64})),
    _run("a manifest that does not name its file", RELABEL, "names no file of distilled", _manifest(IMAGES, files={})),
    _run("a link out of the directory", RELABEL, "leads out of", _link_out(f"{IMAGES}/distilled.arrow")),
    _run("a link out of the directory for an expert", RELABEL, "leads out of", _link_out(f"{EXPERT}/model.safetensors")),
    _run("other images with a manifest that fits", RELABEL, "is not an image set",
         _replaced(IMAGES, "distilled.arrow", b"ARROW1\0\0"), theirs=r"(?<=cvdd_ray \()[^;]+(?=\);)"),
    _run("settings that are no YAML", "evaluate --out run", "cannot be read as YAML", _text("config.yaml", "a: [")),
    _run("settings that are binary", "show run", "is not UTF-8", _text("config.yaml", b"\xff\xfe")),
    _run("settings of another version", "show run", "unknown key", _text("config.yaml", "speed: 9\n")),
    _run("settings that are a list", "show run", "needs sections with keys", _text("config.yaml", "[1]")),
    _run("settings that are empty", "show run", "config.yaml: is empty", _text("config.yaml", "")),
    _run("other settings without --overwrite", "evaluate --out run --set evaluate.lr=0.5", "now asked for 0.5", lambda run: None),
    _run("an export over something else", "export run --to hub --dest run", "is not empty", lambda run: None),
    _run("an export over a file", "export run --to hub --dest run/config.yaml", "is a file", lambda run: None),
    _run("an IPC that is not there", "export run --to hub --dest {out} --ipc 7", "name one with --ipc", lambda run: None),
    _run("a sweep's file that is damaged", "show run", "sweep", _text("sweep.yaml", "sweep: 3\n")),
    _run("a sweep without results", "show run", "is not there yet",
         lambda run: (run / "sweep.yaml").write_text(yaml.safe_dump({
             "ipc": [1], "sweep": {"space": {"evaluate.lr": {"grid": [0.1, 0.2]}}}}))),
]  # fmt: skip
