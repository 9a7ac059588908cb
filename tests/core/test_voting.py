"""Who votes and with what weight: the spec's measured tables (5.5, 5.6, 6.2) and check 7."""

import itertools
from collections import Counter

import pytest
import torch

from cvdd_ray.core.voting import prior_weights, voter_weights, voters_of_image
from cvdd_ray.errors import ConfigError

R18, R50, SV, MB, D121 = EXPERTS = ("resnet18", "resnet50", "shufflenet_v2", "mobilenet_v2", "densenet121")
PRIORS = {  # the published code's, in percent (spec section 3)
    "cifar10": dict(zip(EXPERTS, (63, 65.3, 68.5, 67.6, 67.4), strict=True)),
    "cifar100": dict(zip(EXPERTS, (64, 60.6, 51.6, 59.4, 56.4), strict=True)),
    "tiny": dict(zip(EXPERTS, (46.5, 28.3, 43.6, 44.8, 41.5), strict=True)),
    "nette": dict(zip(EXPERTS, (62.4, 52, 57.2, 54, 60.8), strict=True)),
    "imagenet1k": dict(zip(EXPERTS, (56.4, 42.3, 52.5, 44.2, 40.6), strict=True)),
}
PAIR_WEIGHTS = {  # first model's weight at T=5; order of the IPC-10 list (spec 5.5)
    "cifar10": (0.387, 0.250, 0.285, 0.293, 0.345, 0.387, 0.397, 0.545, 0.555, 0.510),
    "cifar100": (0.664, 0.923, 0.715, 0.821, 0.858, 0.560, 0.699, 0.174, 0.277, 0.646),
    "tiny": (0.974, 0.641, 0.584, 0.731, 0.045, 0.036, 0.067, 0.440, 0.604, 0.659),
    "nette": (0.889, 0.739, 0.843, 0.579, 0.261, 0.401, 0.147, 0.655, 0.327, 0.204),
    "imagenet1k": (0.944, 0.686, 0.920, 0.959, 0.115, 0.406, 0.584, 0.840, 0.915, 0.673),
}
TEACHER_WEIGHTS = {  # T=10 (spec 6.2)
    "cifar10": (0.140, 0.177, 0.243, 0.222, 0.218),
    "cifar100": (0.323, 0.230, 0.093, 0.204, 0.151),
    "tiny": (0.298, 0.048, 0.223, 0.251, 0.181),
    "nette": (0.309, 0.109, 0.184, 0.134, 0.264),
    "imagenet1k": (0.413, 0.101, 0.280, 0.122, 0.085),
}
PAIRS = [
    (R18, R50), (R18, SV), (R18, MB), (R18, D121), (R50, SV),
    (R50, MB), (R50, D121), (SV, MB), (SV, D121), (MB, D121),
]  # fmt: skip


def voters(image_index, ipc, *, selection="auto", size=2, fixed=None, seed=0, dataset="cifar100"):
    return voters_of_image(
        EXPERTS,
        PRIORS[dataset],
        size=size,
        selection=selection,
        fixed=fixed,
        ipc=ipc,
        image_index=image_index,
        seed=seed,
    )


# --- weights -------------------------------------------------------------------------------------------------------


def test_reference_weights():
    assert prior_weights([64, 60.6], 5) == pytest.approx((0.6637, 0.3363), abs=5e-5)
    five = prior_weights([PRIORS["cifar100"][name] for name in EXPERTS], 10)
    assert five == pytest.approx((0.3226, 0.2296, 0.0933, 0.2036, 0.1509), abs=5e-5)


@pytest.mark.parametrize("dataset", PRIORS)
def test_weights_of_every_dataset_are_those_of_the_spec(dataset):
    priors = PRIORS[dataset]
    firsts = [prior_weights([priors[one], priors[other]], 5)[0] for one, other in PAIRS]
    assert firsts == pytest.approx(PAIR_WEIGHTS[dataset], abs=6e-4)
    teachers = prior_weights([priors[name] for name in EXPERTS], 10)
    assert teachers == pytest.approx(TEACHER_WEIGHTS[dataset], abs=6e-4)


def test_weights_sum_to_one_ignore_a_constant_and_become_equal_when_hot():
    weights = prior_weights([64, 60.6, 12.5], 5)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert prior_weights([164, 160.6, 112.5], 5) == pytest.approx(weights, rel=1e-12)
    assert prior_weights([64, 60.6, 12.5], 1e9) == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert prior_weights([64, 60.6, 12.5], 1e-3) == pytest.approx([1, 0, 0], abs=1e-12)
    assert prior_weights([5000.0, 1.0], 1) == pytest.approx((1, 0))  # without overflow


