"""Configuration files, sweep files and --set that cannot be meant."""

from pathlib import Path

from badinput import Bad


def _file(name: str, content: str | bytes, says: str, *, verb: str = "run", kind: str = "", theirs: str = "") -> Bad:
    def prepare(folder: Path) -> None:
        (folder / "my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())

    kind = kind or ("sweep file" if verb == "sweep" else "configuration file")
    return Bad(kind, name, f"{verb} my.yaml --out {{out}}", says, prepare, theirs)


def _set(name: str, setting: str, says: str) -> Bad:
    quoted = "'" + setting.replace("'", "'\\''").replace("{", "{{").replace("}", "}}") + "'"
    return Bad("--set", name, f"run digits-demo --out {{out}} --set runtime.engine=local --set {quoted}", says)


def _space(name: str, space: str, says: str, more: str = "") -> Bad:
    return _file(name, f"base: digits-demo\nsweep: {{space: {space}{more}}}\n", says, verb="sweep")


def _bomb(folder: Path) -> None:
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 9)]
    (folder / "my.yaml").write_text("\n".join([*rows, "ipc: *a8"]))


def _folder(name: str):
    return lambda folder: (folder / name).mkdir()


_PROGRAM = "!!python/object/apply:os.system ['touch CANARY']"
_THOUSAND = list(range(1, 1001))
_RANDOM = ", search: random, num_trials: "

