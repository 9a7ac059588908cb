"""The README of an export: YAML that the Hugging Face Hub and `datasets` read, how to use it, how it was made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from cvdd_ray.data.layouts import Shards
from cvdd_ray.labelconfig import RelabelConfig
from cvdd_ray.stages.matching import RATE
from cvdd_ray.stages.publishable import DistilledSet, Publishable
from cvdd_ray.stages.relabel import label_encoding
from cvdd_ray.stages.report import RULE, markdown_table, pipes

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
COLUMNS = {
    "image": "the image file",
    "label": "class, by number",
    "id_in_class": "number of the image within its class",
    "chunk": "number of the run of classes it was optimised with",
    "voters": "experts that voted on it",
    "voter_weights": "their weights, sum 1",
    "job_seed": "seed of its first views",
    "cross_entropy": "the voters' cross-entropy at the end",
    "bn_term": "the voters' BatchNorm matching term at the end",
    "epoch": "pass over the images, from 0",
    "batch": "batch of that pass, from 0",
    "image_index": "row numbers of the images, B of them",
    "crop": "top, left, height, width in pixels, per image",
    "flip": "whether the image is mirrored",
    "partner": "CutMix partner, as position in the batch",
    "cutmix_box": "top, left, bottom, right in pixels, one for the batch",
    "logits": "B x K numbers, row by row",
}
PARTS = {  # of labels that are not stored as float16 logits of every class
    "classes": "B x k classes, those of the logits",
    "tail": "mean logit of the other classes, B numbers",
    "scale": "B numbers: a logit is logits * scale + offset",
    "offset": "B numbers",
}
STARTS = {
    "patches": "patches of real images (RDED)", "real": "whole real images", "k_center": "real images, by k-centre",
    "herding": "real images, by herding", "noise": "Gaussian noise",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One configuration of a Hub dataset: its name, the folder and files of its rows, the Hub's features."""

    name: str
    folder: str
    features: Mapping[str, dict]
    shards: Shards


def hub_card(source: Publishable, license_id: str, tables: Sequence[Table]) -> str:
    """Return the card of the Hub layout; the first table is the default configuration."""
    about = {
        "configs": [
            {
                "config_name": t.name,
                "data_files": [{"split": "train", "path": f"{t.folder}/train-*.parquet"}],
                **({"default": True} if t is tables[0] else {}),
            }
            for t in tables
        ],
        "dataset_info": [
            {
                "config_name": t.name,
                "features": yaml_features(t.features),
                "splits": [{"name": "train", "num_bytes": t.shards.num_bytes, "num_examples": t.shards.num_rows}],
                "download_size": t.shards.disk_bytes,
                "dataset_size": t.shards.num_bytes,
            }
            for t in tables
        ],
    }
    labels = next((t.name for t in tables if t.name.startswith("soft_labels")), None)
    images = labels.replace("soft_labels", "images") if labels else tables[0].name
    use = _images_use(images) + (_labels_use(source, images, labels) if labels else "")
    sections = {"Use": use + _experts_use(source), "Content": "\n\n".join(_columns(t) for t in tables)}
    return _card(source, license_id, about, sections)


def folder_card(source: Publishable, license_id: str, folders: Sequence[str]) -> str:
    """Return the card of the image folder."""
    about = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "train/*/*"}]}]}
    use = """```python
import os

from datasets import load_dataset
from torchvision.datasets import ImageFolder

images = load_dataset(os.getcwd(), split="train")  # image, label
same = ImageFolder("train")
```

A line of `images.jsonl` per file says what is known of it, the voters of the image among it."""
    order = "Label k is folder k in alphabetical order."
    if tuple(folders) != source.classes:
        order += f" Folders of the classes:\n\n{_folders(source.classes, folders)}"
    return _card(source, license_id, about, {"Use": use, "Classes": order})


def webdataset_card(source: Publishable, license_id: str, suffix: str) -> str:
    """Return the card of the tar files; `suffix` is that of the images."""
    about = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "train-*.tar"}]}]}
    use = f"""```python
import os

from datasets import load_dataset

images = load_dataset(os.getcwd(), split="train")
image, label, name = images[0]["{suffix}"], images[0]["cls"], images[0]["json"]["class"]
```

A sample is `KEY.{suffix}`, `KEY.cls` (its label) and `KEY.json` (label, class name, voters and their weights, losses)."""
    return _card(source, license_id, about, {"Use": use, "Classes": ", ".join(source.classes)})


