"""trajectories: parameters of networks after every epoch of their training on real images, for MTT (spec 9.6).

Made by the stage `synthesize` when `synthesize.method` asks for it.
"""

from collections.abc import Callable

from cvdd_ray.core.experts import work_device
from cvdd_ray.core.keys import generator, key
from cvdd_ray.core.models import build_model, build_seeded
from cvdd_ray.core.siamese import augmented, draw_operation, operations
from cvdd_ray.core.trajectories import FlatNetwork, expert_trajectory
from cvdd_ray.data.artifacts import Manifest, Written, sha256
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.storage import Store
from cvdd_ray.data.trajectories import trajectory_bytes, trajectory_name
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.real import Split, split_for_workers, train_batches
from cvdd_ray.trajectoryconfig import TrajectoryConfig

STAGE = "trajectories"
OF_EXPERTS = {"network", "experts", "epochs", "batch_size", "expert_lr"}
"""Settings that decide the trajectories; the others decide what is made of them."""


def trajectories(run: Run) -> Manifest:
    """Make `trajectories` if it is not there, and return its manifest: a file per expert, expert000.safetensors and on.

    Experts are trained side by side.  Raises ConfigError as `check_network`.
    """
    c, t = run.config, run.config.synthesize.trajectories
    check_network(run)
    settings = {
        "trajectories": t.model_dump(include=OF_EXPERTS),
        "committee.width": c.committee.width,
        "data.flip": c.data.flip,
    }
    plan = run.plan(STAGE, settings, {"train": run.real.train.fingerprint})
    with run.stage(plan, STAGE) as work:
        if work is not None:
            names = {f"expert{expert:03d}": expert for expert in range(t.experts)}
            items = {name: (expert, f"{work.partial}/{name}.file") for name, expert in names.items()}
            train = split_for_workers(run.real.train, run.info)
            shared = train, run.info, t, c.committee.width, c.data.flip, c.seed, run.store

            def file(name: str, receipt: bytes) -> Written:
                return Written(items[name][1], receipt.decode())

            doing = f"{t.experts} experts, {t.epochs} epochs"
            receipts = work.each(train_one, items, shared, doing=doing, written=file)
            files = {trajectory_name(expert): file(name, receipts[name]) for name, expert in names.items()}
            work.commit(files, train_images=len(run.real.train))
    return run.require(STAGE, "synthesize")


def check_network(run: Run) -> None:
    """Raise ConfigError for a network that does not exist at this size, or has BatchNorm."""
    name = run.config.synthesize.trajectories.network
    FlatNetwork(build_model(name, run.info.num_classes, run.info.image_size, width=run.config.committee.width), name)


def train_one(
    item: tuple[int, str], train: Split, info: DatasetInfo, t: TrajectoryConfig, width: float, flip: bool, seed: int,
    store: Store, report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Train one expert by SGD on DSA views of the real images, write its trajectory under the given name, and return the
    file's sha256."""
    expert, file = item
    device, names = work_device(), operations(flip)
    model = build_seeded(
        t.network, info.num_classes, info.image_size, width=width, seed=key(seed, "trajectory-start", expert)
    )
    network = FlatNetwork(model.to(device), t.network)

    def epoch_batches(epoch: int):
        draw = generator(seed, "trajectory-views", expert, epoch)
        for images_BCSS, labels_B in train_batches(
            train, info, batch_size=t.batch_size, crop="pad", pad=0, flip=False,
            seed=key(seed, "trajectory-data", expert), epoch=epoch, device=device,
        ):  # fmt: skip
            yield augmented(images_BCSS, draw_operation(names, draw)), labels_B

    def on_epoch(epoch: int, loss: float) -> None:
        report({"done": (epoch + 1) / t.epochs, "note": f"expert {expert} {epoch + 1}/{t.epochs} loss {loss:.2f}"})

    theta_EP = expert_trajectory(network.loss, network.theta(), epoch_batches, t.epochs, t.expert_lr, on_epoch)
    data = trajectory_bytes(theta_EP)
    store.write(file, data)
    return sha256(data).encode()
