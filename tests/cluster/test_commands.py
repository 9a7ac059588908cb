"""Every command in the cluster files, as the shell, Ray's command line, run.py and SLURM take them."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import time

import click
import pytest
import yaml
from clusters import REPOSITORY
from ray.scripts.scripts import cli as ray_cli
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import load_config, recipe_names
from cvdd_ray.sweepconfig import load_sweep

CLUSTER = REPOSITORY / "cluster"
TEXTS = {path.name: path.read_text() for path in sorted(CLUSTER.iterdir()) if path.is_file()}
README = (REPOSITORY / "README.md").read_text()
CONSOLE = "\n".join(re.findall(r"^```console\n(.*?)^```$", README, re.S | re.M))
TO_COME = {"imagenet1k-ipc10"}  # may be named before it is packaged
SBATCH = CLUSTER / "slurm.sbatch"


def shell_snippets() -> dict[str, str]:
    """Every piece of shell: start and set-up commands of Ray's files, RUN lines of the image, the batch script."""
    found = {"slurm.sbatch": SBATCH.read_text()}
    for name, text in TEXTS.items():
        content = yaml.safe_load(text) if name.endswith(".yaml") else {}
        for key, value in content.items():
            if key.endswith("_commands"):
                found |= {f"{name} {key} {k}": command for k, command in enumerate(value)}
    for k, command in enumerate(re.findall(r"^RUN (.*)$", TEXTS["Dockerfile"], re.M)):
        found[f"Dockerfile RUN {k}"] = command
    return found


SNIPPETS = shell_snippets()


