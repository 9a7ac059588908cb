"""Commands that cannot be meant, and places that cannot be read or written."""

from pathlib import Path

from badinput import Bad

VERBS = ("run", "pretrain", "prior", "initialize", "synthesize", "relabel", "evaluate", "sweep", "plan", "bench", "show",
         "share", "export", "recipes", "schema")  # fmt: skip


REASON = r"(?<=cannot be written )\([^)]*\)"  # the system's words


def _cli(name: str, command: str, says: str, prepare=lambda folder: None) -> Bad:
    return Bad("command", name, command, says, prepare)


def _place(name: str, out: str, says: str, prepare=lambda folder: None, theirs: str = REASON) -> Bad:
    return Bad(
        "place of results", name, f"run digits-demo --set runtime.engine=local --out {out}", says, prepare, theirs
    )


def _write(name: str, text: str = "x"):
    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return prepare


CASES = [
    *(_cli(f"an unknown option of {verb}", f"{verb} --speed 9", "--speed") for verb in VERBS),
    *(_cli(f"too many words for {verb}", f"{verb} a b c d --out {{out}}", "unexpected extra argument")
      for verb in ("synthesize", "pretrain", "evaluate")),
    *(_cli(f"nothing for {verb}", verb, "Missing argument") for verb in ("run", "sweep", "plan", "bench", "show", "share")),
    *(_cli(f"nothing for {verb}", verb, "give a recipe")
      for verb in ("pretrain", "prior", "initialize", "synthesize", "relabel", "evaluate")),
    _cli("an unknown verb", "distil digits-demo", "distil"),
    _cli("a verb with a capital", "Run digits-demo", "Run"),
    _cli("--out without a directory", "run digits-demo --out", "--out"),
    _cli("--set without a setting", "run digits-demo --set", "--set"),
    _cli("--overwrite with a value", "run digits-demo --overwrite=yes", "--overwrite"),
    _cli("an unknown recipe to print", "recipes nope", "neither packaged nor a file"),
    _cli("a composed recipe of another size", "recipes cifar10-ipc7-r18", "images per class"),
    _cli("an option for a stage that only run has", "evaluate digits-demo --reuse x", "--reuse"),
    _cli("a stage of a run that is not there", "evaluate --out {out}", "no run there"),
    _cli("a run that is not there", "show nope", "nope"),
    _cli("a file instead of a run", "show my.yaml", "my.yaml", _write("my.yaml")),
    _cli("an empty directory", "show empty", "holds no run", lambda folder: (folder / "empty").mkdir()),
    _cli("a directory of other things", "show other", "holds no run", _write("other/notes.txt")),
    _cli("an empty name", "show ''", "empty"),
    _cli("a local directory to share", "share runs/demo", "not in an S3 bucket"),
    _cli("links that work for too long", "share s3://bucket/run --expires 8d", "at most 7d"),
    _cli("links that work for no time", "share s3://bucket/run --expires 0s", "--expires 0s"),
    _cli("links that work for ever", "share s3://bucket/run --expires ever", "--expires ever"),
    _cli("no nodes", "plan digits-demo --nodes 0", "--nodes 0"),
    _cli("fewer than no GPUs", "plan digits-demo --gpus-per-node -1", "--gpus-per-node -1"),
    _cli("half a GPU", "plan digits-demo --gpus-per-node 0.5", "--gpus-per-node"),
    _cli("far too many nodes", "plan digits-demo --nodes 99999999999999999999", "--nodes"),
    _cli("an unknown GPU", "plan digits-demo --gpu h1000", "known are"),
    _cli("more than all of a GPU", "plan digits-demo --gpu h100 --utilization 2", "--utilization 2"),
    _cli("NaN of a GPU", "plan digits-demo --gpu h100 --utilization nan", "--utilization nan"),
    _cli("an infinite speed", "plan digits-demo --flops-per-s inf", "--flops-per-s inf"),
    _cli("a negative speed", "plan digits-demo --flops-per-s -1e12", "--flops-per-s -1e+12"),
    _cli("other classes than there are", "plan digits-demo --classes 7", "digits has 10"),
    _cli("no classes", "plan folder224 --classes 0", "--classes 0"),
    _cli("negative classes", "plan folder224 --classes -3", "--classes -3"),
    _cli("one class", "plan folder224 --classes 1 --train-images 10 --test-images 10", "--classes 1"),
    _cli("too few train images", "plan folder224 --classes 20 --train-images 5", "--train-images 5"),
    _cli("negative test images", "plan folder224 --classes 20 --train-images 500 --test-images -5", "--test-images -5"),
    _cli("bench of unknown work", "bench digits-demo dreaming", "bench knows no 'dreaming'"),
    _cli("bench without rounds", "bench digits-demo --rounds 0", "--rounds 0"),
    _cli("bench with negative iterations", "bench digits-demo synthesis --iterations -1", "--iterations -1"),
    _cli("bench of negative images per class", "bench digits-demo relabel --ipc -1", "--ipc -1"),
    _cli("bench of no images per class", "bench digits-demo relabel --ipc 0", "--ipc 0"),
    _cli("an export without a layout", "export run --dest {out}", "--to"),
    _cli("an export to nowhere", "export run --to hub", "--dest"),
    _cli("an export to an unknown layout", "export run --to zip --dest {out}", "unknown layout"),
    _cli("an export of a run that is not there", "export nope --to hub --dest {out}", "holds no run"),
    _cli("an export in shards of nothing", "export run --to hub --dest {out} --shard-mb 0", "--shard-mb 0"),
    _cli("an export in shards of NaN", "export run --to hub --dest {out} --shard-mb nan", "--shard-mb nan"),
    _cli("an export in infinite shards", "export run --to hub --dest {out} --shard-mb inf", "--shard-mb inf"),
    _cli("an export of fewer than no images", "export run --to hub --dest {out} --ipc -1", "--ipc -1"),
    _cli("stages of nowhere", "run digits-demo --set runtime.engine=local --reuse nope --out {out}", "no finished stage"),
    _cli("stages of a file", "run digits-demo --set runtime.engine=local --reuse my.yaml --out {out}", "no finished stage",
         _write("my.yaml")),
    _cli("a sweep's base that is not there", "sweep my.yaml --base nope --out {out}", "neither packaged nor a file",
         _write("my.yaml", "sweep: {space: {evaluate.lr: {grid: [0.1, 0.2]}}}")),
    _place("a file", "file", "Not a directory", _write("file")),
    _place("below a file", "file/run", "file", _write("file")),
    _place("nothing", "''", "empty"),
    _place("a name that is too long", "a" * 300, "too long"),
    _place("a link to nowhere", "link/run", "link", lambda folder: (folder / "link").symlink_to("/proc/nowhere")),
    _place("a place where nobody can write", "/proc/run", "/proc/run"),
    _place("a bucket without a name", "s3://", "no bucket"),
    _place("a port instead of a bucket", "s3://localhost:9000/run", "a port"),
    _place("half a login", "s3://KEY@bucket/run?region=us-east-1", "KEY:SECRET"),
    _place("an unknown option of S3", "'s3://bucket/run?regoin=us-east-1'", "unknown option regoin"),
    _place("an unknown scheme of S3", "'s3://bucket/run?region=a&scheme=ftp'", "http or https"),
    _place("a wrong flag of S3", "'s3://bucket/run?region=a&anonymous=perhaps'", "true or false"),
    _place("brackets that do not match", "'s3://[bucket/run'", "not a URI"),
    _place("a web address", "https://example.com/run", "s3://bucket/prefix", theirs=r"\(\w+\)"),
    _place("an unknown kind of address", "nfs://host/run", "s3://bucket/prefix", theirs=r"\(\w+\)"),
    _place("a secret in a broken address", "'s3://AKIAKEY:se/cret@bucket:90/run'", "a port"),
]  # fmt: skip
