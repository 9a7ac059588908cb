"""Exports of a tiny run, opened by `datasets` and torchvision as a stranger would, offline."""

import json
import os
import re
import shutil
from hashlib import sha256
from pathlib import Path

import boto3
import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from huggingface_hub import DatasetCard

import cvdd_ray
from cvdd_ray.data import shards
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.recipes import load_config
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import STAGES, remember, run_all
from cvdd_ray.stages.relabel import relabel
from cvdd_ray.stages.synthesize import synthesize


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from conftest import tiny_config

    out = tmp_path_factory.mktemp("finished") / "secret-place"
    run = Run(tiny_config(evaluate={"seeds": 1, "baselines": ["random_hard"]}), str(out))
    run_all(run)
    return str(out)


@pytest.fixture(scope="module")
def two_ipcs(tmp_path_factory):
    """IPC 1, 2 and 3, of which 3 is not distilled and 1 has no labels; nothing evaluated."""
    from conftest import tiny_config

    equal = {"selection": "fixed", "fixed": ["resnet18", "shufflenet_v2"], "weighting": "equal"}
    c = tiny_config(ipc=[1, 2, 3], voting=equal, relabel={"weighting": "equal"}, initialize={"method": "noise"})
    run = Run(c, str(tmp_path_factory.mktemp("two")))
    STAGES["pretrain"](run)
    STAGES["initialize"](run)
    for ipc in (1, 2):
        synthesize(run, ipc)
    relabel(run, 2)
    remember(run)
    return run.store.root


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


class Said:
    """Progress that remembers its lines."""

    def __init__(self):
        self.lines = []

    def start(self, title, total, unit):
        self.lines.append(f"{title}: {total} {unit}")

    def update(self, done, note="", detail=""): ...

    def finish(self, note=""): ...

    def say(self, text):
        self.lines.append(text)


def stored(run, ipc=2):
    """The distilled images as the run has them, read by pyarrow alone."""
    return pa.ipc.open_stream(Path(run, f"synthesize/ipc{ipc}/distilled.arrow").read_bytes()).read_all()


def all_files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def run_card(dest, monkeypatch):
    """Run the Python blocks of a card, word for word, in its folder; return what they define."""
    monkeypatch.chdir(dest)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", (dest / "README.md").read_text(), re.S | re.M):
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_hub_layout_opens_with_its_images_and_labels(finished, tmp_path):
    dest = tmp_path / "hub"
    assert cvdd_ray.export(finished, "hub", str(dest)) == str(dest)
    images = datasets.load_dataset(str(dest), "images", split="train")
    table = stored(finished)
    assert images.features["label"].names == [str(i) for i in range(10)]
    raw = images.cast_column("image", datasets.Image(decode=False))
    assert raw["image"][:] == table["image"].to_pylist()
    assert raw["label"][:] == table["label"].to_pylist()
    assert raw["id_in_class"][:] == table["image_index"].to_pylist()
    assert raw["voters"][:] == table["voters"].to_pylist()
    assert raw["cross_entropy"][:] == table["cross_entropy"].to_pylist()
    assert datasets.load_dataset(str(dest), split="train").features == images.features  # the default configuration
    labels = datasets.load_dataset(str(dest), "soft_labels", split="train")
    assert labels.features["logits"].feature.dtype == "float16"
    with pa.ipc.open_file(f"{finished}/relabel/ipc2/distilled/labels.arrow") as reader:
        assert labels[:] == reader.read_all().to_pydict()
    for row in labels:  # joined: every epoch's batches name every image once
        assert len(row["logits"]) == 10 * len(row["image_index"])
    first = [i for row in labels if row["epoch"] == 0 for i in row["image_index"]]
    assert sorted(images[i]["label"] for i in first) == sorted(images["label"])