def is_shell(snippet: str) -> bool:
    return subprocess.run(["bash", "-n"], input=snippet, text=True, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_shell_can_read_it(name):
    assert is_shell(SNIPPETS[name])


LOST = {
    "cluster.yaml setup_commands 0": "~/venv)",
    "cluster.yaml setup_commands 1": "'export",
    "slurm.sbatch": "requeue() {",
}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_quote_or_bracket_is_caught(name):
    assert LOST[name] in SNIPPETS[name]
    assert not is_shell(SNIPPETS[name].replace(LOST[name], LOST[name].strip("'{)\n"), 1))


@pytest.mark.parametrize("name", ["cluster.yaml", "gcp.yaml"])
def test_every_shell_of_a_node_gets_the_settings_once(name, tmp_path):
    """The line that writes ~/.bashrc, run twice as `ray up` does, and what a shell then has."""
    (line,) = [
        command for key, command in SNIPPETS.items() if key.startswith(f"{name} setup_commands") and "bashrc" in command
    ]
    (tmp_path / ".bashrc").write_text("# Ubuntu's own\n")
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for _ in range(2):
        subprocess.run(["bash", "-c", f"source ~/.bashrc; ({line})"], env=env, check=True)
    assert (tmp_path / ".bashrc").read_text().count("export") == 4
    shown = subprocess.run(["bash", "-c", "source ~/.bashrc; env"], env=env, check=True, capture_output=True, text=True)
    after = dict(entry.split("=", 1) for entry in shown.stdout.splitlines() if "=" in entry)
    assert (after["RAY_AUTH_MODE"], after["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"]) == ("token", "1")
    assert after["TORCH_HOME"] == f"{tmp_path}/torch"
    assert after["PATH"] == f"{tmp_path}/venv/bin:{env['PATH']}"


# ---- Ray's commands


def ray_commands(text: str) -> list[list[str]]:
    """Words of every `ray VERB ...` in a heading or a piece of shell."""
    found = re.findall(r"^(?:#\s+|    )?(?:\(umask 077; )?(ray (?!symmetric-run)[a-z-]+ .*)$", text, re.M)
    if not text.startswith("#"):
        found += re.findall(r"\bray (?:start|stop)\b[^;|&)]*", text)
    return [shlex.split(re.split(r"\s{2,}#|\s>", line)[0]) for line in found]


def ray_fault(words: list[str]) -> str | None:
    """Why Ray's command line would refuse the words; None if it would not."""
    command, words = ray_cli, words[1:]
    while isinstance(command, click.Group):
        if not words or words[0] not in command.commands:
            return f"no such command: {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
    try:
        command.make_context(command.name, list(words))
    except click.ClickException as error:
        return error.format_message()
    return None


RAY_COMMANDS = sorted(
    {tuple(words) for text in [*TEXTS.values(), *SNIPPETS.values(), CONSOLE] for words in ray_commands(text)}
)


def test_there_are_commands_of_every_kind():
    assert {words[1] for words in RAY_COMMANDS} >= {"up", "submit", "down", "job", "start", "stop", "get-auth-token"}


@pytest.mark.parametrize("words", RAY_COMMANDS, ids=" ".join)
def test_ray_knows_the_command_and_its_files_are_there(words):
    assert ray_fault(list(words)) is None
    files = [word for word in words if word.startswith("cluster/")]
    assert not [word for word in files if not (REPOSITORY / word).is_file()]


@pytest.mark.parametrize(
    "wrong", ["ray start --haed", "ray sumbit a b", "ray start --head --port=x", "ray job submti -- a"]
)
def test_wrong_ray_commands_are_caught(wrong):
    assert ray_fault(wrong.split())


# ---- the driver's words


def driver_words(text: str) -> list[str]:
    """What is handed to run.py: after its name, or as the batch script's `words=(...)`."""
    found = re.findall(r"cluster/run\.py (?:-- )?(--[a-z].*)$", text, re.M)
    found += re.findall(r"words=\((--.*)\)$", text, re.M)
    found += re.findall(r"cluster/slurm\.sbatch (--[a-z].*)$", text, re.M)
    return [re.split(r"\s{2,}#", line)[0].strip().rstrip("`") for line in found]


def driver_fault(line: str) -> str | None:
    """Why run.py would refuse the words; None if it would not."""
    try:
        given = runpy.run_path(str(CLUSTER / "run.py"))["parse"](shlex.split(line))
    except SystemExit:
        return f"not run.py's words: {line}"
    try:
        if given.sweep:
            load_sweep(str(REPOSITORY / given.sweep.removeprefix("cvdd/")), given.set, base=given.recipe)
        elif given.recipe not in TO_COME - set(recipe_names()):
            load_config(given.recipe, given.set)
    except ConfigError as error:
        return str(error)
    return None


DRIVERS = sorted({line for text in [*TEXTS.values(), README] for line in driver_words(text)})


@pytest.mark.parametrize(
    "name", ["cluster.yaml", "gcp.yaml", "rayjob.yaml", "raycluster.yaml", "slurm.sbatch", "run.py"]
)
def test_every_way_shows_how_to_start_a_run(name):
    assert driver_words(TEXTS[name])


@pytest.mark.parametrize("line", DRIVERS)
def test_the_driver_takes_the_words(line):
    assert driver_fault(line) is None


@pytest.mark.parametrize(
    "wrong", ["--recipe nope --out o", "--recipe digits-demo --outt o", "--recipe digits-demo --out o --set a.b=1"]
)
def test_wrong_driver_words_are_caught(wrong):
    assert driver_fault(wrong)


def test_the_jobs_entrypoint_is_the_driver_of_the_image():
    entrypoint = yaml.safe_load(TEXTS["rayjob.yaml"])["spec"]["entrypoint"]
    home = re.search(r"^WORKDIR (.*)$", TEXTS["Dockerfile"], re.M)[1]
    assert entrypoint.startswith(f"python {home}/cluster/run.py --recipe ")


def test_the_image_copies_what_is_there():
    copied = [line.split()[2:-1] for line in TEXTS["Dockerfile"].splitlines() if line.startswith("COPY ")]
    sources = [source for line in copied for source in line]
    assert {"pyproject.toml", "README.md", "LICENSE", "cvdd_ray", "cluster/run.py"} <= set(sources)
    assert not [source for source in sources if not (REPOSITORY / source).exists()]


def test_the_readme_says_when_to_take_which_file_and_misses_none():
    table = README.split("| you have | file in `cluster/` |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([A-Za-z]+(?:\.(?:yaml|py|sbatch))?)`", table)) >= set(TEXTS)


