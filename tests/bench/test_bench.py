"""The benchmark: its two sides compute the same, and what it measures is what there is to measure."""

import time

import numpy as np
import pytest
import torch
from helpers import normal, tiny_net
from PIL import Image

from cvdd_ray.bench import reference, works
from cvdd_ray.bench.sides import Comparison, Side, Timing, compare
from cvdd_ray.bench.unreal import as_pil, random_pixels, unreal_run
from cvdd_ray.core.augment import Views
from cvdd_ray.core.committee import LocalCommittee, Voter
from cvdd_ray.core.softlabels import BatchPlan, Teacher, batch_views, committee_logits, epoch_plans
from cvdd_ray.core.students import StudentSettings, StudentTraining, adamw_groups
from cvdd_ray.core.synthesis import Job, SynthesisSettings, SynthesisState, distill_group
from cvdd_ray.data.datasets import Normalization, network_inputs
from cvdd_ray.errors import CvddError
from cvdd_ray.recipes import load_config, with_settings

SIZE = 8
PLAIN = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def test_the_plain_synthesis_is_ours():
    nets = {name: tiny_net(seed) for seed, name in enumerate("ab")}
    start = normal(0, 4, 3, SIZE, SIZE)
    job = Job(0, 0, (0, 1, 2, 0), ("a", "b"), (0.7, 0.3))
    bounds = (-2.0,) * 3, (2.0,) * 3
    settings = SynthesisSettings(0, 5, 0.1, (0.5, 0.9), False, False, (0.08, 1.0), 0, *bounds)
    voters = {name: Voter(net, bn_weight=0.1, first_bn_multiplier=10.0) for name, net in nets.items()}
    ours = distill_group(LocalCommittee(voters), (job,), SynthesisState.start(start[None]), settings)
    theirs = reference.distill_job(
        [nets["a"], nets["b"]], job.weights, start, torch.tensor(job.labels), iterations=5, lr=0.1, betas=(0.5, 0.9),
        bn_weight=0.1, first_bn_multiplier=10.0, roll=0, low_C=bounds[0], high_C=bounds[1], augment=False,
        flip=False, crop_scale=(0.08, 1.0),
    )  # fmt: skip
    assert float((theirs - start).abs().max()) > 0.2  # they moved
    torch.testing.assert_close(ours.images_JBCHW[0], theirs, rtol=1e-4, atol=1e-4)


def test_the_plain_views_are_ours_but_for_rounding_to_pixels():
    pixels = random_pixels(6, SIZE)
    (plan,) = epoch_plans(0, 0, 6, SIZE, batch_size=6, flip=True, use_cutmix=True, crop_scale=(0.3, 1.0))
    ours = batch_views(network_inputs(pixels, PLAIN, torch.device("cpu")), plan)
    theirs = reference.pil_batch(as_pil(pixels), plan, SIZE, *PLAIN)
    assert float((ours - theirs).abs().max()) < 1.5 / 255 / min(PLAIN.std)


def test_the_plain_labels_are_ours(tmp_path):
    nets, views = [tiny_net(0), tiny_net(1)], normal(2, 4, 3, SIZE, SIZE)
    plan = BatchPlan(0, 3, torch.arange(4), whole(4), torch.arange(4), (0, 0, 0, 0))
    teachers = [Teacher(net, batchnorm="batch") for net in nets]
    (ours,) = committee_logits(teachers, (0.6, 0.4), [views], 2)
    reference.label_batch_file(tmp_path, plan, views, nets, (0.6, 0.4), 2, batchnorm="batch")
    _, theirs = reference.load_label(tmp_path, 3)
    torch.testing.assert_close(ours.half(), theirs, rtol=2e-3, atol=2e-3)


def test_the_plain_student_is_ours(tmp_path):
    pixels = random_pixels(8, SIZE)
    s = StudentSettings(1, 4, 2, 0.01, 0.1, 1.0, 4.0, 1)
    plans = [
        BatchPlan(0, b, torch.arange(4 * b, 4 * b + 4), whole(4), torch.tensor([1, 0, 3, 2]), (2, 2, 6, 6))
        for b in (0, 1)
    ]
    logits = [normal(b, 4, 4).half() for b in (0, 1)]
    mine, theirs = tiny_net(0), tiny_net(0)
    training = StudentTraining(mine, network_inputs(pixels, PLAIN, torch.device("cpu")), s, 0)
    training.run_epoch((plan, rows.float()) for plan, rows in zip(plans, logits, strict=True))
    for plan, rows in zip(plans, logits, strict=True):
        reference.save_label(tmp_path, plan, rows)
    optimizer = torch.optim.AdamW(adamw_groups(theirs, s.weight_decay), lr=training._s.lr_at(0))
    reference.train_epoch(
        theirs, optimizer, tmp_path, 2, as_pil(pixels), size=SIZE, mean=PLAIN.mean, std=PLAIN.std, bn_group=2,
        temperature=4.0, device=torch.device("cpu"),
    )  # fmt: skip
    for one, other in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def whole(num):
    boxes = torch.tensor([0, 0, SIZE, SIZE]).repeat(num, 1)
    return Views(boxes, torch.zeros(num, dtype=torch.bool), torch.zeros(num, 2, dtype=torch.long))


def sleeper(seconds, megabytes=0):
    kept = np.ones((megabytes << 20) // 8)

    def round_():
        time.sleep(seconds)
        return 2 + 0 * len(kept)

    return round_


def failing(error):
    def round_():
        raise error

    return round_


def dying():
    import os

    os._exit(7)


def test_our_synthesis_is_compiled_if_it_is_asked_for(monkeypatch):
    config, asked = load_config("cifar10-cpu", ["synthesize.compile=true"]), []
    monkeypatch.setattr(works, "Voter", lambda net, **settings: asked.append(settings["compile"]))
    reference.require_known(config, "synthesis")
    for compile in (True, False):
        run = unreal_run(with_settings(config, {"synthesize.compile": compile}), None)
        works.our_synthesis(works.synthesis_work(run, 1, 1))
    assert asked == [True, True, False, False]  # IPC 1: a pair


def test_ratio_units_and_memory_of_sides_that_are_known():
    found = compare("nap", {"ours": (sleeper, [0.1]), "reference": (sleeper, [0.3, 400])}, rounds=3)
    assert found.ours.median_s == pytest.approx(0.05, rel=0.3)
    assert 1.8 < found.ratio < 3.5
    assert len(found.ratios) == 3
    assert 350 < found.reference.peak_mib - found.ours.peak_mib < 450


def test_the_ratio_is_the_median_round_s():
    ours, theirs = Timing(0, (1.0, 2.0, 1.0), 50, None), Timing(0, (3.0, 2.0, 5.0), 100, None)
    found = Comparison("thing", ours, theirs)
    assert found.ratios == (3.0, 1.0, 5.0)
    assert (found.ratio, found.memory_ratio) == (3.0, 0.5)


def test_errors_of_a_side_are_raised_and_its_death_is_said():
    side = Side(failing, [CvddError("no such thing")], 1, keep_memory=True)
    with pytest.raises(CvddError, match="no such thing"):
        side.round()
    side.close()
    side = Side(dying, [], 1, keep_memory=True)
    with pytest.raises(CvddError, match="ended with code 7"):
        side.round()
    side.close()


def test_images_become_pil_images_with_their_pixels():
    pixels = random_pixels(2, SIZE)
    first, second = as_pil(pixels)
    assert isinstance(first, Image.Image)
    assert np.array_equal(np.asarray(second).transpose(2, 0, 1), pixels[1])
