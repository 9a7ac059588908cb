"""What synthesis by trajectories takes, counted from the settings: for `cvdd plan`."""

from cvdd_ray.core.costs import Network, matching_cost, training_cost, weight_bytes
from cvdd_ray.core.softlabels import batch_starts
from cvdd_ray.core.synthesis import is_traced
from cvdd_ray.data.shards import shard_tasks
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.groupwork import FLOAT
from cvdd_ray.stages.planwork import (
    OWN,
    PNG_OF_DISTILLED,
    TRACE_ROW_BYTES,
    Phase,
    StageCount,
    Storage,
    driver_bytes,
    files_of_sets,
    image_bytes,
    split_bytes,
    tasks_per_gpu,
)
from cvdd_ray.stages.trajectories import STAGE


def matched_network(run: Run) -> Network:
    """Return the network whose trajectories are matched."""
    c = run.config
    name = c.synthesize.trajectories.network
    return Network(name, run.info.num_classes, run.info.image_size, c.committee.width)


def count_trajectories(run: Run) -> StageCount:
    """Experts, whose parameters are all kept."""
    t, train, network = run.config.synthesize.trajectories, run.real.train, matched_network(run)
    step, (_, trained) = training_cost(network, t.batch_size), weight_bytes(network)
    unit = {network.name: step.flops * len(train) * t.epochs // t.batch_size}
    kept = (t.epochs + 1) * trained
    return StageCount(
        STAGE,
        {
            "experts": t.experts,
            "iterations": t.experts * t.epochs * len(batch_starts(len(train), t.batch_size)),
            "image_views": t.experts * t.epochs * len(train),
        },
        (
            Phase(
                [unit] * t.experts,
                tasks_per_gpu(run),
                3 * kept + 2 * t.batch_size * FLOAT * run.info.image_bytes,
                step.peak_bytes + 3 * trained,
            ),
        ),
        Storage(t.experts + OWN, t.experts * kept, partial_files=2 * t.experts, partial_bytes=t.experts * kept),
        driver_bytes(run),
        split_bytes(run, train),
    )


def count_matching(run: Run, ipc: int) -> StageCount:
    """One set, one piece of work: all of its steps, one after the other, and back through them."""
    s, info, network = run.config.synthesize, run.info, matched_network(run)
    t, num_images = s.trajectories, ipc * info.num_classes
    batch = min(t.step_images or num_images, num_images)
    step, (_, trained) = matching_cost(network, batch), weight_bytes(network)
    pixels, written = num_images * FLOAT * info.image_bytes, image_bytes(num_images, info.image_bytes, PNG_OF_DISTILLED)
    trace_rows = sum(is_traced(iteration, s.iterations) for iteration in range(s.iterations))
    shards = [len(shard_tasks("x", "x", ipc, info.index_bytes))]
    checkpoints = (s.iterations - 1) // s.checkpoint_every
    return StageCount(
        f"synthesize/ipc{ipc}",
        {
            "iterations": s.iterations,
            "steps": s.iterations * t.steps,
            "image_views": s.iterations * t.steps * batch,
            "trace_rows": trace_rows,
        },
        (
            Phase(
                [{network.name: s.iterations * t.steps * step.flops}],
                tasks_per_gpu(run),
                4 * pixels,
                5 * pixels + (t.steps + 4) * trained + step.peak_bytes,
            ),
        ),
        Storage(
            files=sum(shards) + 1 + OWN,
            bytes=written + trace_rows * TRACE_ROW_BYTES,
            partial_files=2 + files_of_sets(shards),
            partial_bytes=2 * written,
            checkpoint_bytes=2 * pixels if checkpoints else 0,
            checkpoints=checkpoints,
        ),
        driver_bytes(run) + 4 * TRACE_ROW_BYTES * trace_rows,
        0,
    )
