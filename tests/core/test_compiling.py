"""Compiled votes are the votes, up to rounding; what cannot be compiled is one line."""

import shutil

import pytest
import torch
from helpers import normal, tiny_net

from cvdd_ray.config import SynthesizeConfig
from cvdd_ray.core.committee import Ballot, Voter
from cvdd_ray.core.compiling import compiled, is_traced
from cvdd_ray.errors import ConfigError, CvddError
from cvdd_ray.stages.grouptask import COMPILE_S, VoterSettings

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="NOT TESTED: compiled votes; there is no g++ or clang++ here"
)


@needs_compiler
def test_a_compiled_vote_is_the_vote_for_every_number_of_jobs(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net = tiny_net(3)
    plain, fast = (Voter(net, bn_weight=0.5, first_bn_multiplier=10.0, compile=compile) for compile in (False, True))
    for num_groups in (1, 2):
        for seed in (num_groups, 5):  # what is compiled is not the values of the first ballot
            ballot = Ballot(normal(seed, num_groups, 4, 3, 10, 10), torch.tensor([[0, 1, 2, seed % 4]] * num_groups))
            ours, theirs = fast.vote(ballot), plain.vote(ballot)
            assert ours.gradient_GBCHW.is_contiguous()
            assert not ours.gradient_GBCHW.requires_grad
            for name, value in vars(theirs).items():
                if value is not None:
                    assert torch.allclose(vars(ours)[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max())), (
                        name
                    )
    assert len(fast._compiled) == 2
    assert not is_traced()


def test_what_cannot_be_compiled_is_one_line():
    def depends_on_values(x):
        return (x * float(x.sum()),)

    with pytest.raises(
        ConfigError, match=r"synthesize\.compile: .*C\+\+ compiler.*synthesize\.compile=false"
    ) as caught:
        compiled(depends_on_values, torch.ones(2))
    assert isinstance(caught.value, CvddError)
    assert "\n" not in str(caught.value)


def test_compiling_is_asked_for_and_waited_for():
    assert "compile" not in SynthesizeConfig().counted()
    assert SynthesizeConfig(compile=True).counted()["compile"] is True
    with pytest.raises(ValueError, match="compile knows votes that match BatchNorm alone"):
        SynthesizeConfig(compile=True, matching={"convolutions": True})
    assert VoterSettings(1, 1).patience_s(7.0) == 7.0
    assert VoterSettings(1, 1, compile=True).patience_s(7.0) == 7.0 + COMPILE_S