CASES = [
    _file("empty list", "[]", "needs sections with keys"),
    _file("a number", "7", "needs sections with keys"),
    _file("a list of sections", "- seed: 1\n- ipc: [1]\n", "needs sections with keys"),
    _file("plain prose", "distil ten images please", "needs sections with keys"),
    _file("broken YAML", "synthesize: {iterations: 5", "cannot be read as YAML"),
    _file("tab as indentation", "synthesize:\n\titerations: 5\n", "cannot be read as YAML"),
    _file("two documents", "seed: 1\n---\nseed: 2\n", "cannot be read as YAML"),
    _file("latin-1", "description: Größe\n".encode("latin-1"), "UTF-8"),
    _file("UTF-16", "seed: 1\n".encode("utf-16"), "UTF-8"),
    _file("a NUL byte", b"seed: 1\0\n", "cannot be read as YAML"),
    _file("a PNG", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "UTF-8"),
    _file("a Python object", f"seed: {_PROGRAM}", "of the kind 'python/object/apply"),
    _file("a Python name", "seed: !!python/name:os.system", "of the kind 'python/name:os.system'"),
    _file("a key twice", "seed: 1\nseed: 2\n", "seed"),
    _file("a key twice in a section", "synthesize: {lr: 0.1, iterations: 5, lr: 0.2}\n", "lr"),
    _file("a section twice", "synthesize: {lr: 0.1}\nvoting: {size: 2}\nsynthesize: {iterations: 5}\n", "synthesize"),
    Bad("configuration file", "aliases that grow to a billion values", "run my.yaml --out {out}", "alias", _bomb),
    _file("an alias of itself", "ipc: &a [*a]\n", "alias"),
    _file("nested too deep", "ipc: " + "[" * 5000 + "]" * 5000, "nested"),
    _file("an integer of 5,000 digits", "seed: " + "9" * 5000, "cannot be read as YAML"),
    _file("a key that is a number", "1: 2\n", "1"),
    _file("a key that is a list", "[a, b]: 2\n", "a list is a key, but not text"),
    _file("a key in a section that is null", "synthesize: {~: 2}\n", "'~' is a key, but not text"),
    _file("a date", "seed: 2026-11-30\n", "of the kind 'timestamp'"),
    _file("a set", "committee: {experts: !!set {resnet18, resnet50}}\n", "of the kind 'set'"),
    _file("bytes", "data: {path: !!binary aGVsbG8=}\n", "of the kind 'binary'"),
    _file("an empty section", "synthesize:\n", "synthesize"),
    _file("a section that is a list", "synthesize: [lr, 0.1]\n", "synthesize"),
    _file("a section that is a number", "evaluate: 3\n", "evaluate"),
    _file("unknown section", "synthesise: {lr: 0.1}\n", "did you mean 'synthesize'"),
    _file("unknown key in a section", "evaluate: {learning_rate: 0.1}\n", "evaluate.learning_rate: unknown key"),
    _file("unknown key in a list of sections", "evaluate: {phases: [{from_epoch: 3, speed: 1}]}\n", "evaluate.phases.0.speed"),
    _file("many mistakes", "sed: 1\nipc: x\nvoting: {sise: 3, size: -1}\n", "voting.sise"),
    _file("a base that is not there", "base: nope\n", "neither packaged nor a file"),
    _file("a base that is a number", "base: 5\n", "base"),
    _file("a base that is a list", "base: [digits-demo]\n", "base"),
    _file("its own base", "base: my.yaml\n", "circle"),
    _file("a sweep for `cvdd run`", "sweep: {space: {evaluate.lr: {grid: [0.1]}}}\n", "run it with `cvdd sweep`"),
    Bad("configuration file", "a directory", "run recipes --out {out}", "directory", _folder("recipes")),
    Bad("configuration file", "a directory as base", "run my.yaml --out {out}", "directory",
        lambda folder: ((folder / "old").mkdir(), (folder / "my.yaml").write_text("base: old\n"))),
    Bad("configuration file", "not there", "run nope.yaml --out {out}", "neither packaged nor a file"),
    Bad("configuration file", "a name that is too long", f"run {'a' * 5000} --out {{out}}", "neither packaged nor a file"),
    Bad("configuration file", "a name that is empty", "run '' --out {out}", "recipe ''"),
    Bad("configuration file", "a recipe's name with a slash", "run recipes/digits-demo --out {out}", "neither packaged nor"),
    Bad("configuration file", "too large", "run my.yaml --out {out}", "larger than 2 MiB",
        lambda folder: (folder / "my.yaml").write_text("# " + "x" * (3 << 20))),
    # values
    _set("text for a number", "synthesize.iterations=many", "synthesize.iterations: got 'many'"),
    _set("a fraction for a count", "synthesize.iterations=2.5", "synthesize.iterations"),
    _set("true for a count", "synthesize.iterations=true", "synthesize.iterations"),
    _set("false for a number", "synthesize.bn_weight=false", "synthesize.bn_weight"),
    _set("null for a count", "synthesize.iterations=null", "synthesize.iterations"),
    _set("a list for a number", "synthesize.lr=[0.1]", "synthesize.lr"),
    _set("a mapping for a number", "synthesize.lr={a: 1}", "synthesize.lr"),
    _set("a number for text", "data.path=5", "data.path"),
    _set("text for a list", "ipc=many", "ipc"),
    _set("a number for a list", "ipc=10", "ipc"),
    _set("an empty list", "ipc=[]", "ipc"),
    _set("a value twice", "ipc=[2, 2]", "ipc"),
    _set("text for true or false", "synthesize.augment=perhaps", "synthesize.augment"),
    _set("zero", "pretrain.epochs=0", "pretrain.epochs"),
    _set("a negative number", "evaluate.lr=-0.1", "evaluate.lr"),
    _set("NaN", "evaluate.lr=.nan", "evaluate.lr"),
    _set("NaN where 0 is allowed", "evaluate.weight_decay=.nan", "evaluate.weight_decay"),
    _set("infinity", "evaluate.lr=.inf", "evaluate.lr"),
    _set("infinity as text", "relabel.temperature=inf", "relabel.temperature"),
    _set("a NaN prior", "prior={method: given, values: {resnet18: .nan}}", "prior.values.resnet18"),
    _set("an infinite wait", "runtime.wait_s=.inf", "runtime.wait_s"),
    _set("a huge number", "synthesize.iterations=100000000000000000000", "synthesize.iterations"),
    _set("a huge image size", "data.image_size=1000000000", "data.image_size"),
    _set("more images per class than there are", "ipc=[500]", "ipc"),
    _set("far more images per class", "ipc=[1000000000]", "ipc"),
    _set("a huge object store", "runtime.object_store_mb=99999999999999", "runtime.object_store_mb"),
    _set("a negative seed", "seed=-1", "seed"),
    _set("a huge seed", "seed=4294967296", "seed"),
    _set("a share above 1", "data.holdout=1.5", "data.holdout"),
    _set("a range the wrong way round", "synthesize.crop_scale=[0.9, 0.1]", "synthesize.crop_scale"),
    _set("a range of three", "synthesize.crop_scale=[0.1, 0.2, 0.3]", "synthesize.crop_scale"),
    _set("betas of 1", "synthesize.betas=[0.5, 1.0]", "synthesize.betas"),
    _set("an unknown choice", "synthesize.image_format=gif", "'png' or 'jpeg75_trunc'"),
    _set("an unknown source", "data.source=imagenet21k", "data.source"),
    _set("an unknown data set", "data={source: folder, path: ., dataset: mnist}", "data.dataset 'mnist' is unknown"),
    _set("an unknown expert", "committee.experts=[resnet18, resnet19]", "resnet19"),
    _set("an expert without BatchNorm", "committee.experts=[resnet18, convnet3]", "convnet3 cannot vote"),
    _set("an unknown student", "evaluate.students=[vit]", "vit"),
    _set("an unknown student of priors", "prior.student=vit", "vit"),
    _set("no students", "evaluate.students=[]", "evaluate.students"),
    _set("a student twice", "evaluate.students=[resnet18, resnet18]", "evaluate.students"),
    _set("a baseline twice", "evaluate.baselines=[random_hard, random_hard]", "evaluate.baselines"),
    _set("an expert twice", "committee.experts=[resnet18, resnet18]", "without repeats"),
    _set("no experts", "committee.experts=[]", "non-empty"),
    _set("no teachers", "relabel.teachers=[]", "relabel.teachers"),
    _set("a teacher twice", "relabel.teachers=[resnet18, resnet18]", "relabel.teachers"),
    _set("an unknown teacher", "relabel.teachers=[vgg]", "relabel.teachers"),
    _set("an observer outside the committee", "initialize.observer=vgg", "initialize.observer"),
    _set("more voters than experts", "voting.size=9", "voting.size"),
    _set("a voter outside the committee", "voting={selection: fixed, fixed: [resnet18, vgg]}", "vgg"),
    _set("a voter twice", "voting={selection: fixed, fixed: [resnet18, resnet18]}", "resnet18"),
    _set("weights of an unknown expert", "committee.weights={vgg: a.pth}", "vgg"),
    _set("a prior of an unknown expert", "prior={method: given, values: {vgg: 50}}", "prior.values"),
    _set("a width that explodes", "committee.width=1e9", "committee.width"),
    _set("a tiny image size", "data.image_size=4", "image_size is 4"),
    _set("classes in another order", "data.classes=['1', '0']", "data.classes"),
    _set("no classes", "data.classes=[]", "data.classes"),
    _set("a control character in a path", 'data={source: folder, dataset: cifar10, path: "a\\0b"}', "control character"),
    _set("half a character", 'data={source: folder, dataset: cifar10, path: "\\ud800"}', "character"),
    _set("a secret where a mapping should be", "committee.weights=s3://AKIAKEY:se/cret@bucket/w.pth", "committee.weights"),
    _set("a secret in a name that no key has", "data.s3=s3://AKIAKEY:se/cret@bucket/x", "data.s3: unknown key"),
    _set("a secret that is no YAML", "data.path=[s3://AKIAKEY:se/cret@bucket/x", "cannot be read as YAML"),
    # settings that contradict each other
    _set("download of a folder", "data={source: folder, dataset: cifar10, path: ., download: true}", "data.download"),
    _set("a data set that is another's", "data={source: cifar10, path: ., dataset: cifar100}", "contradicts"),
    _set("values of priors that are measured", "prior.values={resnet18: 50}", "prior.method=given"),
    _set("fixed voters with another rule", "voting={selection: top, fixed: [resnet18, resnet50]}", "no effect"),
    _set("fixed voters of another number", "voting={selection: fixed, fixed: [resnet18]}", "size"),
    _set("more epochs than labels", "evaluate.epochs=100000", "relabel.epochs"),
    _set("eval labels beside eval labels", "relabel.batchnorm=eval", "eval_labels"),
    _set("stored epochs without effect", "relabel.stored_epochs=100000", "no effect"),
    _set("a tail without top_k", "relabel.tail=spread", "top_k"),
    _set("top_k above the number of classes", "relabel.top_k=1000", "top_k"),
    _set("online labels of a precision", "relabel={online: true, precision: int8}", "no effect"),
    _set("a BatchNorm group above the batch", "relabel={batch_size: 4, bn_group: 8}", "bn_group"),
    _set("BatchNorm of one image", "relabel={batch_size: 1}", "at least 2"),
    _set("warm-up longer than training", "evaluate.warmup_epochs=100000", "warmup_epochs"),
    _set("phases in falling order", "evaluate.phases=[{from_epoch: 9, lr: 0.1}, {from_epoch: 3, lr: 0.2}]", "rising"),
    _set("a phase after the end", "evaluate.phases=[{from_epoch: 100000, lr: 0.1}]", "phase"),
    _set("a phase that changes nothing", "evaluate.phases=[{from_epoch: 3}]", "phase"),
    _set("several workers in one process", "evaluate.workers=2", "evaluate.workers"),
    _set("an address without Ray", "runtime.address=auto", "address has no effect"),
    _set("a wire without Ray", "runtime.wire=torch", "wire 'torch' has no effect"),
    _set("an unknown wire", "runtime.wire=nccl", "runtime.wire"),
    _set("waiting without an address", "runtime.wait_for_gpus=2", "no effect"),
    # --set itself
    _set("no value", "synthesize.iterations", "give section.key=value"),
    _set("no key", "=5", "give section.key=value"),
    _set("nothing", "", "give section.key=value"),
    _set("an empty section", ".lr=5", "give section.key=value"),
    _set("two dots", "synthesize..lr=5", "synthesize..lr"),
    _set("a dot at the end", "synthesize.=5", "synthesize."),
    _set("a value as section", "seed.lr=5", "seed"),
    _set("a list's item", "ipc.0=5", "ipc"),
    _set("an open bracket", "ipc=[1", "cannot be read as YAML"),
    _set("an alias", "ipc=*a", "cannot be read as YAML"),
    _set("a Python object", f"seed={_PROGRAM}", "of the kind 'python/object/apply"),
    _set("a base", "base=cifar10", "base"),
    _set("a key twice", "synthesize={lr: 1.0, lr: 2.0}", "lr"),
    # sweeps
    _file("no sweep in it", "base: digits-demo\n", "sweep: is missing", verb="sweep"),
    _file("an empty sweep", "base: digits-demo\nsweep:\n", "sweep", verb="sweep"),
    _file("a sweep that is a list", "base: digits-demo\nsweep: [1]\n", "sweep", verb="sweep"),
    _file("a sweep without space", "base: digits-demo\nsweep: {search: grid}\n", "sweep.space: is missing", verb="sweep"),
    _space("an empty space", "{}", "space is empty"),
    _space("a space that is a list", "[evaluate.lr]", "sweep.space"),
    _space("an unknown kind", "{evaluate.lr: {gird: [0.1, 0.2]}}", "gird"),
    _space("a domain that is a number", "{evaluate.lr: 0.1}", "sweep.space.evaluate.lr"),
    _space("two kinds", "{evaluate.lr: {grid: [0.1], uniform: [0.1, 0.2]}}", "exactly one"),
    _space("an empty grid", "{evaluate.lr: {grid: []}}", "at least 1"),
    _space("a value twice", "{evaluate.lr: {grid: [0.1, 0.1]}}", "twice"),
    _space("a NaN in a grid", "{evaluate.lr: {grid: [0.1, .nan]}}", "evaluate.lr"),
    _space("an unknown setting", "{evaluate.speed: {grid: [1, 2]}}", "evaluate.speed"),
    _space("a setting of the machine", "{runtime.num_cpus: {grid: [1, 2]}}", "where work runs"),
    _space("the seed", "{seed: {grid: [1, 2]}}", "hold-out"),
    _space("a grid of a million", f"{{evaluate.lr: {{grid: {_THOUSAND}}}, evaluate.temperature: {{grid: {_THOUSAND}}}}}",
           "combinations"),
    _space("a range the wrong way round", "{evaluate.lr: {uniform: [0.2, 0.1]}}", "low < high", _RANDOM + "2"),
    _space("a range of NaN", "{evaluate.lr: {uniform: [.nan, 1]}}", "evaluate.lr", _RANDOM + "2"),
    _space("an infinite range", "{evaluate.lr: {loguniform: [0.1, .inf]}}", "evaluate.lr", _RANDOM + "2"),
    _space("a range from zero on a log scale", "{evaluate.lr: {loguniform: [0, 1]}}", "low < high", _RANDOM + "2"),
    _space("a range in a grid search", "{evaluate.lr: {uniform: [0.1, 0.2]}}", "search 'grid' takes"),
    _space("no number of trials", "{evaluate.lr: {uniform: [0.1, 0.2]}}", "num_trials", ", search: random"),
    _space("a huge number of trials", "{evaluate.lr: {uniform: [0.1, 0.2]}}", "num_trials", _RANDOM + "100000000000"),
    _space("a value that no run can have", "{evaluate.lr: {grid: [0.1, -1]}}", "evaluate.lr=-1"),
    _space("pbt of what cannot change", "{synthesize.lr: {uniform: [0.1, 0.2]}}", "pbt", _RANDOM + "4, scheduler: pbt"),
    _space("asha with swept epochs", "{evaluate.epochs: {grid: [1, 2]}}", "asha", ", scheduler: asha"),
    _space("an option without effect", "{evaluate.lr: {grid: [0.1, 0.2]}}", "no effect", ", grace_epochs: 3"),
    _space("a list for a text", "{committee.weights: {grid: [[1], [2]]}}", "committee.weights"),
    Bad("sweep file", "a directory", "sweep tune --out {out}", "directory", _folder("tune")),
    Bad("sweep file", "a recipe", "sweep digits-demo --out {out}", "sweep: is missing"),
]  # fmt: skip