# ---- SLURM: the batch script with stand-ins for SLURM's own commands


STANDINS = {
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "scontrol $*" >> "$HOME/said"; fi',
    "srun": 'case "$*" in *hostname*) echo "$*" >> "$HOME/said"; echo "10.0.0.1 172.17.0.1";; '
    '*) while [ "${1#--}" != "$1" ]; do shift; done; printf "%s\\n" "$@" > "$HOME/words"; '
    'env > "$HOME/env"; eval "$SRUN_DOES";; esac',
}


def batch(tmp_path, *words, does="true", warned=False):
    """Run the batch script; returns (exit code, words of the step, its environment, what SLURM was told)."""
    for name, code in STANDINS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("words", "env", "said"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    env = {
        "HOME": str(tmp_path), "USER": "me", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SRUN_DOES": does,
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip
    process = subprocess.Popen(["bash", str(SBATCH), *words], env=env, stderr=subprocess.PIPE, text=True)
    if warned:
        while not (tmp_path / "env").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
    error = process.communicate(timeout=30)[1]
    assert (tmp_path / "words").exists(), (process.returncode, error)
    step = dict(entry.split("=", 1) for entry in (tmp_path / "env").read_text().splitlines() if "=" in entry)
    return process.returncode, (tmp_path / "words").read_text().splitlines(), step, (tmp_path / "said").read_text()


def test_the_batch_script_starts_ray_on_every_node_and_the_driver_on_the_first(tmp_path):
    code, words, env, said = batch(tmp_path)
    assert code == 0
    assert "--nodelist=n1" in said
    assert words[:2] == ["ray", "symmetric-run"]
    own, _, entrypoint = " ".join(words[2:]).partition(" -- ")
    params = symmetric_run.make_context("symmetric-run", own.split(), resilient_parsing=True).params
    assert (params["address"], params["min_nodes"]) == ("10.0.0.1:6379", 2)
    started = curate_and_validate_ray_start_args(own.split())
    assert ray_fault(["ray", "start", "--head", *started]) is None
    assert started == ["--num-cpus", "32", "--num-gpus", "4"]
    assert entrypoint.startswith("python cluster/run.py --recipe imagenet1k-ipc10 --out ")
    assert env["RAY_AUTH_MODE"] == "token"
    assert len(env["RAY_AUTH_TOKEN"]) == 64
    assert env["TORCH_HOME"].startswith("/tmp/torch-me")
    assert batch(tmp_path)[2]["RAY_AUTH_TOKEN"] != env["RAY_AUTH_TOKEN"]


def test_the_batch_script_hands_words_on_as_they_are(tmp_path):
    given = ["--recipe", "digits-demo", "--out", "/a b", "--set", "ipc=[1, 10]"]
    assert batch(tmp_path, *given)[1][-6:] == given


def test_the_batch_script_ends_as_the_driver_does(tmp_path):
    assert batch(tmp_path, does="exit 2")[0] == 2


def test_the_batch_script_requeues_itself_before_its_time_is_up(tmp_path):
    *_, said = batch(tmp_path, does="exec sleep 5", warned=True)
    assert "scontrol requeue 77" in said


def test_the_batch_script_asks_slurm_for_what_it_relies_on():
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", SBATCH.read_text(), re.M))
    assert asked["ntasks-per-node"] == "1"
    assert {"requeue", "exclusive", "gpus-per-node", "cpus-per-task"} <= set(asked)
    assert asked["signal"].startswith("B:USR1@")