def yaml_features(features: Mapping[str, dict]) -> list[dict]:
    """Return the Hub's features (as in a Parquet file's `huggingface` metadata) the way a card's YAML says them."""
    return [{"name": name, **_yaml_feature(feature)} for name, feature in features.items()]


def _yaml_feature(feature: Mapping[str, Any]) -> dict:
    if feature["_type"] == "Image":
        return {"dtype": "image"}
    if feature["_type"] == "ClassLabel":
        return {"dtype": {"class_label": {"names": {str(k): name for k, name in enumerate(feature["names"])}}}}
    if feature["_type"] == "List":
        inner = _yaml_feature(feature["feature"])
        length = {"length": feature["length"]} if "length" in feature else {}
        return {"list": inner["dtype"] if list(inner) == ["dtype"] else inner, **length}
    return {"dtype": feature["dtype"]}


def _card(source: Publishable, license_id: str, about: Mapping[str, Any], sections: Mapping[str, str]) -> str:
    num_images = sum(one.num_images for one in source.sets)
    ipc = " and ".join(str(one.ipc) for one in source.sets)
    many = "image" if ipc == "1" else "images"
    title = f"{_name(source).removeprefix('an ').removeprefix('a ')} distilled to {ipc} {many} per class"
    matter = {
        "license": license_id,
        "task_categories": ["image-classification"],
        "pretty_name": title,
        "size_categories": [next((size for limit, size in SIZES.items() if num_images < limit), "1M<n<10M")],
        "tags": ["dataset-distillation", "cv-dd", "synthetic"],
        **about,
    }
    head = (
        f"{num_images} synthetic images of {source.info['image_size']} x {source.info['image_size']} pixels in "
        f"{len(source.classes)} classes stand for the training set of {_name(source)}. {_method(source)}, made with "
        f"`cvdd_ray`, an independent implementation on Ray."
    )
    every = {
        **sections,
        "How it was made": _made(source),
        "Test accuracy": _accuracy(source),
        "Licence": _licence(source, license_id),
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in every.items())
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n# {title}\n\n{head}\n\n{body}\n"


def _images_use(images: str) -> str:
    return f"""```python
import os

from datasets import load_dataset

path = os.getcwd()  # this folder, or its name on the Hub
images = load_dataset(path, "{images}", split="train")
class_name = images.features["label"].int2str(images[0]["label"])
```"""


def _labels_use(source: Publishable, images: str, labels: str) -> str:
    mean, std = (json.dumps(source.info[name]) for name in ("mean", "std"))
    one = next(one for one in source.sets if one.has_label_files)
    c = _relabel(one)
    parts = [name for name in label_encoding(c, len(source.classes)).parts(len(source.classes)) if name != "logits"]
    again = f"    epoch %= {c.stored_epochs}  # of {c.epochs} epochs\n" if c.stored_epochs else ""
    imported, unpacked, logits = "", "", 'row["logits"].view(len(views), -1)'
    if parts:
        imported = "from cvdd_ray.core.labelcodes import decode_logits\n"
        names = json.dumps(["logits", *parts])
        unpacked = f"        parts = {{name: row[name].view(len(views), -1) for name in {names}}}\n"
        logits = f"decode_logits(parts, {len(source.classes)})"
    return f"""

A row of `{labels}` is one batch of one epoch of a student's training: which images (row numbers of `{images}`), how each
was cropped and mirrored, what CutMix pasted, and the committee's logits on exactly those views. The package `cvdd_ray`
makes the views again, to the bit:

```python
import torch
from cvdd_ray.core.augment import Views
{imported}from cvdd_ray.core.softlabels import BatchPlan, batch_views

mean, std = torch.tensor({mean})[:, None, None], torch.tensor({std})[:, None, None]
pixels = torch.stack(list(images.with_format("torch")["image"]))
inputs = (pixels.float() / 255 - mean) / std


def soft_batches(epoch):
{again}    rows = load_dataset(path, "{labels}", split="train", streaming=True, filters=[("epoch", "==", epoch)])
    for row in rows.with_format("torch"):
        views = Views(row["crop"], row["flip"], torch.zeros(len(row["flip"]), 2, dtype=torch.long))
        box = tuple(row["cutmix_box"].tolist())
        plan = BatchPlan(epoch, int(row["batch"]), row["image_index"], views, row["partner"], box)
{unpacked}        yield batch_views(inputs, plan), {logits}
```

A student takes the Kullback-Leibler divergence between the softened logits as its loss, and its BatchNorm sees groups of
the same size as the teachers' did."""


