"""What every stage of a run does, writes and holds in memory, counted from its settings.

Wherever a stage has a function that decides a number (jobs, groups, shards, label files), that function is asked here, too.
Sizes of images and traces are estimates from runs that were made; sizes of labels, weights and checkpoints follow from their
formats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cvdd_ray.core.coresets import CORESETS
from cvdd_ray.core.costs import Cost, forward_cost, num_statistics, training_cost, view_flops, weight_bytes
from cvdd_ray.core.softlabels import batch_starts, batches_together
from cvdd_ray.core.synthesis import Job
from cvdd_ray.data.datasets import DatasetInfo, network_input_bytes
from cvdd_ray.data.labels import epoch_bytes, file_bytes
from cvdd_ray.data.shards import shard_tasks
from cvdd_ray.stages.arms import CEILING, TRAINING_SETS, label_sets, sized_rows
from cvdd_ray.stages.ceiling import STAGE as CEILING_STAGE
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.coresets import TOGETHER, class_portions
from cvdd_ray.stages.groupwork import FLOAT
from cvdd_ray.stages.initialize import BLOCK, KINDS, OBSERVED, class_items, observer_name, portions, tiles_per_side
from cvdd_ray.stages.planmatching import count_matching, count_trajectories
from cvdd_ray.stages.planwork import (
    OTHER,
    OWN,
    PLACE_BYTES,
    PNG_OF_REAL,
    TRACE_ROW_BYTES,
    Phase,
    StageCount,
    Storage,
    count_student,
    count_synthesis,
    driver_bytes,
    expert,
    files_of_sets,
    image_bytes,
    set_bytes,
    split_bytes,
    student,
    tasks_per_gpu,
)
from cvdd_ray.stages.real import SMALL, TEST_BATCH
from cvdd_ray.stages.relabel import label_encoding, label_spans, teacher_names
from cvdd_ray.stages.synthesize import DISTILLED, image_jobs
from cvdd_ray.stages.votes import needs_priors, vote_of_image


def count_stages(run: Run) -> list[StageCount]:
    """Return every stage of a run in order; of its data labels alone are looked at (data/outlines.py).

    Raises ConfigError as the stages would.
    """
    c = run.config
    measured = needs_priors(c) and c.prior.method == "distill"
    stages = [count_pretrain(run)] if c.needs_experts else []
    if c.synthesize.matching.convolutions:
        stages.append(count_statistics(run))
    if measured and c.prior.ipc not in c.ipc:
        stages.append(count_initialize(run, c.prior.ipc))
    if measured:
        stages.append(count_prior(run))
    elif needs_priors(c):
        stages.append(StageCount("prior", {}, (), Storage(1 + OWN, 0), driver_bytes(run)))
    stages += [count_initialize(run, ipc) for ipc in c.ipc]
    if c.synthesize.method == "trajectories":
        stages += [count_trajectories(run), *(count_matching(run, ipc) for ipc in c.ipc)]
    else:
        stages += [count_synthesize(run, ipc) for ipc in c.ipc]
    stages += [count_relabel(run, ipc, label_set) for ipc in c.ipc for label_set in label_sets(c)]
    stages += [count_evaluate(run, ipc) for ipc in c.ipc]
    return stages + ([count_ceiling(run)] if CEILING in c.evaluate.baselines else [])


def count_pretrain(run: Run) -> StageCount:
    c, train, holdout = run.config, run.real.train, run.real.holdout
    networks = {name: expert(run, name) for name in c.committee.experts}
    given = set(c.committee.weights)
    steps = c.pretrain.epochs * len(batch_starts(len(train), c.pretrain.batch_size))
    units, batch, on_gpu = [], TEST_BATCH, []
    for name, network in networks.items():
        stored, trained = weight_bytes(network)
        testing = forward_cost(network)
        flops, peak = testing.flops * len(holdout), testing.peak_bytes * TEST_BATCH
        if name not in given:
            step = training_cost(network, c.pretrain.batch_size)
            flops += step.flops * len(train) * c.pretrain.epochs // c.pretrain.batch_size
            batch, moments = max(batch, c.pretrain.batch_size), 2 if c.pretrain.optimizer == "adam" else 1
            peak = max(peak, step.peak_bytes + moments * trained)
        units.append({name: flops})
        on_gpu.append(stored + peak)
    weights = sum(weight_bytes(network)[0] for network in networks.values())
    splits = split_bytes(run, train, holdout)
    decoded = 2 * batch * FLOAT * run.info.image_bytes
    return StageCount(
        "pretrain",
        {"experts": len(units), "trained": len(units) - len(given), "iterations": steps * (len(units) - len(given))},
        (Phase(units, tasks_per_gpu(run), decoded + (splits if run.info.image_size > SMALL else 0), on_gpu),),
        Storage(len(units) * (2 + OWN), weights),
        driver_bytes(run) + weights,
        splits,
    )


def count_statistics(run: Run) -> StageCount:
    """A pass over the train split for every expert, or two where classes have statistics of their own."""
    m, train = run.config.synthesize.matching, run.real.train
    by_class = m.class_share > 0
    networks = [expert(run, name) for name in run.config.committee.experts]
    weights = sum(weight_bytes(network)[0] for network in networks)
    written = sum(num_statistics(network) for network in networks) * FLOAT * (1 + by_class * run.info.num_classes)
    on_gpu = [weight_bytes(one)[0] + 2 * forward_cost(one).peak_bytes * m.batch_size for one in networks]
    return StageCount(
        "statistics",
        {"experts": len(networks), "image_views": len(networks) * len(train)},
        (
            Phase(
                [{one.name: forward_cost(one).flops * len(train) * (1 + by_class)} for one in networks],
                tasks_per_gpu(run),
                2 * m.batch_size * FLOAT * run.info.image_bytes + split_bytes(run, train),
                on_gpu,
            ),
        ),
        Storage(len(networks) + OWN, written),
        driver_bytes(run) + weights + written,
        split_bytes(run, train),
    )


def count_prior(run: Run) -> StageCount:
    """Every expert alone: images, then students on them, labelled by it as they go."""
    c, holdout = run.config, run.real.holdout
    iterations, epochs = c.prior.iterations or c.synthesize.iterations, c.prior.epochs or c.student_epochs
    sets = {name: image_jobs(run, c.prior.ipc, lambda i, name=name: ((name,), (1.0,))) for name in c.committee.experts}
    made = count_synthesis(run, sets, c.prior.ipc, iterations)
    num_images = c.prior.ipc * run.info.num_classes
    views, call = view_flops(run.info.image_size), images_per_call(run, num_images)
    learning = count_student(run, c.prior.student, num_images, epochs, len(holdout))
    units, label_gpu = [], 0
    for name in c.committee.experts:
        teacher = forward_cost(expert(run, name))
        unit = {OTHER: 2 * epochs * num_images * views, name: epochs * num_images * teacher.flops}
        unit[c.prior.student] = unit.get(c.prior.student, 0) + learning.flops
        units += [unit] * c.prior.seeds
        label_gpu = max(label_gpu, teacher_bytes(call, teacher, run.info) + weight_bytes(expert(run, name))[0])
    pixels = set_bytes(run, c.prior.ipc)
    on_gpu = network_input_bytes(pixels) + max(learning.gpu, label_gpu)
    students = Phase(units, tasks_per_gpu(run), 3 * pixels + learning.worker, on_gpu)
    return replace(
        made,
        stage="prior",
        counts={**made.counts, "students": len(units)},
        phases=(*made.phases, students),
        storage=replace(
            made.storage,
            files=made.storage.files + 1 + OWN,
            partial_files=made.storage.partial_files + len(units),
        ),
        store_bytes=max(made.store_bytes, split_bytes(run, holdout)),
    )


def count_initialize(run: Run, ipc: int) -> StageCount:
    c, info = run.config.initialize, run.info
    items, observer = class_items(run, ipc), expert(run, observer_name(run))
    shards = {kind: len(shard_tasks("x", kind, ipc, info.index_bytes)) for kind in KINDS}
    num_images, factor = ipc * info.num_classes, tiles_per_side(run)
    cuts = {"patches": factor**2 + 1, "noise": 1}.get(c.method, 2) * num_images
    is_coreset = c.method in CORESETS
    num_crops = 1 if is_coreset else c.num_crops
    scored = sum(len(one.scored) for one in items) if c.method in OBSERVED else 0
    cropped = BLOCK * num_crops * 3 * (info.image_size // (1 if is_coreset else factor)) ** 2 * FLOAT
    shard = max(len(task.indices) for task in shard_tasks("x", KINDS[0], ipc, info.index_bytes).values())
    writing = 4 * shard * info.index_bytes  # cells, tiles, PNG and the same decoded again
    written = {kind: image_bytes(num_images, info.image_bytes, PNG_OF_REAL) for kind in KINDS}
    listing, pieces, per_gpu = split_bytes(run, run.real.train), portions(cuts), tasks_per_gpu(run)
    reading = listing if info.image_size > SMALL else 0
    phases = [Phase([{} for _ in pieces], per_gpu, reading + max(2 * cropped, writing))]  # cut, and write the files
    if scored:
        crop = forward_cost(observer)
        portioned = [len(classes) * scored // len(items) for classes in class_portions(len(items))]
        units = [
            {observer.name: number * num_crops * crop.flops}
            for number in (portioned if is_coreset else map(len, portions(scored)))
        ]
        on_gpu = crop.peak_bytes * (TOGETHER if is_coreset else num_crops) + weight_bytes(observer)[0]
        phases.append(Phase(units, per_gpu, reading + 2 * cropped, on_gpu))
    return StageCount(
        f"initialize/ipc{ipc}",
        {
            "scored_images": scored,
            "crops": 0 if is_coreset else scored * num_crops,
            "cuts": cuts,
            "images": len(KINDS) * num_images,
        },
        tuple(phases),
        Storage(
            files=sum(shards.values()) + OWN,
            bytes=sum(written.values()),
            partial_files=(len(phases[-1].units) if scored else 0) + 2 * len(pieces) + files_of_sets(shards.values()),
            partial_bytes=(1 if c.method == "noise" else 2) * set_bytes(run, ipc) + sum(written.values()) + 32 * scored,
        ),
        driver_bytes(run) + PLACE_BYTES * (scored + cuts) + (writing if max(shards.values()) == 1 else 0),
        listing + weight_bytes(observer)[0] + 2 * per_gpu * cropped,
    )


def count_synthesize(run: Run, ipc: int) -> StageCount:
    made = count_synthesis(run, {DISTILLED: planned_jobs(run, ipc)}, ipc, run.config.synthesize.iterations)
    trace = made.counts["trace_rows"] * TRACE_ROW_BYTES
    storage = replace(made.storage, files=made.storage.files + 1 + OWN, bytes=made.storage.bytes + trace)
    return replace(made, stage=f"synthesize/ipc{ipc}", storage=storage)


def planned_jobs(run: Run, ipc: int) -> list[Job]:
    """Return the jobs of `synthesize/ipc<n>`; priors that are not known are taken to be equal."""
    priors = run.config.prior.values or dict.fromkeys(run.config.committee.experts, 0.0)
    return image_jobs(run, ipc, lambda i: vote_of_image(run, priors, ipc, i))


@dataclass(frozen=True)
class Labelling:
    """What teachers take to label a set: FLOPs per image by name, bytes of their weights, and on the GPU of a call's work."""

    per_image: Mapping[str, int]
    weights: int
    gpu: int


