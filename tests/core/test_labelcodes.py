"""Labels in few numbers: by hand, and what students make of classes that were left out."""

import pytest
import torch
from helpers import normal
from torch.nn import functional as F

from cvdd_ray.core.labelcodes import DROPPED, LabelEncoding, decode_logits, encode_logits
from cvdd_ray.core.students import kd_loss

N, K = 50, 20
INT8, TOP, SPREAD = LabelEncoding("int8"), LabelEncoding(top_k=3), LabelEncoding(top_k=3, tail="spread")


def there_and_back(logits_NK, encoding):
    return decode_logits(encode_logits(logits_NK, encoding), logits_NK.shape[1])


def test_float16_is_the_half_of_every_logit():
    logits = 20 * normal(0, N, K)
    parts = encode_logits(logits, LabelEncoding())
    assert set(parts) == {"logits"}
    assert parts["logits"].dtype == torch.float16
    assert torch.equal(decode_logits(parts, K), logits.half().float())


def test_int8_by_hand():
    """From -3 to 5.128: offset 1.0635... as float16, scale 8.128 / 254 = 0.032; 0 is code round(-1.064 / 0.032) = -33."""
    parts = encode_logits(torch.tensor([[-3.0, 0.0, 5.128], [7.0, 7.0, 7.0]]), INT8)
    assert parts["logits"].dtype == torch.int8
    assert parts["logits"].tolist() == [[-127, -33, 127], [0, 0, 0]]
    assert parts["scale"].flatten().tolist() == pytest.approx([0.032, 0.0], rel=1e-3)
    assert parts["offset"].flatten().tolist() == pytest.approx([1.064, 7.0], rel=1e-3)
    assert decode_logits(parts, 3)[0].tolist() == pytest.approx([-3.0, 1.064 - 33 * 0.032, 5.128], abs=5e-3)
    assert decode_logits(parts, 3)[1].tolist() == [7.0, 7.0, 7.0]


@pytest.mark.parametrize(("factor", "shift"), [(5.0, 0.0), (0.01, 30.0), (1e-7, 0.0), (100.0, -50.0)])
def test_int8_is_off_by_half_a_step_and_what_float16_makes_of_the_offset(factor, shift):
    logits = factor * normal(1, N, K) + shift
    parts = encode_logits(logits, INT8)
    offset, step = parts["offset"].float(), (logits.amax(1) - logits.amin(1))[:, None] / 254
    error = (decode_logits(parts, K) - logits).abs()
    assert bool((error <= 0.51 * step + offset.abs() * 2**-11 + 2**-18).all())
    if factor > 1:
        assert float((error / step).max()) > 0.4  # and no finer than that


def test_what_is_not_a_number_is_not_made_one():
    logits = normal(2, 2, K)
    logits[0, 3] = float("nan")
    decoded = there_and_back(logits, INT8)
    assert bool(decoded[0].isnan().all())
    assert bool(decoded[1].isfinite().all())


def test_the_largest_by_hand():
    logits = torch.tensor([[1.0, 5.0, 3.0, 5.0, -2.0], [9.0, 0.0, 0.0, 0.0, 4.0]])
    parts = encode_logits(logits, LabelEncoding(top_k=2))
    assert parts["classes"].tolist() == [[1, 3], [0, 4]]
    assert parts["logits"].tolist() == [[5.0, 5.0], [9.0, 4.0]]
    assert decode_logits(parts, 5).tolist()[1] == pytest.approx([9.0, DROPPED, DROPPED, DROPPED, 4.0])
    spread = encode_logits(logits, LabelEncoding(top_k=2, tail="spread"))
    assert spread["tail"].flatten().tolist() == pytest.approx([2 / 3, 0.0], rel=1e-3)
    decoded = decode_logits(spread, 5)
    assert decoded[0].tolist() == pytest.approx([2 / 3, 5, 2 / 3, 5, 2 / 3], rel=1e-3)
    assert decoded[1].tolist() == [9.0, 0.0, 0.0, 0.0, 4.0]
    ties = encode_logits(torch.zeros(1, 5), LabelEncoding(top_k=2))
    assert ties["classes"].tolist() == [[0, 1]]


