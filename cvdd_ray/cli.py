"""The command line: `cvdd VERB`. Errors a user can mend are one line on stderr and exit code 2."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cvdd_ray.comparing import analyze_command, compare_command
from cvdd_ray.config import RunConfig
from cvdd_ray.errors import ArtifactError, ConfigError, CvddError
from cvdd_ray.recipes import dump_config, load_config, without_login, without_logins
from cvdd_ray.recipes.overview import rich_recipes

app = typer.Typer(
    name="cvdd",
    help="Dataset distillation by committee voting (CV-DD) on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE_OR_YAML", help="A packaged recipe or a YAML file.")]
OptionalRecipe = Annotated[
    str | None,
    typer.Argument(metavar="[RECIPE_OR_YAML]", help="A packaged recipe or a YAML file; default: the run's own config."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. synthesize.iterations=500."),
]
OutOption = Annotated[
    str | None, typer.Option("--out", metavar="DIR", help="Directory (or s3:// URI) of the results; default runs/NAME.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Join this Ray cluster (e.g. auto) instead of starting one here.")
]
ReuseOption = Annotated[
    list[str] | None,
    typer.Option("--reuse", metavar="DIR", help="Take over fitting stages of another run or sweep; may be repeated."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what was made with other settings.")]


@app.command("run")
def run_command(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE_OR_YAML...", help="Packaged recipes or YAML files; several go to DIR/NAME.")
    ],
    set_: SetOption = None, out: OutOption = None, address: AddressOption = None, overwrite: OverwriteOption = False,
    reuse: ReuseOption = None,
) -> None:  # fmt: skip
    """All stages; run again after an interruption, it continues where it stopped. Several recipes, such as the rows of a
    table, run one after another, and each takes over the fitting stages of those before it."""
    names = [Path(recipe).stem for recipe in recipes]
    if len(set(names)) < len(names):
        raise ConfigError(f"recipes of one name go to one directory: {', '.join(names)}; give each once")
    folders = [out] if len(recipes) == 1 else [f"{out or 'runs'}/{name}" for name in names]
    for recipe in recipes if len(recipes) > 1 else ():
        load_config(recipe, _changes(set_, address))
    sources = list(reuse or ())
    for recipe, folder in zip(recipes, folders, strict=True):
        sources.append(_with_run("run", recipe, set_, folder, address, overwrite, sources))
        show(sources[-1])


@app.command("sweep")
def sweep_command(
    file: Annotated[str, typer.Argument(metavar="SWEEP_YAML", help="A file with a `sweep:` section (tune_configs/).")],
    base: Annotated[str | None, typer.Option("--base", metavar="RECIPE", help="Sweep this recipe instead.")] = None,
    set_: SetOption = None, out: OutOption = None, address: AddressOption = None, overwrite: OverwriteOption = False,
    reuse: ReuseOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Ray Tune's own output as well.")] = False,
) -> None:  # fmt: skip
    """Search settings with Ray Tune; run again after an interruption, it continues where it stopped."""
    import cvdd_ray
    from cvdd_ray.runner.progress import open_progress

    config = cvdd_ray.load_sweep(file, _changes(set_, address), base=base)
    folder = out if out is not None else config.storage.out or str(Path("runs") / Path(file).stem)
    progress = open_progress(config.runtime.log_format)
    try:
        cvdd_ray.sweep(
            config, folder, reuse=reuse or (), overwrite=overwrite, progress=progress, on_event=progress.event,
            verbose=verbose,
        )  # fmt: skip
    finally:
        progress.close()
    show(folder)


def _stage_command(verb: str, summary: str) -> None:
    def command(
        recipe: OptionalRecipe = None, set_: SetOption = None, out: OutOption = None, address: AddressOption = None,
        overwrite: OverwriteOption = False,
    ) -> None:  # fmt: skip
        _with_run(verb, recipe, set_, out, address, overwrite)

    app.command(verb, help=summary)(command)


for _verb, _summary in {
    "pretrain": "Train the committee's experts on the real images.",
    "prior": "Measure how well each expert distils alone.",
    "initialize": "Make the starting images from patches of real ones.",
    "synthesize": "Distil: experts vote on every image.",
    "relabel": "Write the soft labels (BSSL).",
    "evaluate": "Train students on the distilled set and test them.",
}.items():
    _stage_command(_verb, _summary)


@app.command("plan")
def plan_command(
    recipe: RecipeArgument, set_: SetOption = None,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", metavar="M", help="GPUs of each.")] = 1,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="TYPE", help="GPU model, e.g. h100, for times.")] = None,
    utilization: Annotated[
        float | None, typer.Option("--utilization", help="Share of its peak that --gpu sustains; assumed: 0.35.")
    ] = None,
    flops_per_s: Annotated[
        float | None, typer.Option("--flops-per-s", metavar="X", help="What one GPU sustains, for times.")
    ] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure the speed on this machine, for times.")] = False,
    classes: Annotated[int | None, typer.Option("--classes", help="Number of classes, where nothing says.")] = None,
    train_images: Annotated[int | None, typer.Option("--train-images", help="Number of train images.")] = None,
    test_images: Annotated[int | None, typer.Option("--test-images", help="Number of test images.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Also how busy 1 to 256 GPUs are in synthesis, for both placements.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:  # fmt: skip
    """How large a run is: work, files, memory, and times for so many GPUs. Nothing is run."""
    import cvdd_ray
    from cvdd_ray.stages.planreport import rich_plan

    planned = cvdd_ray.plan(
        load_config(recipe, set_ or []), nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu, utilization=utilization,
        flops_per_s=flops_per_s, calibrate=calibrate, num_classes=classes, train_images=train_images,
        test_images=test_images, simulate=simulate,
    )  # fmt: skip
    if json_:
        print(json.dumps(planned.plain(), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    for part in rich_plan(planned):
        console.print(part, soft_wrap=not isinstance(part, Table))


@app.command("bench")
def bench_command(
    recipe: RecipeArgument,
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORK]...", help="synthesis, relabel, evaluate, pretrain; with Ray: wire, scheduler."),
    ] = None,
    set_: SetOption = None,
    ipc: Annotated[int | None, typer.Option("--ipc", metavar="N", help="Images per class; default: the recipe's first.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Measured rounds of each side.")] = 3,
    iterations: Annotated[
        int | None, typer.Option("--iterations", metavar="N", help="Synthesis iterations of a round; default: 2; with Ray: 40.")
    ] = None,
    classes: Annotated[int | None, typer.Option("--classes", help="Number of classes, where nothing says.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:  # fmt: skip
    """How fast this machine is at a recipe's work, beside a plain reference. Random images and weights; writes nothing."""
    from cvdd_ray.bench.benchreport import plain_bench, rich_bench
    from cvdd_ray.bench.machine import this_machine
    from cvdd_ray.bench.works import KINDS, WITH_RAY, bench

    config, what = load_config(recipe, set_ or []), what or list(KINDS)
    numbers = {"ipc": ipc, "rounds": rounds, "iterations": iterations, "num_classes": classes}
    results, costs = bench(config, what, **numbers), None
    if with_ray := [name for name in what if name in WITH_RAY]:
        from cvdd_ray.runner import protect_private_cluster

        protect_private_cluster()
        from cvdd_ray.runner.raybench import measure_ray
        from cvdd_ray.runner.raybenchreport import plain_ray, rich_ray

        costs = measure_ray(config, with_ray, **numbers)
    machine = this_machine(config.runtime.threads_per_actor)
    if json_:
        print(json.dumps({**plain_bench(machine, results), **({"ray": plain_ray(costs)} if costs else {})}, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    parts = [*rich_bench(machine, results), ""] if results else []
    for part in [*parts, *(rich_ray(costs) if costs else [])]:
        console.print(part, soft_wrap=not isinstance(part, Table))


@app.command()
def show(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Directory (or s3:// URI) of a run or a sweep.")],
) -> None:
    """Print the summary of a run or a sweep; write its tables and pictures to DIR/report."""
    from cvdd_ray.data.storage import Store
    from cvdd_ray.stages.report import rich_summary, write_report
    from cvdd_ray.stages.summary import summarize_run
    from cvdd_ray.stages.sweepreport import rich_sweep, write_sweep_report
    from cvdd_ray.stages.sweepsummary import is_sweep, read_sweep

    store = Store(folder)
    console = Console(width=None if sys.stdout.isatty() else 100)
    swept = is_sweep(store)
    for part in rich_sweep(read_sweep(store)) if swept else rich_summary(summarize_run(store)):
        console.print(part)
    try:
        written = write_sweep_report(store) if swept else write_report(store)
    except ArtifactError as error:
        if store.is_local:
            raise
        print(f"the report was not written: {error}", file=sys.stderr)  # a bucket that may only be read
        return
    for name, path in written.items():
        console.print(f"{name}: {path}", soft_wrap=True)
    if store.s3 is not None:
        console.print(f"links to them: cvdd share {shlex.quote(without_login(store.root))}", soft_wrap=True)


app.command("compare")(compare_command)
app.command("analyze")(analyze_command)


@app.command()
def share(
    folder: Annotated[str, typer.Argument(metavar="URI", help="s3:// URI of a run or a sweep.")],
    file: Annotated[
        list[str] | None, typer.Option("--file", metavar="NAME", help="A file in there, or a pattern; may be repeated.")
    ] = None,
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="How long the links work, e.g. 90m, 7d.")
    ] = "24h",
) -> None:
    """Print links that let anyone fetch the distilled images, soft labels and report of a run in an S3 bucket."""
    from cvdd_ray.data.sharing import seconds, shared_links

    for name, url in shared_links(folder, file or (), seconds(expires)).items():
        print(f"{name}: {url}")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Directory (or s3:// URI) of a run.")],
    to: Annotated[str, typer.Option("--to", metavar="LAYOUT", help="hub, imagefolder or webdataset.")],
    dest: Annotated[str, typer.Option("--dest", metavar="FOLDER", help="New directory (or s3:// URI) of the export.")],
    ipc: Annotated[int | None, typer.Option("--ipc", metavar="N", help="One of several; hub takes all.")] = None,
    license_: Annotated[
        str, typer.Option("--license", metavar="ID", help="Licence in the Hub's spelling, e.g. cc-by-4.0.")
    ] = "unknown",
    shard_mb: Annotated[float, typer.Option("--shard-mb", help="Largest Parquet or tar file in MiB.")] = 500,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at FOLDER.")] = False,
) -> None:
    """Publish a run: Hugging Face Hub layout, image folder, or WebDataset tar files."""
    import cvdd_ray
    from cvdd_ray.runner.progress import LiveProgress

    progress = LiveProgress()
    try:
        where = cvdd_ray.export(
            folder, to, dest, ipc=ipc, license=license_, shard_mb=shard_mb, overwrite=overwrite, progress=progress
        )
    finally:
        progress.close()
    print(f"exported to {where}")


@app.command()
def recipes(
    words: Annotated[list[str] | None, typer.Argument(metavar="[NAME]", help="Print this recipe, resolved.")] = None,
) -> None:
    """List the packaged recipes, or print one with every setting."""
    names = words[1:] if words and words[0] == "show" else words
    if words and len(names) != 1:
        raise ConfigError(f"recipes {' '.join(words)}: give one recipe, as in cvdd recipes show digits-demo")
    if names:
        print(dump_config(load_config(names[0])), end="")
        return
    console = Console()
    for part in rich_recipes():
        console.print(part, soft_wrap=not isinstance(part, Table))


@app.command()
def schema(
    sweep: Annotated[bool, typer.Option("--sweep", help="Of a sweep file instead of a run's configuration.")] = False,
) -> None:
    """Print the JSON Schema of a configuration file, for editors."""
    from cvdd_ray.sweepconfig import SweepConfig

    print(json.dumps((SweepConfig if sweep else RunConfig).model_json_schema(), indent=1))


def _changes(set_: list[str] | None, address: str | None) -> list[str]:
    return [*(set_ or []), *([f"runtime.address={address}"] if address else [])]


def _with_run(verb: str, recipe, set_, out, address, overwrite, reuse=()) -> str:
    """Build the run, do one verb's work, return the run's directory."""
    if recipe is None and out is None:
        raise ConfigError("give a recipe or a YAML file (`cvdd recipes` lists them), or --out DIR of an existing run")
    changes = _changes(set_, address)
    config = _config_of(out, changes) if recipe is None else load_config(recipe, changes)
    folder = out if out is not None else config.storage.out or str(Path("runs") / Path(recipe).stem)

    from cvdd_ray.data.artifacts import Artifacts, source_stores
    from cvdd_ray.data.storage import Store
    from cvdd_ray.runner.progress import open_progress
    from cvdd_ray.stages.context import Run
    from cvdd_ray.stages.pipeline import STAGES, check, remember, run_all

    progress = open_progress(config.runtime.log_format)
    artifacts = Artifacts(Store(folder), overwrite, sources=source_stores(reuse))
    run = Run(config, artifacts, progress=progress)
    try:
        check(run)
        run.store.require_writable()
        if config.runtime.engine == "ray":
            from cvdd_ray.runner import start_runtime

            run.runtime = start_runtime(config.runtime, run.store, progress.say, progress.event)
        if verb == "run":
            run_all(run)
        else:
            STAGES[verb](run)
            remember(run, verb)
    finally:
        progress.close()
        run.close()
    return folder


def _config_of(folder: str, changes: list[str]) -> RunConfig:
    """Return the configuration an existing run remembers."""
    from cvdd_ray.data.storage import Store
    from cvdd_ray.recipes import parse_config
    from cvdd_ray.stages.pipeline import CONFIG

    store = Store(folder)
    if not store.exists(CONFIG):
        raise ConfigError(f"--out {folder}: no run there ({store.display(CONFIG)} is missing); name a recipe as well")
    return parse_config(store.read(CONFIG), store.display(CONFIG), changes)


def main() -> None:
    """Entry point of `cvdd`: exit code 0, 2 for errors the user can mend, 130 for Ctrl-C."""
    try:
        code = app(standalone_mode=False)
    except CvddError as error:
        print(f"error: {without_logins(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except typer.Exit as exit_:
        code = exit_.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            print(f"error: {error.format_message()}", file=sys.stderr)
            raise SystemExit(2) from None
        raise
    if code == 130:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
    raise SystemExit(code or 0)


if __name__ == "__main__":
    main()