def weigh(weighting, image_index=0, seed=0, names=(R18, SV)):
    return voter_weights(
        names, PRIORS["cifar100"], weighting=weighting, temperature=5, image_index=image_index, seed=seed
    )


def test_prior_weights_follow_the_voters_and_equal_ones_do_not():
    assert weigh("prior") == pytest.approx((0.923, 0.077), abs=6e-4)
    assert weigh("prior", names=(SV, R18)) == pytest.approx((0.077, 0.923), abs=6e-4)
    assert weigh("equal", names=EXPERTS) == pytest.approx([0.2] * 5)


def test_random_weights_are_drawn_once_per_image_index():
    drawn = [weigh("random", image_index=i, names=EXPERTS) for i in range(20)]
    assert drawn == [weigh("random", image_index=i, names=EXPERTS) for i in range(20)]
    assert len(set(drawn)) == 20
    assert all(sum(weights) == pytest.approx(1, abs=1e-12) and min(weights) > 0 for weights in drawn)
    assert drawn[0] != weigh("random", seed=1, names=EXPERTS)
    means = torch.tensor([weigh("random", image_index=i) for i in range(2000)]).mean(0)
    assert means.tolist() == pytest.approx([0.5, 0.5], abs=0.02)


# --- committee schedule --------------------------------------------------------------------------------------------


def test_ipc_10_lets_every_pair_vote_once_in_the_published_order():
    schedule = [voters(i, 10) for i in range(10)]
    assert schedule == PAIRS
    assert len({frozenset(pair) for pair in schedule}) == 10
    assert Counter(itertools.chain(*schedule)) == dict.fromkeys(EXPERTS, 4)


def test_smaller_sets_take_the_first_pairs():
    assert [voters(i, 5) for i in range(5)] == PAIRS[:5]


def test_triples_are_all_distinct():
    schedule = [voters(i, 10, size=3) for i in range(10)]
    assert len({frozenset(triple) for triple in schedule}) == 10
    assert Counter(itertools.chain(*schedule)) == dict.fromkeys(EXPERTS, 6)


@pytest.mark.parametrize(
    ("dataset", "fixed", "pair"),
    [
        ("cifar10", (MB, D121), (MB, D121)),
        ("nette", (D121, MB), (MB, D121)),  # committee order, whatever the order of the list
        ("cifar100", (SV, MB), (SV, MB)),
        ("tiny", None, (R18, MB)),
        ("imagenet1k", None, (R18, SV)),
    ],
)
def test_ipc_1_pairs(dataset, fixed, pair):
    assert voters(0, 1, fixed=fixed, dataset=dataset) == pair


def test_top_takes_the_highest_priors_in_committee_order():
    assert voters(3, 50, selection="top", dataset="cifar10") == (SV, MB)
    assert voters(3, 50, selection="top", size=3, dataset="cifar10") == (SV, MB, D121)


def test_ipc_50_pairs_come_from_the_seed_and_the_index_alone():
    fifty = [voters(i, 50) for i in range(50)]
    assert fifty == [voters(i, 50) for i in reversed(range(50))][::-1]
    assert all(pair in PAIRS for pair in fifty)
    assert fifty != [voters(i, 50, seed=1) for i in range(50)]
    assert fifty != [PAIRS[i % 10] for i in range(50)]  # drawn, not enumerated
    assert [voters(i, 20) for i in range(20)] == fifty[:20]  # more images do not change the first ones


def test_random_pairs_are_uniform():
    counts = Counter(voters(i, 5000, selection="random") for i in range(5000))
    assert set(counts) == set(PAIRS)
    assert all(abs(count - 500) < 110 for count in counts.values())  # 5 standard deviations


def test_adding_images_does_not_change_the_first_ones_votes_when_drawn():
    assert [voters(i, 10, selection="random") for i in range(10)] == [
        voters(i, 50, selection="random") for i in range(10)
    ]


def test_enumeration_starts_again_after_the_last_pair():
    assert [voters(i, 50, selection="enumerate") for i in (10, 23)] == [PAIRS[0], PAIRS[3]]


def test_a_lone_voter():
    alone = voters_of_image(
        (R18,), {R18: 0.0}, size=1, selection="auto", fixed=None, ipc=10, image_index=4, seed=0
    )  # fmt: skip
    assert alone == (R18,)
    assert prior_weights([0.0], 5) == (1.0,)


def test_impossible_votes_are_refused():
    with pytest.raises(ConfigError, match=r"size.*6.*5 experts"):
        voters(0, 10, size=6)
    with pytest.raises(ConfigError, match="resnet101"):
        voters(0, 1, fixed=(R18, "resnet101"))