def _experts_use(source: Publishable) -> str:
    if not source.experts:
        return ""
    return f"""

The experts are in `experts/NAME`, each with a `config.json` (network, width, classes, mean, std, hold-out accuracy):

```python
import json
from pathlib import Path

from cvdd_ray.core.models import build_model, load_weights

folder = Path(path, "experts", "{next(iter(source.experts))}")
about = json.loads((folder / "config.json").read_text())
expert = build_model(about["architecture"], about["num_classes"], about["image_size"], width=about["width"]).eval()
load_weights(expert, str(folder / "model.safetensors"), name=about["architecture"])
```"""


def _columns(table: Table) -> str:
    """Return what the columns of a table are."""
    meanings = COLUMNS | PARTS
    if "classes" in table.features:
        meanings["logits"] = "B x k numbers, row by row: the largest"
    rows = [(f"`{name}`", meanings.get(name, "")) for name in table.features]
    return f"`{table.name}`, {table.shards.num_rows} rows:\n\n{pipes(('column', 'what it is'), rows, ('---', '---'))}"


def _folders(classes: Sequence[str], folders: Sequence[str]) -> str:
    rows = [
        (str(k), f"`{folder}`", name.replace("|", "\\|"))
        for k, (name, folder) in enumerate(zip(classes, folders, strict=True))
    ]
    return pipes(("label", "folder", "class"), rows, ("---:", "---", "---"))


def _method(source: Publishable) -> str:
    """Return in words what guided the images."""
    if source.reader.config.synthesize.method == "trajectories":
        return (
            "Steps of training on them lead where epochs on real images lead: Dataset Distillation by Matching Training "
            "Trajectories ([MTT](https://arxiv.org/abs/2203.11932))"
        )
    return (
        "Committees of pretrained experts voted on every image: Dataset Distillation via Committee Voting "
        "([CV-DD](https://arxiv.org/abs/2501.07575))"
    )