def count_labelling(run: Run, num_images: int) -> Labelling:
    networks = [expert(run, name) for name in teacher_names(run)]
    call = images_per_call(run, num_images)
    teachers = [forward_cost(network) for network in networks]
    per_image = {network.name: cost.flops for network, cost in zip(networks, teachers, strict=True)}
    weights = sum(weight_bytes(network)[0] for network in networks)
    gpu = max(teacher_bytes(call, cost, run.info) for cost in teachers)
    return Labelling({**per_image, OTHER: view_flops(run.info.image_size)}, weights, gpu)


def count_relabel(run: Run, ipc: int, label_set: str) -> StageCount:
    c, info = run.config.relabel, run.info
    num_images, stage = ipc * info.num_classes, f"relabel/ipc{ipc}/{label_set}"
    pixels, labelling = set_bytes(run, ipc), count_labelling(run, num_images)
    weights = labelling.weights
    if c.online:
        return StageCount(stage, {}, (), Storage(1 + OWN, 0), driver_bytes(run) + pixels + weights)
    encoding, epochs = label_encoding(c, info.num_classes), c.labelled_epochs
    spans, sharded = label_spans(epochs, num_images, info.num_classes, encoding)
    num_batches = len(batch_starts(num_images, c.resolved_batch_size(num_images)))
    written = epochs * epoch_bytes(num_images, num_batches, info.num_classes, encoding)
    written += file_bytes(info.num_classes, encoding) * (len(spans) if sharded else 1)
    units = [{name: len(span) * num_images * flops for name, flops in labelling.per_image.items()} for span in spans]
    holding = pixels + weights + 8 * num_images * info.num_classes  # 8: logits of an epoch, as made and as stored
    return StageCount(
        stage,
        {
            "epochs": epochs,
            "batches": epochs * num_batches,
            "image_views": epochs * num_images,
            "teacher_images": epochs * num_images * len(teacher_names(run)),
            "label_files": len(spans),
        },
        (Phase(units, tasks_per_gpu(run), holding, network_input_bytes(pixels) + weights + labelling.gpu),),
        Storage(
            files=(len(spans) if sharded else 1) + OWN,
            bytes=written,
            partial_files=2 * len(spans) + (not sharded),
            partial_bytes=written * (1 if sharded else 2),
        ),
        driver_bytes(run) + 2 * pixels + weights,
        pixels + weights,
    )


