"""Several workers train one student: the same student as one process trains, up to rounding."""

import copy
import math
from functools import cache

import pytest
import torch
from helpers import Threads, in_processes, normal, tiny_net
from torch import nn

from cvdd_ray.core.softlabels import batch_views, epoch_plans, group_sizes
from cvdd_ray.core.students import StudentSettings, StudentTraining, train_student
from cvdd_ray.core.training import accuracy
from cvdd_ray.core.workers import ALONE, RunningStatistics, Workers

SIZE, CLASSES, EPOCHS = 10, 4, 4


def settings(**changes):
    numbers = {
        "epochs": EPOCHS, "batch_size": 16, "bn_group": 4, "lr": 0.01, "weight_decay": 0.01, "eta": 1.0,
        "temperature": 4.0, "test_every": 2,
    }  # fmt: skip
    return StudentSettings(**{**numbers, **changes})


def rows(epoch, num_images, temperature=4.0):
    """(plan, targets) of one epoch: batches of 16 and what is left."""
    plans = epoch_plans(
        3, epoch, num_images, SIZE, batch_size=16, flip=True, use_cutmix=True, crop_scale=(0.08, 1)
    )  # fmt: skip
    if temperature is None:
        return [(plan, plan.image_index_B % CLASSES) for plan in plans]
    return [(plan, 4 * normal(100 * epoch + plan.batch, len(plan.image_index_B), CLASSES)) for plan in plans]


class Double(nn.Module):
    """A network in float64 that takes float32 images."""

    def __init__(self, net):
        super().__init__()
        self.net = net.double()

    def forward(self, x):
        return self.net(x.double())


def student(dtype=torch.float32, dropout=0.0):
    return copy.deepcopy(fresh(dtype, dropout))


@cache
def fresh(dtype, dropout):
    """Made once, not by each thread: weights are drawn from the global generator."""
    net = tiny_net(1, num_classes=CLASSES, dropout=dropout)
    net[1].momentum = 0.3  # unlike the other layer's
    return Double(net) if dtype == torch.float64 else net


def train(workers, num_images, dtype=torch.float32, dropout=0.0, **changes):
    """The losses and agreements of every epoch, and the state after the last."""
    s = settings(**changes)
    training = StudentTraining(student(dtype, dropout), normal(0, num_images, 3, SIZE, SIZE), s, 5, workers)
    losses = [training.run_epoch(rows(epoch, num_images, s.temperature)) for epoch in range(s.epochs)]
    return losses, training.state()


def distance(one, other):
    """The largest difference of two states, each tensor's relative to its largest value."""
    assert one.keys() == other.keys()
    return max(
        float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-3)) for name in one
    )  # fmt: skip


# --- arithmetic, in threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [4.0, None])
@pytest.mark.parametrize(("num_workers", "num_images"), [(2, 32), (2, 37), (3, 36), (4, 33), (4, 20)])
def test_workers_train_the_student_of_one_process(num_workers, num_images, temperature):
    """Whole batches, short ones, ones with fewer micro-batches than workers; unequal shares. In float64 nothing but the last
    bits differs: parameters, AdamW's moments, running statistics and their counter, losses."""
    case = (num_images, torch.float64, 0.0)
    losses, state = train(ALONE, *case, temperature=temperature)
    team = Threads(num_workers).run(lambda workers: train(workers, *case, temperature=temperature))
    for their_losses, their_state in team:
        assert distance(state, their_state) < 1e-9
        assert torch.tensor(their_losses).allclose(torch.tensor(losses), rtol=1e-10)
        assert torch.equal(state["model/net.1.num_batches_tracked"], their_state["model/net.1.num_batches_tracked"])
    assert all(torch.equal(team[0][1][name], state[name]) for _, state in team[1:] for name in state)


def test_float32_differs_by_rounding():
    losses, state = train(ALONE, 37)
    ((their_losses, their_state), _) = Threads(2).run(lambda workers: train(workers, 37))
    assert 0 < distance(state, their_state) < 1e-2  # AdamW divides by gradients that are all but zero at first
    for name in ("model/1.running_mean", "model/4.running_var", "model/3.weight", "model/9.weight"):
        torch.testing.assert_close(state[name], their_state[name], rtol=1e-4, atol=1e-4)
    assert torch.tensor(their_losses).allclose(torch.tensor(losses), rtol=1e-4)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_running_statistics_are_those_of_one_process(num_workers):
    """Against the update written out; 7 micro-batches, and with 5 workers some of two, some of one."""
    batches, momentum, start = [3 + 2 * normal(k, 6, 2, 3, 3, dtype=torch.float64) for k in range(7)], 0.2, 5.0
    mean, var = torch.full((2,), start).double(), torch.full((2,), start).double()
    for batch in batches:
        by_channel = batch.transpose(0, 1).flatten(1)
        mean = (1 - momentum) * mean + momentum * by_channel.mean(1)
        var = (1 - momentum) * var + momentum * by_channel.var(1)

    def run(workers):
        layer = nn.BatchNorm2d(2, momentum=momentum).double()
        layer.running_mean.fill_(start)
        layer.running_var.fill_(start)
        layer.num_batches_tracked.fill_(100)
        statistics = RunningStatistics(layer, workers)
        for k in workers.own(len(batches)):
            statistics.before(k)
            layer(batches[k])
        statistics.finish(len(batches))
        return layer

    for layer in Threads(num_workers).run(run):
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=0)
        assert int(layer.num_batches_tracked) == 107


