"""The synthesis loop against a naive one in plain torch, and what it promises about views, checkpoints and failure."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import naive_objective, normal, state_hash, tiny_net
from torchvision.transforms import functional as tvf

from cvdd_ray.core.committee import LocalCommittee, Vote, Voter
from cvdd_ray.core.synthesis import (
    VIEW_BLOCK,
    Job,
    SynthesisSettings,
    SynthesisState,
    distill_group,
    final_losses,
    job_views,
)
from cvdd_ray.errors import NumericsError

SIZE = 12
BN_WEIGHT, FIRST = 0.01, 10.0
SETTINGS = SynthesisSettings(
    seed=5, iterations=6, lr=0.25, betas=(0.5, 0.9), augment=True, flip=True, crop_scale=(0.08, 1.0), roll=3,
    low_C=(-2.0, -1.9, -1.8), high_C=(2.0, 2.1, 2.2),
)  # fmt: skip
JOBS = (
    Job(image_index=0, chunk=0, labels=(0, 1, 2), voters=("a", "b"), weights=(0.7, 0.3)),
    Job(image_index=4, chunk=0, labels=(0, 1, 2), voters=("b", "c"), weights=(0.2, 0.8)),
)


def nets():
    return {"a": tiny_net(1), "b": tiny_net(2, width=5), "c": tiny_net(3, width=3)}


def committee_of(networks):
    return LocalCommittee({
        name: Voter(net, bn_weight=BN_WEIGHT, first_bn_multiplier=FIRST) for name, net in networks.items()
    })  # fmt: skip


def start(num_jobs=2, seed=0):
    return SynthesisState.start(normal(seed, num_jobs, 3, 3, SIZE, SIZE).clamp(-1.8, 2.0))


def copy_of(state):
    tensors = (state.images_JBCHW, state.first_moment_JBCHW, state.second_moment_JBCHW)
    return SynthesisState(*(tensor.clone() for tensor in tensors), state.iteration, list(state.trace))


def assert_same_bits(one, other):
    for name in ("images_JBCHW", "first_moment_JBCHW", "second_moment_JBCHW"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.iteration, one.trace) == (other.iteration, other.trace)


class TowardsZero:
    """A committee without networks: every expert pulls every view to zero. `spoil` may alter a vote."""

    def __init__(self, spoil=lambda call, name, vote: vote):
        self.calls, self.spoil = 0, spoil

    def vote(self, ballots):
        self.calls += 1
        votes = {}
        for name, ballot in ballots.items():
            views = ballot.views_GBCHW
            vote = Vote(views / views[0].numel(), (views**2).mean((1, 2, 3, 4)), views.abs().mean((1, 2, 3, 4)))
            votes[name] = self.spoil(self.calls, name, vote)
        return votes


# --- the loop ------------------------------------------------------------------------------------------------------


def naive_distillation(job, networks, images, settings, num_iterations):
    """One job by the book: torchvision's augmentation, hooks on nn.BatchNorm2d, autograd through all, Adam, clamp."""
    pixels = images.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([pixels], lr=settings.lr, betas=settings.betas, eps=1e-8)
    labels = torch.tensor(job.labels)
    rows = []
    for t in range(num_iterations):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * settings.lr * (1 + math.cos(math.pi * t / settings.iterations))
        view = job_views((job,), settings, SIZE, t)  # the drawn integers only
        x = tvf.resized_crop(pixels, *view.boxes_N4[0].tolist(), [SIZE, SIZE])
        x = tvf.hflip(x) if view.flips_N[0] else x
        x = torch.roll(x, tuple(view.rolls_N2[0].tolist()), (-2, -1))
        loss = 0.0
        for name, weight in zip(job.voters, job.weights, strict=True):
            term, ce, bn = naive_objective(networks[name], x, labels, bn_weight=BN_WEIGHT, first_bn_multiplier=FIRST)
            loss = loss + weight * term
            rows.append((t, name, float(ce.detach()), float(bn.detach())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for channel in range(3):
                pixels[:, channel].clamp_(settings.low_C[channel], settings.high_C[channel])
    return pixels.detach(), rows


def test_the_loop_is_the_naive_loop():
    networks, initial = nets(), start()
    state = distill_group(committee_of(networks), JOBS, initial, SETTINGS)
    assert state.iteration == SETTINGS.iterations
    for j, job in enumerate(JOBS):
        expected, rows = naive_distillation(job, networks, initial.images_JBCHW[j], SETTINGS, SETTINGS.iterations)
        assert float((expected - initial.images_JBCHW[j]).abs().max()) > 0.2  # they moved
        torch.testing.assert_close(state.images_JBCHW[j], expected, rtol=1e-4, atol=1e-4)
        ours = sorted((t, name, ce, bn) for t, job_index, name, ce, bn in state.trace if job_index == j)
        for (t, name, ce, bn), (t2, name2, ce2, bn2) in zip(ours, sorted(rows), strict=True):
            assert (t, name) == (t2, name2)
            assert (ce, bn) == pytest.approx((ce2, bn2), rel=1e-3)


def test_experts_are_not_changed_by_the_loop():
    networks = nets()
    before = {name: state_hash(net) for name, net in networks.items()}
    initial = start()
    kept = copy_of(initial)
    distill_group(committee_of(networks), JOBS, initial, replace(SETTINGS, iterations=10))
    assert {name: state_hash(net) for name, net in networks.items()} == before
    assert all(parameter.grad is None for net in networks.values() for parameter in net.parameters())
    assert_same_bits(initial, kept)


def test_a_job_does_not_feel_its_group():
    committee, initial = committee_of(nets()), start()
    together = distill_group(committee, JOBS, initial, SETTINGS)
    for j, job in enumerate(JOBS):
        alone = distill_group(committee, (job,), SynthesisState.start(initial.images_JBCHW[j : j + 1]), SETTINGS)
        torch.testing.assert_close(together.images_JBCHW[j], alone.images_JBCHW[0], rtol=1e-4, atol=1e-4)


def test_the_order_of_answers_changes_no_bit():
    class Backwards:
        def __init__(self, committee):
            self.committee = committee

        def vote(self, ballots):
            return dict(reversed(self.committee.vote(ballots).items()))

    committee = committee_of(nets())
    three = tuple(replace(job, voters=("a", "b", "c"), weights=(0.5, 0.3, 0.2)) for job in JOBS)  # a + b is b + a
    forwards = distill_group(committee, three, start(), SETTINGS)
    assert_same_bits(forwards, distill_group(Backwards(committee), three, start(), SETTINGS))


def test_pixels_stay_in_range_after_every_step():
    low = torch.tensor(SETTINGS.low_C)[:, None, None]
    high = torch.tensor(SETTINGS.high_C)[:, None, None]
    seen, at_the_edge = [], 0

    def look(state):
        nonlocal at_the_edge
        seen.append(state.iteration)
        assert (state.images_JBCHW >= low).all()
        assert (state.images_JBCHW <= high).all()
        at_the_edge += int(((state.images_JBCHW == low) | (state.images_JBCHW == high)).sum())

    distill_group(committee_of(nets()), JOBS, start(), replace(SETTINGS, lr=2.0), on_progress=look)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert at_the_edge > 100


def test_a_step_follows_the_cosine_and_the_given_betas():
    """The pull to zero has a constant sign, so Adam's steps are the learning rates (spec 5.4)."""
    job = replace(JOBS[0], voters=("a",), weights=(1.0,))
    settings = replace(
        SETTINGS, iterations=4, lr=0.01, augment=False, roll=0, betas=(0.0, 0.0), low_C=(-9.0,) * 3, high_C=(9.0,) * 3
    )
    levels = [5.0]
    initial = SynthesisState.start(torch.full((1, 3, 3, SIZE, SIZE), 5.0))
    distill_group(
        TowardsZero(),
        (job,),
        initial,
        settings,
        on_progress=lambda s: levels.append(float(s.images_JBCHW[0, 0, 0, 0, 0])),
    )
    steps = [before - after for before, after in itertools.pairwise(levels)]
    assert steps == pytest.approx([0.01 * m for m in (1.0, 0.853553, 0.5, 0.146447)], rel=1e-3)


def test_final_losses_are_weighted_sums_of_the_last_rows():
    trace = [
        (0, 0, "a", 9.0, 9.0),
        (1, 0, "a", 1.0, 10.0),
        (1, 0, "b", 2.0, 20.0),
        (1, 1, "b", 3.0, 30.0),
        (1, 1, "c", 5.0, 50.0),
    ]
    state = SynthesisState(torch.empty(0), torch.empty(0), torch.empty(0), iteration=2, trace=trace)
    cross_entropy, bn_term = final_losses(state, JOBS)
    assert cross_entropy == pytest.approx([0.7 * 1 + 0.3 * 2, 0.2 * 3 + 0.8 * 5])
    assert bn_term == pytest.approx([0.7 * 10 + 0.3 * 20, 0.2 * 30 + 0.8 * 50])


def test_trace_has_about_a_hundred_points_and_always_the_last():
    settings = replace(SETTINGS, iterations=250)
    state = distill_group(TowardsZero(), JOBS, start(), settings)
    rows = Counter((j, name) for _, j, name, _, _ in state.trace)
    assert set(rows) == {(0, "a"), (0, "b"), (1, "b"), (1, "c")}
    assert sorted({t for t, *_ in state.trace}) == [*range(0, 250, 2), 249]
    assert all(math.isfinite(value) for pair in final_losses(state, JOBS) for value in pair)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoints_come_at_their_cadence_and_not_at_the_end():
    seen = []
    settings = replace(SETTINGS, checkpoint_every=2)
    distill_group(TowardsZero(), JOBS, start(), settings, on_checkpoint=lambda state: seen.append(state.iteration))
    assert seen == [2, 4]
    resumed = SynthesisState(*(t.clone() for t in vars(start()).values() if isinstance(t, torch.Tensor)), iteration=3)
    seen.clear()
    distill_group(TowardsZero(), JOBS, resumed, settings, on_checkpoint=lambda state: seen.append(state.iteration))
    assert seen == [4]


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resuming_gives_the_same_bits(cut):
    committee, kept = committee_of(nets()), {}
    settings = replace(SETTINGS, checkpoint_every=1)
    whole = distill_group(
        committee, JOBS, start(), settings, on_checkpoint=lambda state: kept.update({state.iteration: copy_of(state)})
    )
    checkpoint = copy_of(kept[cut])
    assert_same_bits(whole, distill_group(committee_of(nets()), JOBS, kept[cut], settings))
    assert_same_bits(kept[cut], checkpoint)  # a checkpoint can be used again


@pytest.mark.parametrize("cut", [VIEW_BLOCK - 1, VIEW_BLOCK, VIEW_BLOCK + 1])
def test_resuming_around_a_block_of_views_gives_the_same_bits(cut):
    settings, kept = replace(SETTINGS, iterations=VIEW_BLOCK + 6, checkpoint_every=1), {}
    whole = distill_group(
        TowardsZero(),
        JOBS,
        start(),
        settings,
        on_checkpoint=lambda state: kept.update({state.iteration: copy_of(state)}),
    )
    assert_same_bits(whole, distill_group(TowardsZero(), JOBS, kept[cut], settings))


def test_a_finished_state_comes_back_as_it_is():
    committee = TowardsZero()
    done = distill_group(committee, JOBS, start(), SETTINGS)
    committee.calls = 0
    assert_same_bits(distill_group(committee, JOBS, copy_of(done), SETTINGS), done)
    assert committee.calls == 0


# --- views ---------------------------------------------------------------------------------------------------------


def views_of(job, settings=SETTINGS, iterations=range(2 * VIEW_BLOCK + 3)):
    rows = []
    for t in iterations:
        view = job_views((job,), settings, SIZE, t)
        rows.append((*view.boxes_N4[0].tolist(), bool(view.flips_N[0]), *view.rolls_N2[0].tolist()))
    return rows


def test_views_depend_on_seed_index_chunk_and_iteration_alone():
    job = JOBS[0]
    rows = views_of(job)
    assert len(set(rows)) > 0.9 * len(rows)  # a new view in every iteration, across blocks
    assert rows == list(reversed(views_of(job, iterations=reversed(range(2 * VIEW_BLOCK + 3)))))
    assert rows == views_of(replace(job, voters=("c",), weights=(1.0,), labels=(7,)))
    others = (replace(job, image_index=1), replace(job, chunk=1), replace(job, image_index=1, chunk=1))
    for other in (*map(views_of, others), views_of(job, replace(SETTINGS, seed=6))):
        assert sum(one == two for one, two in zip(rows, other, strict=True)) < 0.1 * len(rows)


def test_a_group_s_views_are_its_jobs_views_in_order():
    for t in (0, 7, VIEW_BLOCK, VIEW_BLOCK + 1):
        both = job_views(JOBS, SETTINGS, SIZE, t)
        for j, job in enumerate(JOBS):
            alone = job_views((job,), SETTINGS, SIZE, t)
            assert torch.equal(both.boxes_N4[j], alone.boxes_N4[0])
            assert bool(both.flips_N[j]) == bool(alone.flips_N[0])
            assert torch.equal(both.rolls_N2[j], alone.rolls_N2[0])


def test_augmentation_can_be_switched_off_but_not_the_roll():
    plain = views_of(JOBS[0], replace(SETTINGS, augment=False))
    assert {row[:5] for row in plain} == {(0, 0, SIZE, SIZE, False)}
    assert {row[5:] for row in plain} == {(a, b) for a in range(4) for b in range(4)}
    unflipped = views_of(JOBS[0], replace(SETTINGS, flip=False))
    assert {row[4] for row in unflipped} == {False}
    assert {row[4] for row in views_of(JOBS[0])} == {True, False}
    assert len({row[:4] for row in unflipped}) > 50


def test_all_voters_of_a_job_see_the_same_view_of_all_its_images():
    asked = []

    class Listener(TowardsZero):
        def vote(self, ballots):
            asked.append(ballots)
            return super().vote(ballots)

    one_image = normal(0, 1, 1, 3, SIZE, SIZE).expand(2, 3, 3, SIZE, SIZE)
    distill_group(Listener(), JOBS, SynthesisState.start(one_image), replace(SETTINGS, iterations=1))
    ballots = asked[0]
    assert {name: len(ballot.views_GBCHW) for name, ballot in ballots.items()} == {"a": 1, "b": 2, "c": 1}
    assert torch.equal(ballots["a"].views_GBCHW[0], ballots["b"].views_GBCHW[0])
    assert torch.equal(ballots["c"].views_GBCHW[0], ballots["b"].views_GBCHW[1])
    assert not torch.equal(ballots["b"].views_GBCHW[0], ballots["b"].views_GBCHW[1])
    for ballot in ballots.values():
        assert (ballot.views_GBCHW == ballot.views_GBCHW[:, :1]).all()
        assert not ballot.views_GBCHW.requires_grad
        assert (ballot.labels_GB == torch.tensor([0, 1, 2])).all()


# --- failure -------------------------------------------------------------------------------------------------------


def spoiler(bad_call, bad_expert, field, group=0):
    def spoil(call, name, vote):
        if call == bad_call and name == bad_expert:
            tensor = getattr(vote, field).clone()
            tensor[group] = math.nan
            return replace(vote, **{field: tensor})
        return vote

    return spoil


def test_an_expert_with_nan_weights_is_named_before_any_step():
    networks, progress = nets(), []
    with torch.no_grad():
        networks["c"][0].weight[0] = math.nan
    with pytest.raises(NumericsError, match=r"image index 4, class chunk 0, iteration 0: expert c\b"):
        distill_group(committee_of(networks), JOBS, start(), SETTINGS, on_progress=progress.append)
    assert not progress


@pytest.mark.parametrize("field", ["gradient_GBCHW", "cross_entropy_G", "bn_term_G"])
def test_the_first_value_that_is_not_finite_stops_the_loop_and_is_named(field):
    done = []
    with pytest.raises(NumericsError, match=r"image index 4, .*iteration 3: expert b\b"):
        distill_group(
            TowardsZero(spoiler(4, "b", field, group=1)), JOBS, start(), SETTINGS,
            on_progress=lambda state: done.append(state.iteration),
        )  # fmt: skip
    assert done == [1, 2, 3]


def test_a_loss_that_overflows_is_refused_though_its_gradient_is_finite():
    networks = nets()
    networks["c"][1].running_var[0] = 3e19  # its square is beyond float32
    with pytest.raises(NumericsError, match=r"iteration 0: expert c\b"):
        distill_group(committee_of(networks), JOBS, start(), SETTINGS)


def test_a_weight_that_is_not_finite_never_reaches_the_pixels():
    jobs, done = (JOBS[0], replace(JOBS[1], weights=(math.nan, 0.8))), []
    with pytest.raises(NumericsError):
        distill_group(TowardsZero(), jobs, start(), SETTINGS, on_progress=lambda state: done.append(state.iteration))
    assert not done


def test_crops_begin_large_and_end_as_always():
    """CDA's course reaches the views of every block; a block that is drawn alone is drawn the same."""
    settings = replace(SETTINGS, iterations=4 * VIEW_BLOCK, crop_schedule="cosine", flip=False, roll=0)
    areas = []
    for t in range(settings.iterations):
        boxes_J4 = job_views(JOBS, settings, 40, t).boxes_N4
        areas.append(min(float(h * w) / 1600 for _, _, h, w in boxes_J4.tolist()))
        low = settings.scale(t // VIEW_BLOCK)[0][t % VIEW_BLOCK]
        assert areas[-1] > low - 0.04
    assert min(areas[:20]) > 0.9
    assert min(areas[-VIEW_BLOCK:]) < 0.2
    assert settings.scale(0)[0][0] == 1.0
    assert replace(settings, crop_schedule="constant").scale(3) == (0.08, 1.0)


def test_no_iterations_leave_the_starting_images():
    begun = start()
    final = distill_group(committee_of(nets()), JOBS, begun, replace(SETTINGS, iterations=0))
    assert_same_bits(final, begun)
    assert all(math.isnan(value) for values in final_losses(final, JOBS) for value in values)