def _guides(source: Publishable, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return what guided the images and how they were moved, as rows."""
    s = settings["synthesize"]
    if source.reader.config.synthesize.method == "trajectories":
        t, rates = s["trajectories"], [f"{one.images.facts[RATE]:.3g}" for one in source.sets]
        return {
            "trajectories": f"{t['experts']} trainings of {t['network']}; {t['steps']} steps for {t['target_epochs']} epochs",
            "synthesis": f"{s['iterations']} steps of SGD, learning rate {s['lr']:g}; learned rate of training on the images: "
            + ", ".join(rates),
        }
    v = settings["voting"]
    weights = {"prior": f"softmax(prior / {v['temperature']:g})", "equal": "equal", "random": "random"}
    votes = f"{v['size']} of {len(source.summary.experts)} experts per image, weights {weights[v['weighting']]}"
    groups = sorted({voters for one in source.sets for voters in one.images.facts["voters"]})
    return {
        "votes": f"{votes}; who voted: {', '.join(groups)}",
        "synthesis": f"{s['iterations']} steps of Adam, learning rate {s['lr']:g}, BatchNorm weight {s['bn_weight']:g}, roll up "
        f"to {s['roll']} px, {_views(s['crop_scale'] if s['augment'] else None, settings['data.flip'])}",
    }


def _made(source: Publishable) -> str:
    """Return how the images and labels came about, from the manifests."""
    manifest = source.sets[0].images
    settings, versions = manifest.identity["settings"], manifest.versions
    (guide, guided), (synthesis, moved) = _guides(source, settings).items()
    rows = [
        (guide, guided),
        ("starting images", STARTS[settings["initialize.method"]]),
        (synthesis, moved),
        *(
            ("soft labels" if len(source.sets) == 1 else f"soft labels, IPC {one.ipc}", _labels(one))
            for one in source.sets
        ),
        ("seed", str(manifest.identity["seed"])),
        ("software", ", ".join(f"{name} {version}" for name, version in versions.items() if name != "platform")),
    ]
    committee = [
        (e.name, *("" if value is None else f"{value:.1f}" for value in (e.holdout_accuracy, e.prior)))
        for e in source.summary.experts
    ]
    tables = (
        pipes(("what", "how"), rows, ("---", "---")),
        pipes(("expert", "hold-out accuracy %", "prior %"), committee, ("---", "---:", "---:")),
    )
    return (
        f"{tables[0]}\n\nThe committee, at {_width(source.reader.config.committee.width)}; the prior is the hold-out accuracy "
        f"of a student trained on what the expert distils alone:\n\n{tables[1]}\n\n"
        f"`recipe.yaml` has every setting; `export.json` the sha256 of every file and the content hashes of the run's stages."
    )


def _labels(one: DistilledSet) -> str:
    if one.labels is None:
        return "none"
    c = _relabel(one)
    mode = f"BatchNorm on groups of {c.bn_group} images (BSSL)" if c.batchnorm == "batch" else "eval mode"
    cutmix = "CutMix" if c.cutmix else "no CutMix"
    batch, teachers = min(c.batch_size, one.num_images), " + ".join(c.teachers)
    again = f" ({c.stored_epochs} of their own, taken again and again)" if c.stored_epochs else ""
    kept = f"; the {c.top_k} largest logits of {len(one.labels.identity['classes'])}" if c.top_k else ""
    others = {"drop": "others have probability 0", "spread": "others have their mean"}[c.tail]
    as_stored = (f"{kept} ({others})" if kept else "") + ("; int8" if c.precision == "int8" else "")
    return (
        f"{c.epochs} epochs{again}, batches of {batch}, teachers {teachers}, {mode}, {cutmix}, "
        f"{_views(c.crop_scale, one.labels.identity['settings']['data.flip'])}{as_stored}"
        f"{'; asked of the teachers as students train, not stored' if c.online else ''}"
    )


def _relabel(one: DistilledSet) -> RelabelConfig:
    """Return the settings that a set was labelled with."""
    return RelabelConfig(**one.labels.identity["settings"]["relabel"])


def _views(crop_scale: Sequence[float] | None, flip: bool) -> str:
    crop = f"crops of {crop_scale[0]:.0%} to {crop_scale[1]:.0%} of the area" if crop_scale else "no crops"
    return f"{crop}, {'mirrored at random' if flip else 'never mirrored'}"


def _accuracy(source: Publishable) -> str:
    chosen = [one.ipc for one in source.summary.ipcs if one.rows]
    if not chosen:
        return "None is known: no students were trained on these images (`cvdd evaluate` trains them)."
    settings = source.reader.manifests[f"evaluate/ipc{chosen[0]}"].identity["settings"]["evaluate"]
    rate = "the learned rate" if settings.get("learned_lr") else f"learning rate {settings['lr']:g}"
    optimizer = {"adamw": "AdamW", "sgd": "SGD"}[settings.get("optimizer", "adamw")]
    return (
        f"Students trained from scratch at {_width(settings['width'])} for {settings['epochs']} epochs ({optimizer}, {rate}, "
        f"temperature {settings['temperature']:g} with soft labels), tested on the real test set; mean and "
        f"standard deviation over the seeds, in percent.\n\n"
        f"{markdown_table(source.summary)}\n\n{RULE}"
    )


def _licence(source: Publishable, license_id: str) -> str:
    stated = "No licence is stated for this export. " if license_id == "unknown" else ""
    return (
        f"{stated}The images were made from those of {_name(source)}, whose terms apply to what is derived from them."
    )


def _width(width: float) -> str:
    return "full width" if width == 1 else f"{width:g} times the usual width"


def _name(source: Publishable) -> str:
    """Return the name of the real data, as far as the run knows one."""
    name = source.info["name"]
    return {"folder": "an image folder", "parquet": "a Parquet image set"}.get(name, name)
