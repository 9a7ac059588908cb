"""Shared by all tests: one thread per process, a home of their own, one Ray for all tests that need it."""

import os
import secrets
import sys

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_AUTH_MODE"] = "token"  # Ray reads it on import; no token is looked for or left in HOME
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from cvdd_ray.config import RunConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_runtime():
    """One private Ray with two cores for the whole test session."""
    from cvdd_ray.runner.runtime import RayRuntime

    runtime = RayRuntime(tiny_config().runtime)
    yield runtime
    runtime.close()


@pytest.fixture(scope="session")
def s3_server():
    """The port of a real S3 server on this machine."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """A bucket behind a proxy that misbehaves on demand (`s3_faults`). Waits are short, the clients themselves try once
    (so that what is tried again is this package's doing), the local cache is empty."""
    from s3_faults import KEYS, FaultyS3

    import cvdd_ray.data.s3
    from cvdd_ray.data import retries

    for name, value in {
        "AWS_ACCESS_KEY_ID": KEYS["aws_access_key_id"], "AWS_SECRET_ACCESS_KEY": KEYS["aws_secret_access_key"],
        "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true",
        "CVDD_RAY_S3_RETRY_S": "60", "CVDD_RAY_CACHE": str(tmp_path / "local-cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retries, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(cvdd_ray.data.s3, "ATTEMPTS", 1)
    bucket = FaultyS3(s3_server)
    yield bucket
    bucket.close()


def tiny_config(**sections) -> RunConfig:
    """A run of seconds: bundled digits, two slim experts, a few iterations; sections are merged in."""
    base = {
        "ipc": [2],
        "data": {"source": "digits", "flip": False, "max_per_class": 40, "max_test": 100},
        "committee": {"experts": ["resnet18", "shufflenet_v2"], "width": 0.125},
        "pretrain": {"epochs": 1, "batch_size": 64, "lr": 0.005, "pad": 1},
        "prior": {"ipc": 2, "iterations": 3, "epochs": 1},
        "initialize": {"images_per_class": 10, "num_crops": 2},
        "synthesize": {"iterations": 6, "lr": 0.1, "jobs_per_group": 1, "checkpoint_every": 2},
        "relabel": {"epochs": 2, "batch_size": 10},
        "evaluate": {"seeds": 2, "test_every": 1},
        "runtime": {"num_cpus": 2, "object_store_mb": 100},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig(**base)


@pytest.fixture
def make_config():
    return tiny_config


@pytest.fixture
def cvdd(monkeypatch, capsys):
    """Call `cvdd` in this process; returns (exit code, stdout, stderr)."""

    from cvdd_ray import cli

    def call(*words: str):
        monkeypatch.setattr(sys, "argv", ["cvdd", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call
