"""Votes in other arithmetic than float32: near the float32 ones, with float32 statistics; TF32 of GPUs alone."""

import pytest
import torch
from helpers import normal, tiny_net
from torch import nn

from cvdd_ray.config import SynthesizeConfig
from cvdd_ray.core.batchnorm import MatchingBatchNorm, group_moments
from cvdd_ray.core.committee import Ballot, Voter
from cvdd_ray.core.experts import ExpertSpec
from cvdd_ray.core.precision import require_tf32_device, tensor_cores
from cvdd_ray.core.softlabels import epoch_plans
from cvdd_ray.core.statistics import Matching, MatchingVoter, Recorder, Targets
from cvdd_ray.core.students import StudentSettings, StudentTraining
from cvdd_ray.errors import ConfigError
from cvdd_ray.evaluateconfig import EvaluateConfig
from cvdd_ray.stages.grouptask import VoterSettings
from cvdd_ray.stages.prior import STUDENT
from cvdd_ray.stages.runtime import local_voter

VIEWS, LABELS = normal(2, 2, 6, 3, 12, 12), torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]])


def cosine(a, b):
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


def voters(precision):
    net = tiny_net(3, width=8)
    targets = Targets(Recorder(net, 4)(VIEWS[0], 1)[1][0] + 0.1)
    yield Voter(net, bn_weight=0.5, first_bn_multiplier=10.0, precision=precision), ()
    yield (
        MatchingVoter(
            net, targets, matching=Matching(4, 0.0, 0.0, 0.0), weight=0.5, first_multiplier=10.0, precision=precision
        ),
        (torch.zeros(2, 0), torch.tensor([1, 2])),
    )


def test_votes_in_bfloat16_point_where_those_in_float32_do_and_are_float32():
    for (full, more), (low, _) in zip(voters("float32"), voters("bfloat16"), strict=True):
        exact, near = full.vote(Ballot(VIEWS, LABELS, *more)), low.vote(Ballot(VIEWS, LABELS, *more))
        assert not torch.equal(near.gradient_GBCHW, exact.gradient_GBCHW)
        for g in range(2):
            assert cosine(near.gradient_GBCHW[g], exact.gradient_GBCHW[g]) > 0.99
        assert torch.allclose(near.cross_entropy_G, exact.cross_entropy_G, rtol=0.03)
        assert torch.allclose(near.bn_term_G, exact.bn_term_G, rtol=0.03)
        assert all(part.dtype == torch.float32 for part in vars(near).values() if part is not None)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_of_bfloat16_maps_are_summed_in_float32(layout):
    """bfloat16 has 8 bits: sums in it would be off by percents, and deviations from a mean of 40 would have 2 bits left."""
    x = (normal(1, 32, 3, 16, 16) + 40).bfloat16().contiguous(memory_format=layout)
    for found, exact in zip(group_moments(x, 2), group_moments(x.double(), 2), strict=True):
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), exact, rtol=1e-4)


def test_the_gradient_of_the_moments_is_added_up_in_float32():
    layer, tape = nn.BatchNorm2d(3).eval(), {}
    x = normal(1, 4, 3, 8, 8).bfloat16().requires_grad_(True)
    y = MatchingBatchNorm(layer, 0, tape, [2])(x)
    assert y.dtype == torch.bfloat16
    dy, moments = normal(2, 4, 3, 8, 8).bfloat16(), [normal(3, 2, 3), normal(4, 2, 3)]
    (ours,) = torch.autograd.grad((y, *tape[0]), x, (dy, *moments))
    exact = x.detach().double().requires_grad_(True)
    groups = exact.view(2, 2, 3, 8, 8)
    outputs = layer.double()(exact), groups.mean((1, 3, 4)), groups.var((1, 3, 4), correction=0)
    (theirs,) = torch.autograd.grad(outputs, exact, (dy.double(), *(m.double() for m in moments)))
    assert ours.dtype == torch.bfloat16
    assert torch.allclose(ours.double(), theirs, rtol=2**-8, atol=1e-6)  # rounded once, where terms cancel, too


def test_tf32_is_on_for_the_call_alone():
    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [place.fp32_precision for place in places]
    with tensor_cores("tf32"):
        assert [place.fp32_precision for place in places] == ["tf32", "tf32"]
    assert [place.fp32_precision for place in places] == before
    with pytest.raises(ZeroDivisionError), tensor_cores("tf32"):
        _ = 1 / 0
    assert [place.fp32_precision for place in places] == before
    for other in ("float32", "bfloat16"):
        with tensor_cores(other):
            assert [place.fp32_precision for place in places] == before


def test_tf32_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"got 'tf32'.*CUDA GPUs.*use float32"):
        local_voter(ExpertSpec("resnet18", 4, 32, 0.125, b""), VoterSettings(1, 1, None, "tf32"), torch.device("cpu"))
    require_tf32_device("tf32", torch.device("cuda"))
    for other in ("float32", "bfloat16"):
        require_tf32_device(other, torch.device("cpu"))


def test_a_student_in_bfloat16_learns_as_one_in_float32_with_float32_weights():
    (plan,) = epoch_plans(0, 0, 8, 12, batch_size=8, flip=False, use_cutmix=False, crop_scale=(0.5, 1.0))
    images = normal(1, 8, 3, 12, 12)
    logits, kept = 3 * normal(2, 8, 4), {}
    for precision in ("float32", "bfloat16"):
        settings = StudentSettings(
            epochs=5, batch_size=8, bn_group=4, lr=0.01, weight_decay=0.0, eta=1.0, temperature=2.0, test_every=1,
            precision=precision,
        )  # fmt: skip
        training = StudentTraining(tiny_net(5, width=8), images, settings, 0)
        losses = [training.run_epoch([(plan, logits)])[0] for _ in range(5)]
        kept[precision] = losses
        assert all(value.dtype in (torch.float32, torch.int64) for value in training.student.state_dict().values())
    assert kept["bfloat16"] != kept["float32"]
    assert kept["bfloat16"] == pytest.approx(kept["float32"], rel=0.05)
    assert kept["float32"][-1] < 0.8 * kept["float32"][0]


def test_a_precision_is_part_of_what_is_asked_for_and_the_default_is_not():
    """So that what was made before there was a choice still counts as made."""
    assert "precision" not in SynthesizeConfig().counted() | EvaluateConfig().counted()
    assert SynthesizeConfig(precision="tf32").counted()["precision"] == "tf32"
    assert EvaluateConfig(precision="bfloat16").counted(include=STUDENT)["precision"] == "bfloat16"