def test_a_worker_alone_changes_nothing():
    layer, other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    statistics = RunningStatistics(layer, ALONE)
    for k in range(3):
        statistics.before(k)
        layer(normal(k, 4, 2, 3, 3))
        other(normal(k, 4, 2, 3, 3))
    statistics.finish(3)
    assert torch.equal(layer.running_mean, other.running_mean)
    assert torch.equal(layer.running_var, other.running_var)


def test_every_micro_batch_goes_to_one_worker_and_shares_are_even():
    for num_workers in (1, 2, 3, 8):
        dealt = [list(Workers(rank, num_workers).own(7)) for rank in range(num_workers)]
        assert sorted(k for own in dealt for k in own) == list(range(7))
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_one_message_per_step_and_one_per_epoch():
    """Two for the epoch: running statistics, losses. Here 3 batches."""
    threads = Threads(2)
    threads.run(lambda workers: train(workers, 40, epochs=2))
    assert threads.messages == 2 * (3 + 2)


def test_the_accuracy_is_that_of_all_batches():
    net = tiny_net(1, num_classes=CLASSES)
    batches = [(normal(k, size, 3, SIZE, SIZE), torch.arange(size) % CLASSES) for k, size in enumerate((7, 7, 3))]
    whole = accuracy(net, batches)
    assert 0 < whole < 100
    for num_workers in (2, 3, 4):
        shares = Threads(num_workers).run(
            lambda workers: accuracy(net, [batches[k] for k in workers.own(3)], workers)
        )  # fmt: skip
        assert shares == [whole] * num_workers


def test_workers_with_different_checkpoints_refuse_to_train():
    states = {rank: train(ALONE, 20, epochs=rank + 1)[1] for rank in (0, 1)}

    def take_up(workers):
        start = states[workers.rank], []
        train_student(student(), normal(0, 20, 3, SIZE, SIZE), rows, settings(), lambda net: 0.0, workers=workers,
                      start=start)  # fmt: skip

    with pytest.raises(RuntimeError, match=r"worker \d of 2 has next epoch \d, others have not"):
        Threads(2).run(take_up)


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cutmix", [True, False])
def test_views_of_some_rows_are_those_of_the_whole_batch(use_cutmix):
    images = normal(0, 40, 3, SIZE, SIZE)
    plan = epoch_plans(3, 1, 40, SIZE, batch_size=40, flip=True, use_cutmix=use_cutmix, crop_scale=(0.08, 1))[0]
    whole, rows_R = batch_views(images, plan), torch.tensor([30, 2, 3, 17])
    some = batch_views(images, plan, rows_R)
    torch.testing.assert_close(some, whole[rows_R], rtol=1e-6, atol=1e-6)


def test_no_more_images_are_viewed_than_rows_and_partners():
    seen = []

    class Watched:
        shape, device = (40, 3, SIZE, SIZE), torch.device("cpu")

        def __getitem__(self, index):
            seen.extend(index.tolist())
            return normal(0, len(index), 3, SIZE, SIZE)

    plan = epoch_plans(3, 1, 40, SIZE, batch_size=40, flip=True, use_cutmix=True, crop_scale=(0.08, 1))[0]
    rows_R = torch.tensor([0, 1, 2])
    batch_views(Watched(), plan, rows_R)
    assert set(seen) == {int(plan.image_index_B[r]) for r in [0, 1, 2, *plan.partner_B[rows_R].tolist()]}


# --- torch.distributed -----------------------------------------------------------------------------------------------


def test_two_processes_with_dropout_train_the_student_of_one(tmp_path):
    """What a network draws depends on the micro-batch and not on who has it; both workers end with the same bits."""
    case = (37, torch.float64, 0.5)
    losses, state = train(ALONE, *case)
    ((first_losses, first), (second_losses, second)) = in_processes(2, tmp_path, train, *case)
    assert first_losses == second_losses
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert distance(state, first) < 1e-9
    assert torch.tensor(first_losses).allclose(torch.tensor(losses), rtol=1e-10)
    assert distance(state, train(ALONE, *case[:2])[1]) > 1e-2  # dropout is there


def test_the_cases_above_are_what_they_say():
    """Micro-batches per batch: as many as workers or more, a last batch with fewer, one without any for some."""
    assert group_sizes(16, 4) == [4] * 4
    assert group_sizes(5, 4) == [5]  # the rest of 37
    assert [len(plan.image_index_B) for plan, _ in rows(0, 33)] == [16, 17]
    assert math.ceil(20 / 16) == 2
