"""A run whose data comes from a bucket and whose results go to one, through faults, is the run on the disk."""

import json
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from sklearn.datasets import load_digits

import cvdd_ray
from cvdd_ray.data.artifacts import Artifacts
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError, DataError
from cvdd_ray.recipes import dump_config
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pretrain import given_weights, pretrain

CLASSES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits 0, 1 and 2 as a folder of PNG files of 16 px: 24 train and 8 test images per class."""
    root, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for label, name in enumerate(CLASSES):
        for i, grey in enumerate(digits.images[digits.target == label][:32]):
            path = root / ("train" if i < 24 else "test") / name / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((grey * 15).astype(np.uint8)).resize((16, 16)).save(path)
    return root


def config(path, **sections):
    data = {"source": "folder", "path": str(path), "image_size": 16, "max_per_class": None, "max_test": None}
    evaluate = {"seeds": 1, "test_every": 1, "baselines": []}
    return tiny_config(data=data, evaluate=evaluate, runtime={"engine": "local"}, **sections)


@pytest.fixture(scope="module")
def local_run(folder, tmp_path_factory):
    """The same run on the disk alone: its root."""
    root = str(tmp_path_factory.mktemp("local") / "run")
    cvdd_ray.run(config(folder), root)
    return root


def manifests(root) -> dict[str, tuple[dict, dict]]:
    """What was made, and the sha256 of every file, stage by stage; evaluation's results hold times, so only what it was."""
    store = Store(root)
    found = {}
    for name in store.all_names():
        if name.endswith("/manifest.json"):
            about = json.loads(store.read(name))
            found[name] = about["identity"], {} if name.startswith("evaluate") else about["files"]
    return found


def test_a_run_through_faults_equals_the_run_on_the_disk(s3, folder, local_run):
    s3.upload(folder, "data")
    faults = [
        s3.fail("status", r"GET /.*list-type=2", times=2),
        s3.fail("cut", r"GET /.*\.png", times=4, skip=7),
        s3.fail("reset", r"HEAD /.*\.png", times=4, skip=30),
        s3.fail("status", r"PUT /.*model.safetensors", times=2, value=500, code="InternalError"),
        s3.fail("cut", r"PUT /.*manifest.json", times=3, skip=2),
        s3.fail("reset", r"PUT /.*partial/", times=3, skip=1),
        s3.fail("cut", r"GET /.*partial/", times=3),
        s3.fail("status", r"GET /.*labels.arrow", times=2),
        s3.fail("status", r"(DELETE|POST) /", times=2),
    ]
    out = s3.uri("results/run")
    cvdd_ray.run(config(s3.uri("data")), out)
    assert [fault.used for fault in faults] == [fault.times for fault in faults]
    assert manifests(out) == manifests(local_run)
    assert not [key for key in s3.object_keys() if "partial" in key or key.endswith(".tmp")]
    assert "Uploads" not in s3.direct.list_multipart_uploads(Bucket=s3.bucket)


def test_an_outage_ends_in_one_line_and_the_same_command_continues(s3, folder, local_run, cvdd, monkeypatch, tmp_path):
    s3.upload(folder, "data")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(dump_config(config(s3.uri("data").replace("s3://", "s3://me:hush@"))))
    command = ("run", str(recipe), "--out", s3.uri("run").replace("s3://", "s3://me:hush@"))
    monkeypatch.setenv("CVDD_RAY_S3_RETRY_S", "0.5")
    s3.fail("status", r"PUT /.*synthesize/.*manifest.json", times=10**6)
    code, _, err = cvdd(*command)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"error: s3://{s3.bucket}/run/synthesize/ipc2/manifest.json cannot be written: it is busy")
    assert "run the same command again, it continues" in last
    assert "hush" not in err
    assert s3.seen("PUT /.*pretrain/resnet18/manifest.json")
    s3.faults.clear()
    s3.requests.clear()
    code, out, err = cvdd(*command)
    assert code == 0, err
    assert not s3.seen("PUT /.*pretrain/")
    assert manifests(s3.uri("run")) == manifests(local_run)
    assert "hush" not in out + err
    assert not [key for key in s3.object_keys() if b"hush" in s3.get(key)]
    assert f"path: s3://{s3.bucket}/data?endpoint_override" in s3.get("run/config.yaml").decode()