def test_a_run_in_shards_exports_the_same_data(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    run = Run(load_config(f"{finished}/config.yaml"), str(tmp_path / "cut"))
    for stage in list(STAGES.values())[:-1]:
        stage(run)
    remember(run)
    assert Path(run.store.root, "synthesize/ipc2/distilled-00001-of-00002.arrow").exists()
    assert Path(run.store.root, "relabel/ipc2/distilled/labels-00001-of-00002.arrow").exists()
    data = []
    for source in (finished, run.store.root):
        dest = tmp_path / f"of-{Path(source).name}"
        cvdd_ray.export(source, "hub", str(dest))
        data.append({name: content for name, content in all_files(dest).items() if name.startswith("data/")})
    assert data[0] == data[1]


def test_the_hub_card_rebuilds_the_views_the_teachers_labelled(finished, tmp_path, monkeypatch):
    dest = tmp_path / "hub"
    cvdd_ray.export(finished, "hub", str(dest))
    names = run_card(dest, monkeypatch)
    mine = cvdd_ray.load_distilled(finished)
    for epoch in (0, 1):
        pairs = list(zip(names["soft_batches"](epoch), mine.soft_batches(epoch), strict=True))
        assert len(pairs) == 2
        for (views, logits), (same_views, same_logits) in pairs:
            assert torch.equal(views, same_views)
            assert torch.equal(logits, same_logits)
    assert names["class_name"] == "0"
    weights = cvdd_ray.core.models.save_weights(names["expert"])
    assert weights == Path(finished, "pretrain/resnet18/model.safetensors").read_bytes()
    assert not names["expert"].training
    about = json.loads((dest / "experts/shufflenet_v2/config.json").read_text())
    manifest = json.loads(Path(finished, "pretrain/shufflenet_v2/manifest.json").read_text())
    assert about["holdout_accuracy"] == manifest["facts"]["holdout_accuracy"]
    assert (about["width"], about["mean"]) == (0.125, [0.3053] * 3)


def test_the_hub_card_is_what_the_hub_expects(finished, tmp_path):
    dest = tmp_path / "hub"
    cvdd_ray.export(finished, "hub", str(dest), license="cc-by-4.0")
    card = DatasetCard.load(dest / "README.md")
    about = card.data.to_dict()
    assert about["license"] == "cc-by-4.0"
    assert about["task_categories"] == ["image-classification"]
    assert about["size_categories"] == ["n<1K"]
    infos = {info["config_name"]: info for info in about["dataset_info"]}
    for name, rows in (("images", 20), ("soft_labels", 4)):
        loaded = datasets.load_dataset(str(dest), name, split="train")
        assert infos[name]["features"] == loaded.features._to_yaml_list()
        assert infos[name]["splits"][0]["num_examples"] == len(loaded) == rows
        assert infos[name]["download_size"] == sum(path.stat().st_size for path in (dest / "data" / name).iterdir())
    results = json.loads(Path(finished, "evaluate/ipc2/results.json").read_text())["table"]
    for row in results:
        assert f"| {row['last_mean']:.1f} |" in card.text.replace("*", "")
    priors = json.loads(Path(finished, "prior/priors.json").read_text())["priors"]
    assert f"| {priors['resnet18']:.1f} |" in card.text
    assert "6 steps of Adam" in card.text


def test_an_export_tells_how_it_was_made_but_not_where(finished, tmp_path):
    dest = tmp_path / "hub"
    cvdd_ray.export(finished, "hub", str(dest))
    files = all_files(dest)
    assert not [
        name for name, content in files.items() if b"secret-place" in content or str(tmp_path).encode() in content
    ]
    assert load_config(str(dest / "recipe.yaml")).synthesize.iterations == 6
    marker = json.loads(files.pop("export.json"))
    assert set(marker["files"]) == set(files)
    assert marker["files"]["README.md"] == sha256(files["README.md"]).hexdigest()
    made = cvdd_ray.Run(load_config(f"{finished}/config.yaml"), finished).artifacts.manifest("synthesize/ipc2")
    assert marker["made_from"]["synthesize/ipc2"] == made.content


def test_paths_of_data_and_given_weights_stay_at_home(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["path"] = "/home/me/data"
    settings["committee"]["weights"] = {
        "resnet18": "/home/me/w.pth",
        "shufflenet_v2": "torchvision:IMAGENET1K_V1",
    }
    settings["storage"]["out"] = "s3://me:hush@bucket/x"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    cvdd_ray.export(str(run), "hub", str(tmp_path / "hub"))
    assert not [
        name for name, content in all_files(tmp_path / "hub").items() if b"home/me" in content or b"hush" in content
    ]
    recipe = yaml.safe_load((tmp_path / "hub/recipe.yaml").read_text())
    assert recipe["committee"]["weights"] == {"resnet18": "w.pth", "shufflenet_v2": "torchvision:IMAGENET1K_V1"}


def test_several_ipcs_are_configurations_of_one_hub_dataset(two_ipcs, tmp_path, monkeypatch):
    said, dest = Said(), tmp_path / "hub"
    cvdd_ray.export(two_ipcs, "hub", str(dest), progress=said)
    assert datasets.get_dataset_config_names(str(dest)) == ["images_ipc1", "images_ipc2", "soft_labels_ipc2"]
    for ipc in (1, 2):
        images = datasets.load_dataset(str(dest), f"images_ipc{ipc}", split="train")
        assert np.array_equal(np.asarray(images[7]["image"]).transpose(2, 0, 1), pixels_of(two_ipcs, ipc)[7])
    assert "IPC 3 is not distilled yet and left out" in said.lines
    assert "IPC 1 has no soft labels (`cvdd relabel` makes them): its images are exported alone" in said.lines
    assert "export soft labels of ipc 2: 2 epochs" in said.lines
    views, _ = next(run_card(dest, monkeypatch)["soft_batches"](1))
    assert torch.equal(views, next(cvdd_ray.load_distilled(two_ipcs, ipc=2).soft_batches(1))[0])


def pixels_of(run, ipc):
    return cvdd_ray.load_distilled(run, ipc=ipc).pixels_NCSS.numpy()


def test_one_ipc_without_labels_or_accuracies(two_ipcs, tmp_path, monkeypatch):
    cvdd_ray.export(two_ipcs, "hub", str(tmp_path / "hub"), ipc=1)
    assert datasets.get_dataset_config_names(str(tmp_path / "hub")) == ["images"]
    assert "soft_batches" not in run_card(tmp_path / "hub", monkeypatch)
    text = (tmp_path / "hub/README.md").read_text()
    assert "no students were trained" in text
    assert "digits distilled to 1 image per class" in text


@pytest.mark.parametrize("to", ["imagefolder", "webdataset"])
def test_the_other_layouts_open_with_the_same_images_and_labels(finished, tmp_path, monkeypatch, to):
    dest = tmp_path / to
    cvdd_ray.export(finished, to, str(dest))
    names = run_card(dest, monkeypatch)
    column, label = {"imagefolder": ("image", "label"), "webdataset": ("png", "cls")}[to]
    found = sorted((row[label], np.asarray(row[column]).tobytes()) for row in names["images"])
    mine = cvdd_ray.load_distilled(finished)
    expected = sorted((int(y), image.permute(1, 2, 0).numpy().tobytes()) for image, y in mine)
    assert found == expected
    if to == "imagefolder":
        assert sorted((y, np.asarray(image).tobytes()) for image, y in names["same"]) == expected
    assert DatasetCard.load(dest / "README.md").data.license == "unknown"


@pytest.mark.parametrize("to", ["hub", "imagefolder", "webdataset"])
def test_equal_runs_give_equal_bytes(finished, tmp_path, to):
    moved = shutil.copytree(finished, tmp_path / "moved")
    cvdd_ray.export(finished, to, str(tmp_path / "a"), shard_mb=0.005)
    cvdd_ray.export(str(moved), to, str(tmp_path / "b"), shard_mb=0.005)
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")
    if to != "imagefolder":
        assert len([name for name in all_files(tmp_path / "a") if "train-" in name]) > 2


BAD = [
    ({"to": "zip"}, r"--to zip: unknown layout; choose one of hub, imagefolder, webdataset"),
    ({"shard_mb": 0}, r"--shard-mb 0: give at least"),
    ({"ipc": 7}, r"has distilled sets for IPC 2; name one with --ipc"),
    ({"path": "/no/such/run"}, r"/no/such/run holds no run"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_input_is_refused_and_nothing_is_written(finished, tmp_path, bad, message):
    with pytest.raises((ConfigError, ArtifactError), match=message):
        cvdd_ray.export(**{"path": finished, "to": "hub", "dest": str(tmp_path / "x" / "hub"), **bad})
    assert not (tmp_path / "x").exists()


def test_an_image_folder_has_one_ipc(two_ipcs, tmp_path):
    with pytest.raises(ConfigError, match=r"--to imagefolder takes one IPC, the run has 1, 2; name one with --ipc"):
        cvdd_ray.export(two_ipcs, "imagefolder", str(tmp_path / "x"))
    cvdd_ray.export(two_ipcs, "imagefolder", str(tmp_path / "x"), ipc=2)
    assert len(list((tmp_path / "x/train").rglob("*.png"))) == 20


def test_a_run_without_images_names_the_verb(make_config, tmp_path):
    run = Run(make_config(), str(tmp_path / "run"))
    STAGES["pretrain"](run)
    with pytest.raises(ArtifactError, match=r"has no finished distilled set; make it with `cvdd synthesize`"):
        cvdd_ray.export(str(tmp_path / "run"), "hub", str(tmp_path / "x"))


def test_what_is_out_of_date_is_not_published(finished, tmp_path, make_config):
    run = shutil.copytree(finished, tmp_path / "run")
    c = make_config(evaluate={"seeds": 1, "baselines": ["random_hard"]}, synthesize={"iterations": 3})
    STAGES["synthesize"](Run(c, str(run), overwrite=True))
    with pytest.raises(ArtifactError, match=r"relabel/ipc2/distilled is out of date.*`cvdd relabel --overwrite`"):
        cvdd_ray.export(str(run), "hub", str(tmp_path / "x"))
    relabel(Run(c, str(run), overwrite=True), 2)
    said = Said()
    cvdd_ray.export(str(run), "hub", str(tmp_path / "x"), progress=said)
    assert [line for line in said.lines if "accuracy table is out of date" in line]
    assert "no students were trained" in (tmp_path / "x/README.md").read_text()


def test_an_altered_file_stops_the_export_and_leaves_no_trace(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    labels = run / "relabel/ipc2/distilled/labels.arrow"
    labels.write_bytes(labels.read_bytes()[:-1] + b"x")
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match=r"does not have the sha256"):
        cvdd_ray.export(str(run), "hub", str(tmp_path / "out/hub"))
    assert os.listdir(tmp_path / "out") == []


def test_only_an_earlier_export_is_replaced(finished, tmp_path, monkeypatch):
    dest = tmp_path / "out" / "x"
    dest.mkdir(parents=True)
    cvdd_ray.export(finished, "webdataset", str(dest))  # an empty directory is free
    with pytest.raises(ArtifactError, match=r"x is not empty; give another --dest, or pass --overwrite"):
        cvdd_ray.export(finished, "imagefolder", str(dest))
    before = all_files(dest)
    monkeypatch.setattr("cvdd_ray.stages.export.folder_card", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cvdd_ray.export(finished, "imagefolder", str(dest), overwrite=True)
    assert all_files(dest) == before
    monkeypatch.undo()
    real = os.rename

    def full(source, target):
        if Path(target) == dest and str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(ArtifactError, match=r"x cannot be written \(No space left on device\); give another --dest"):
        cvdd_ray.export(finished, "imagefolder", str(dest), overwrite=True)
    assert all_files(dest) == before
    monkeypatch.undo()
    cvdd_ray.export(finished, "imagefolder", str(dest), overwrite=True)
    assert not (dest / "train-00000.tar").exists()
    assert (dest / "train").is_dir()
    assert os.listdir(tmp_path / "out") == ["x"]
    with pytest.raises(ArtifactError, match=r"holds something that is no export"):
        cvdd_ray.export(finished, "hub", finished, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"file is a file"):
        cvdd_ray.export(finished, "hub", str(tmp_path / "file"), overwrite=True)


@pytest.fixture
def bucket():
    """The URI of a bucket on a real S3 server on this machine, and a client of it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "me", "aws_secret_access_key": "hush", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket="bucket")
    place = f"endpoint_override={host}%3A{port}&scheme=http&region=us-east-1"
    try:
        yield lambda name: f"s3://me:hush@bucket/{name}?{place}", client
    finally:
        server.stop()


def test_from_and_to_an_object_store(finished, tmp_path, bucket, monkeypatch):
    uri, client = bucket
    cloud = Store(uri("run"))
    for name, content in all_files(finished).items():
        cloud.write(name, content)
    cvdd_ray.export(finished, "hub", str(tmp_path / "hub"))
    assert cvdd_ray.export(uri("run"), "hub", uri("out")) == "s3://bucket/out"
    there = [item["Key"] for item in client.list_objects_v2(Bucket="bucket", Prefix="out/")["Contents"]]
    files = {key.removeprefix("out/"): client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in there}
    files = {name: content for name, content in files.items() if not name.endswith("/")}
    assert files == all_files(tmp_path / "hub")
    with pytest.raises(ArtifactError, match=r"s3://bucket/out is not empty") as refused:
        cvdd_ray.export(finished, "webdataset", uri("out"))
    assert "hush" not in str(refused.value)
    cvdd_ray.export(finished, "webdataset", uri("out"), overwrite=True)
    names = [item["Key"] for item in client.list_objects_v2(Bucket="bucket", Prefix="out/")["Contents"]]
    left = {name.removeprefix("out/") for name in names if not name.endswith("/")}
    assert left == {"README.md", "export.json", "recipe.yaml", "train-00000.tar"}


def test_a_broken_upload_has_no_card_and_can_be_made_again(finished, bucket, monkeypatch):
    uri, client = bucket
    copies, real = [], Store.upload

    def breaks(store, name, path):
        copies.append(name)
        if len(copies) == 3:
            raise OSError("connection lost")
        real(store, name, path)

    monkeypatch.setattr(Store, "upload", breaks)
    with pytest.raises(ArtifactError, match=r"s3://bucket/broken cannot be written \(connection lost\)"):
        cvdd_ray.export(finished, "hub", uri("broken"))
    listed = client.list_objects_v2(Bucket="bucket", Prefix="broken/")["Contents"]
    assert "broken/README.md" not in [item["Key"] for item in listed]
    monkeypatch.setattr(Store, "upload", lambda store, name, path: (copies.append(name), real(store, name, path)))
    copies.clear()
    cvdd_ray.export(finished, "hub", uri("broken"), overwrite=True)
    assert copies[0].endswith("export.json")
    assert copies[-1].endswith("README.md")
