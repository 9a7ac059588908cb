"""The loop where voters take turns, classes are together and statistics have a memory (spec 9.4), against a naive one."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import normal, tiny_net
from test_statistics import PATCH, naive, targets_of
from test_synthesis import SETTINGS, SIZE, TowardsZero, copy_of
from torch.nn import functional as F

from cvdd_ray.core.augment import apply_views, draw_views
from cvdd_ray.core.committee import LocalCommittee
from cvdd_ray.core.keys import generator, key
from cvdd_ray.core.statistics import Matching, MatchingVoter, densification
from cvdd_ray.core.synthesis import Job, SynthesisState, distill_group, final_losses, job_views

JOBS = (
    Job(0, 0, labels=(0, 1), voters=("a", "b"), weights=(0.5, 0.5), span=3, takes_turns=True),
    Job(3, 0, labels=(0, 1), voters=("b", "c"), weights=(0.5, 0.5), span=3, takes_turns=True),
)
LOOP = replace(SETTINGS, iterations=7, pad=2, densification=1.0, densification_temperature=4.0, has_memory=True)


def nets():
    return {"a": tiny_net(1), "b": tiny_net(2, width=5), "c": tiny_net(3, width=3)}


def committee(networks, drop_rate=0.0):
    matching = Matching(PATCH, 0.8, drop_rate, 0.0)
    return LocalCommittee({
        name: MatchingVoter(net, targets_of(net, seed), matching=matching, weight=0.01, first_multiplier=10.0)
        for seed, (name, net) in enumerate(networks.items())
    })  # fmt: skip


def start():
    return SynthesisState.start(0.05 * normal(0, 2, 6, 3, SIZE, SIZE))


def test_images_of_a_class_lie_together():
    assert JOBS[0].targets == (0, 0, 0, 1, 1, 1)
    assert JOBS[0].num_images == 6
    assert [JOBS[1].asked(t) for t in range(3)] == [{"b": 1.0}, {"c": 1.0}, {"b": 1.0}]


def test_the_loop_is_the_naive_loop():
    networks = nets()
    final = distill_group(committee(networks), JOBS, start(), LOOP)
    for j, job in enumerate(JOBS):
        pixels = start().images_JBCHW[j].clone().requires_grad_(True)
        optimizer, labels = (
            torch.optim.Adam([pixels], lr=LOOP.lr, betas=LOOP.betas, eps=1e-8),
            torch.tensor(job.targets),
        )
        averages = dict.fromkeys(networks, 0.0)
        for t in range(LOOP.iterations):
            optimizer.param_groups[0]["lr"] = 0.5 * LOOP.lr * (1 + math.cos(math.pi * t / LOOP.iterations))
            view = job_views((job,), LOOP, SIZE, t)
            top, left, height, width = view.boxes_N4[0].tolist()
            assert (height, width) == (SIZE, SIZE)
            x = F.pad(pixels, (2, 2, 2, 2))[:, :, top + 2 : top + 2 + SIZE, left + 2 : left + 2 + SIZE]
            x = x.flip(3) if view.flips_N[0] else x
            x = torch.roll(x, tuple(view.rolls_N2[0].tolist()), (-2, -1))
            name = job.voters[t % 2]

            def average(now, name=name, averages=averages):
                averages[name] = 0.8 * averages[name] + 0.2 * now.detach()
                return averages[name] + now - now.detach()

            targets = targets_of(networks[name], list(networks).index(name))
            loss, ce, term = naive(networks[name], x, labels, targets, weight=0.01, average=average)
            optimizer.zero_grad()
            (loss + densification(x.unflatten(0, (2, 3)), 4.0)).backward()
            optimizer.step()
            with torch.no_grad():
                for channel in range(3):
                    pixels[:, channel].clamp_(LOOP.low_C[channel], LOOP.high_C[channel])
        assert torch.allclose(final.images_JBCHW[j], pixels.detach(), atol=2e-3)
        assert final_losses(final, JOBS)[0][j] == pytest.approx(float(ce.detach()), rel=1e-3)
        assert final_losses(final, JOBS)[1][j] == pytest.approx(float(term.detach()), rel=1e-3)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_turns_and_memory_go_on_from_a_checkpoint_to_the_same_bits(at):
    """Round, averages and what is dropped belong to the state of the group."""
    kept = []
    voters = committee(nets(), drop_rate=0.4)
    whole = distill_group(
        voters, JOBS, start(), LOOP,
        on_progress=lambda s: kept.append(replace(copy_of(s), memory=dict(s.memory))) if s.iteration == at else None,
    )  # fmt: skip
    resumed = distill_group(voters, JOBS, kept[0], LOOP)
    assert torch.equal(whole.images_JBCHW, resumed.images_JBCHW)
    assert whole.trace == resumed.trace
    assert all(torch.equal(rows, resumed.memory[name]) for name, rows in whole.memory.items())
    forgetful = distill_group(voters, JOBS, replace(kept[0], memory={}), LOOP)
    assert not torch.equal(whole.images_JBCHW, forgetful.images_JBCHW)


def test_an_expert_remembers_nothing_of_jobs_it_was_not_asked_about():
    final = distill_group(committee(nets()), JOBS, start(), replace(LOOP, iterations=2))
    assert {name: rows.abs().sum(1).gt(0).tolist() for name, rows in final.memory.items()} == {
        "a": [True, False], "b": [True, True], "c": [False, True],
    }  # fmt: skip


def test_every_voter_s_losses_are_traced():
    """Also where the number of iterations between two traces is a multiple of the number of voters."""
    still = replace(LOOP, iterations=400, has_memory=False, densification=0.0)
    final = distill_group(TowardsZero(), JOBS, start(), still)
    rows = [(t, name) for t, j, name, _, _ in final.trace if j == 0]
    assert {name for _, name in rows} == {"a", "b"}
    assert 190 <= len(rows) <= 210  # every voter a hundred times
    assert rows[-1] == (399, "b")


def test_what_is_dropped_depends_on_seed_job_expert_and_iteration():
    keys = []

    class Listening(TowardsZero):
        def vote(self, ballots):
            keys.extend((name, *ballot.keys_G.tolist()) for name, ballot in ballots.items())
            return super().vote(ballots)

    distill_group(Listening(), JOBS, start(), replace(LOOP, iterations=2))
    assert keys[0] == ("a", key(LOOP.seed, "statistics", "a", 0, 0, 0))
    assert len({number for _, *numbers in keys for number in numbers}) == 4


def test_a_shifted_view_has_zeros_where_it_leaves_the_image():
    views = draw_views(200, 8, generator(0, "x"), crop=True, flip=False, roll=0, pad=3)
    corners = views.boxes_N4[:, :2]
    assert corners.min() == -3
    assert corners.max() == 3
    image = normal(1, 1, 3, 8, 8)
    shifted = apply_views(image.expand(200, 3, 8, 8), views, 8)
    padded = F.pad(image, (3, 3, 3, 3))
    for n in range(0, 200, 20):
        top, left = (corners[n] + 3).tolist()
        assert torch.equal(shifted[n], padded[0, :, top : top + 8, left : left + 8])