def test_showing_and_sharing(s3, local_run, cvdd):
    s3.upload(Path(local_run), "run")
    uri = s3.uri("run")
    code, out, _ = cvdd("show", uri)
    assert code == 0
    assert "distilled, soft labels" in out
    assert f"contact_sheet_ipc2.png: s3://{s3.bucket}/run/report/contact_sheet_ipc2.png" in out
    assert f"cvdd share 's3://{s3.bucket}/run?" in out  # quoted, with its options
    assert s3.get("run/report/contact_sheet_ipc2.png").startswith(b"\x89PNG")

    code, out, _ = cvdd("share", uri, "--expires", "90m")
    assert code == 0
    links = dict(line.split(": ", 1) for line in out.splitlines())
    assert list(links)[:2] == ["synthesize/ipc2/distilled.arrow", "relabel/ipc2/distilled/labels.arrow"]
    assert "report/table.md" in links
    for name, link in links.items():
        assert urllib.request.urlopen(link).read() == s3.get(f"run/{name}")
        query = parse_qs(urlsplit(link).query)
        assert query["X-Amz-Expires"] == ["5400"]
        assert urlsplit(link).netloc == f"127.0.0.1:{s3.port}"
    assert "hush" not in out
    code, out, _ = cvdd("share", uri, "--file", "config.yaml", "--file", "pretrain/*/model.safetensors")
    assert [line.split(": ")[0] for line in out.splitlines()] == [
        "config.yaml", "pretrain/resnet18/model.safetensors", "pretrain/shufflenet_v2/model.safetensors",
    ]  # fmt: skip

    s3.fail("status", "PUT /.*report/", times=10**6, value=403, code="AccessDenied")
    code, out, err = cvdd("show", uri)  # a bucket that one may only read
    assert code == 0
    assert "distilled, soft labels" in out
    assert "the report was not written" in err
    assert "access is denied" in err


def test_comparing_and_analyses(s3, local_run, cvdd):
    """Of runs on the disk and in a bucket; what an analysis writes lies beside the run it is of."""
    s3.upload(Path(local_run), "run")
    out = s3.uri("run")
    code, text, err = cvdd("compare", local_run, out, "--json")
    assert code == 0, err
    here, there = json.loads(text)["entries"]
    assert {here["where"], there["where"]} == {local_run, Store(out).display("").rstrip("/")}
    same = ("row", "image_bytes", "label_bytes", "made_flops", "protocol")
    assert {name: here[name] for name in same} == {name: there[name] for name in same}
    s3.fail("status", r"PUT /.*analysis/", times=2)
    for what in ("images", "similarity", "efficiency"):
        code, text, err = cvdd("analyze", out, "--what", what)
        assert code == 0, err
    written = {key.removeprefix("run/analysis/") for key in s3.object_keys() if "/analysis/" in key}
    assert {"images.png", "similarity.png", "similarity.csv", "efficiency.md", "efficiency.csv"} <= written
    store = Store(out)
    assert store.read("analysis/images.png").startswith(b"\x89PNG")


def test_sharing_says_what_cannot_be_shared(s3, local_run, cvdd):
    for words, message in (
        (("share", local_run), "is not in an S3 bucket"), (("share", s3.uri("none")), "has no distilled images"),
        (("share", s3.uri("none"), "--file", "x"), "has no x"), (("share", s3.uri("x"), "--expires", "8d"), "at most 7d"),
        (("share", s3.uri("x"), "--expires", "soon"), "e.g. 24h"), (("show", s3.uri("none")), "holds no run"),
    ):  # fmt: skip
        code, _, err = cvdd(*words)
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1