def test_int8_levels_are_those_of_the_kept_logits_alone():
    logits = normal(3, N, K)
    logits[:, 0] = -1000.0  # of no consequence for the others' precision
    decoded = there_and_back(logits, LabelEncoding("int8", 3))
    kept = decoded > DROPPED
    assert kept.sum(1).tolist() == [3] * N
    assert float((decoded - logits)[kept].abs().max()) < 0.01


@pytest.mark.parametrize("temperature", [0.5, 20.0, 1000.0])
def test_dropped_classes_have_no_probability_and_the_rest_all_of_it(temperature):
    logits = (8 * normal(4, N, K)).half().float()
    soft = F.softmax(there_and_back(logits, TOP) / temperature, 1)
    values, classes = logits.sort(dim=1, descending=True)
    expected = torch.zeros(N, K).scatter_(1, classes[:, :3], F.softmax(values[:, :3] / temperature, 1))
    torch.testing.assert_close(soft, expected, rtol=1e-5, atol=1e-7)
    assert int((soft == 0).sum()) >= N * (K - 3)


def test_a_spread_tail_keeps_the_shares_at_a_high_temperature():
    """Mean of the rest: exact to first order in 1 / T, where a dropped tail takes all that the rest has."""
    logits = 3 * normal(5, N, K)

    def off(encoding, temperature):
        soft = [F.softmax(z / temperature, 1) for z in (logits, there_and_back(logits, encoding))]
        return float((soft[0] - soft[1]).abs().sum(1).mean() / 2)

    assert off(TOP, 20.0) > 0.7
    assert off(SPREAD, 20.0) < 0.06
    assert off(SPREAD, 40.0) == pytest.approx(off(SPREAD, 20.0) / 2, rel=0.1)


@pytest.mark.parametrize("temperature", [0.5, 20.0, 1000.0])
def test_kd_loss_with_dropped_classes_is_that_of_the_kept_ones(temperature):
    """In float64 against plain torch over the kept classes; the gradient is (q - p) / (T B), with p = 0 where dropped."""
    teacher = there_and_back(8 * normal(6, N, K), TOP).double()
    student = (8 * normal(7, N, K, dtype=torch.float64)).requires_grad_(True)
    kept = teacher > DROPPED
    p = F.softmax(teacher[kept].view(N, 3) / temperature, 1)
    log_q = F.log_softmax(student / temperature, 1)[kept].view(N, 3)
    expected = (p * (p.log() - log_q)).sum() / N
    loss = kd_loss(student, teacher, temperature)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (gradient,), (wanted,) = (torch.autograd.grad(x, student) for x in (loss, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-15)
    q = F.softmax(student.detach() / temperature, 1)
    torch.testing.assert_close(gradient[~kept], q[~kept] / (temperature * N), rtol=1e-10, atol=1e-15)
    single = kd_loss(student.detach().float(), teacher.float(), temperature)
    assert float(single) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.parametrize(
    ("num_classes", "encoding", "parts", "num_bytes"),
    [
        (1000, LabelEncoding(), {"logits": (1000, "float16")}, 2000),
        (10, LabelEncoding("int8"), {"logits": (10, "int8"), "scale": (1, "float16"), "offset": (1, "float16")}, 14),
        (256, LabelEncoding(top_k=5), {"logits": (5, "float16"), "classes": (5, "uint8")}, 15),
        (257, LabelEncoding(top_k=5), {"logits": (5, "float16"), "classes": (5, "uint16")}, 20),
        (
            1000,
            LabelEncoding("int8", 10, "spread"),
            {"logits": (10, "int8"), "classes": (10, "uint16"), "tail": (1, "float16"), "scale": (1, "float16"),
             "offset": (1, "float16")},
            36,
        ),
    ],
)  # fmt: skip
def test_parts_and_bytes_of_an_image(num_classes, encoding, parts, num_bytes):
    assert encoding.parts(num_classes) == parts
    assert encoding.image_bytes(num_classes) == num_bytes
    made = encode_logits(normal(8, 4, num_classes), encoding)
    assert {name: tensor.shape for name, tensor in made.items()} == {name: (4, n) for name, (n, _) in parts.items()}