def images_per_call(run: Run, num_images: int) -> int:
    """Return how many images of a set are labelled together."""
    c = run.config.relabel
    batch = c.resolved_batch_size(num_images)
    return min(batches_together(batch, c.resolved_bn_group(num_images)) * batch, num_images)


def teacher_bytes(num_images: int, teacher: Cost, info: DatasetInfo) -> int:
    """Return what labelling so many images takes on the GPU besides weights: a teacher's pass, and views as they are made."""
    return num_images * (3 * teacher.peak_bytes // 2 + 4 * FLOAT * info.image_bytes)


def count_evaluate(run: Run, ipc: int) -> StageCount:
    """Students, and with online labels their teachers as well."""
    c, num_images = run.config.evaluate, ipc * run.info.num_classes
    epochs, arms = run.config.student_epochs, sized_rows(run.config)
    each = [count_student(run, name, num_images, epochs, len(run.real.test)) for name in c.students]
    views = epochs * num_images * view_flops(run.info.image_size)
    trained = [{name: one.flops, OTHER: views} for name, one in zip(c.students, each, strict=True)]
    is_online = run.config.relabel.online
    labelling = count_labelling(run, num_images) if is_online else Labelling({}, 0, 0)
    pixels, weights = set_bytes(run, ipc), labelling.weights
    asked = {name: epochs * num_images * flops for name, flops in labelling.per_image.items()}
    units = []
    for _ in range(c.seeds):
        for one in trained:
            units += [added(one, asked if TRAINING_SETS[arm].label_set else {}) for arm in arms]
    holding = pixels + weights + max(one.worker for one in each)
    on_gpu = (
        network_input_bytes(pixels) * (2 if is_online else 1)
        + weights
        + max(max(one.gpu for one in each), labelling.gpu)
    )
    return StageCount(
        f"evaluate/ipc{ipc}",
        {
            "students": len(units),
            "iterations": len(units) * each[0].steps,
            "image_views": len(units) * epochs * num_images,
            "tests": len(units) * each[0].tests,
        },
        (Phase(units, tasks_per_gpu(run), holding, on_gpu),),
        Storage(1 + OWN, 0, partial_files=len(units)),
        driver_bytes(run) + (len(arms) + 1) * pixels + weights,
        len(arms) * pixels + weights + split_bytes(run, run.real.test),
    )


def count_ceiling(run: Run) -> StageCount:
    """Students on all real images, trained as experts are."""
    c, train, test = run.config, run.real.train, run.real.test
    tests = len({*range(0, c.pretrain.epochs, c.evaluate.test_every), c.pretrain.epochs - 1})
    units, on_gpu = [], []
    for name in c.evaluate.students:
        network = student(run, name)
        step, testing, (stored, trained) = (
            training_cost(network, c.pretrain.batch_size), forward_cost(network), weight_bytes(network)
        )  # fmt: skip
        flops = step.flops * len(train) * c.pretrain.epochs // c.pretrain.batch_size + tests * testing.flops * len(test)
        units += [{name: flops}] * c.evaluate.seeds
        peak = max(step.peak_bytes + 2 * trained, testing.peak_bytes * TEST_BATCH)
        on_gpu += [stored + peak] * c.evaluate.seeds
    splits, batch = split_bytes(run, train, test), max(TEST_BATCH, c.pretrain.batch_size)
    steps = c.pretrain.epochs * len(batch_starts(len(train), c.pretrain.batch_size))
    holding = 2 * batch * FLOAT * run.info.image_bytes + (splits if run.info.image_size > SMALL else 0)
    return StageCount(
        CEILING_STAGE,
        {"students": len(units), "iterations": len(units) * steps, "tests": len(units) * tests},
        (Phase(units, tasks_per_gpu(run), holding, on_gpu),),
        Storage(1 + OWN, 0, partial_files=len(units)),
        driver_bytes(run),
        splits,
    )


def added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Return the sum of two units' FLOPs, by network."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