def test_a_distilled_set_is_fetched_once_and_then_read_from_the_local_cache(s3, local_run):
    s3.upload(Path(local_run), "run")
    cut = s3.fail("cut", r"GET /.*arrow", times=4)
    here, there = cvdd_ray.load_distilled(local_run), cvdd_ray.load_distilled(s3.uri("run"))
    assert cut.used == 4
    assert (there.pixels_NCSS == here.pixels_NCSS).all()
    for (views, logits), (same_views, same_logits) in zip(there.soft_batches(1), here.soft_batches(1), strict=True):
        assert (views == same_views).all()
        assert (logits == same_logits).all()
    s3.requests.clear()
    again = cvdd_ray.load_distilled(s3.uri("run"), ipc=2)
    assert len(list(again.soft_batches(0))) == len(list(here.soft_batches(0)))
    assert not s3.seen(r"\.arrow")
    single = cvdd_ray.load_distilled(s3.uri("run/synthesize/ipc2/distilled.arrow"))
    assert (single.pixels_NCSS == here.pixels_NCSS).all()
    with pytest.raises(ArtifactError, match=rf"^s3://{s3.bucket}/none: distilled sets for IPC none"):
        cvdd_ray.load_distilled(s3.uri("none").replace("s3://", "s3://me:hush@"))
    s3.put("run/relabel/ipc2/distilled/labels.arrow", b"altered")
    assert cvdd_ray.load_distilled(s3.uri("run")).labels.num_epochs == 2  # the copy is what the manifest says


def test_an_altered_label_file_is_refused(s3, local_run):
    s3.upload(Path(local_run), "run")
    s3.put("run/relabel/ipc2/distilled/labels.arrow", b"altered")
    with pytest.raises(ArtifactError, match=r"labels\.arrow does not have the sha256"):
        cvdd_ray.load_distilled(s3.uri("run"))


def test_stages_in_a_bucket_are_taken_over(s3, local_run, folder, cvdd, tmp_path):
    s3.upload(Path(local_run), "run")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(dump_config(config(folder)))
    lost = s3.fail("cut", r"GET /.*model.safetensors", times=2)
    code, _, err = cvdd("run", str(recipe), "--out", str(tmp_path / "run"), "--reuse", s3.uri("run"))
    assert code == 0, err
    assert lost.used == 2
    assert manifests(str(tmp_path / "run")) == manifests(local_run)
    assert json.loads((tmp_path / "run/evaluate/ipc2/manifest.json").read_text())["wall_s"] == (
        Artifacts(Store(local_run)).manifest("evaluate/ipc2").wall_s
    )


def test_weights_come_from_a_bucket(s3, local_run, folder, tmp_path):
    content = Store(local_run).read("pretrain/resnet18/model.safetensors")
    s3.put("weights/mine.safetensors", content)
    uri = s3.uri("weights/mine.safetensors").replace("s3://", "s3://me:hush@")
    run = Run(config(folder, committee={"weights": {"resnet18": uri}}), str(tmp_path / "run"))
    lost = s3.fail("cut", "GET /.*mine", times=2)
    assert given_weights(run, "resnet18") == content
    pretrain(run)
    assert lost.used == 2
    assert len(s3.seen("GET /.*mine")) == 3  # later reads are from the local cache
    assert run.store.read("pretrain/resnet18/model.safetensors") == content
    s3.put("weights/mine.safetensors", b"text")
    with pytest.raises(
        DataError, match=rf"^committee.weights.resnet18: weights 's3://{s3.bucket}/weights/mine.safetensors'"
    ):
        given_weights(run, "resnet18")
    absent = Run(config(folder, committee={"weights": {"resnet18": s3.uri("none.pth")}}), str(tmp_path / "run"))
    with pytest.raises(DataError, match=rf"^committee.weights.resnet18: s3://{s3.bucket}/none.pth is not there"):
        given_weights(absent, "resnet18")


def test_logins_do_not_reach_tunes_files(s3, tmp_path):
    login = s3.uri("x").replace("s3://", "s3://me:hush@")
    file = tmp_path / "sweep.yaml"
    file.write_text("base: digits-demo\nsweep: {space: {evaluate.eta: {grid: [1, 2]}}}\n")
    data = [f"data.path={login}", "data.source=folder", "data.image_size=16"]
    for changes, options, name in (
        ([], {"out": login}, "out"), (data, {}, "data.path"), ([], {"reuse": [login]}, "--reuse"),
        ([f"committee.weights={{resnet18: '{login}'}}"], {}, "committee.weights.resnet18"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^{name}: s3://{s3.bucket}/x.* was given with credentials") as error:
            cvdd_ray.sweep(cvdd_ray.load_sweep(str(file), changes), **{"out": str(tmp_path / "out"), **options})
        assert "hush" not in str(error.value)
    assert not (tmp_path / "out").exists()
