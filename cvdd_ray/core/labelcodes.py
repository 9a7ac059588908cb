"""How an image's soft label is put into few numbers and taken out again.

Legend: N images, K classes, k classes that are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DROPPED = -1e30
"""Logit of a class that was dropped: its probability is 0 at any temperature. Finite, so that it adds p (log p - log q) = 0
to the divergence, and not the nan that -inf would add."""

LARGEST_CODE = 127  # of an int8 logit; the smallest is -127


@dataclass(frozen=True)
class LabelEncoding:
    """What is kept of an image's K logits, see `config.RelabelConfig`: the `top_k` largest (None: all) in `precision`
    float16 or int8; the other classes are dropped or, with tail `spread`, share their mean logit."""

    precision: str = "float16"
    top_k: int | None = None
    tail: str = "drop"

    def parts(self, num_classes: int) -> dict[str, tuple[int, str]]:
        """Return (numbers per image, their type) of everything that is stored, by name."""
        kept = self.top_k or num_classes
        found = {"logits": (kept, self.precision)}
        if self.top_k:
            found["classes"] = (kept, np.min_scalar_type(num_classes - 1).name)
            if self.tail == "spread":
                found["tail"] = (1, "float16")
        if self.precision == "int8":
            found |= {"scale": (1, "float16"), "offset": (1, "float16")}
        return found

    def image_bytes(self, num_classes: int) -> int:
        """Return the bytes of an image's label."""
        return sum(count * np.dtype(kind).itemsize for count, kind in self.parts(num_classes).values())


def encode_logits(logits_NK: Tensor, encoding: LabelEncoding) -> dict[str, Tensor]:
    """Return the parts of `LabelEncoding.parts`, a row per image; `classes` as int64, the largest logit first.

    An int8 logit is round((logit - offset) / scale) with scale and offset of the image's own kept logits, as they are
    stored: decoded it is off by half a scale at most, and by what float16 makes of the offset. Of equal logits the lower
    class is kept.
    """
    kept_Nk, parts = logits_NK.float(), {}
    if encoding.top_k:
        k, ordered = encoding.top_k, kept_Nk.sort(dim=1, descending=True, stable=True)
        kept_Nk, parts["classes"] = ordered.values[:, :k], ordered.indices[:, :k]
        if encoding.tail == "spread":
            parts["tail"] = ordered.values[:, k:].mean(1, keepdim=True).half()
    if encoding.precision == "float16":
        return {"logits": kept_Nk.half(), **parts}
    high_N1, low_N1 = kept_Nk.amax(1, keepdim=True), kept_Nk.amin(1, keepdim=True)
    offset_N1, scale_N1 = ((high_N1 + low_N1) / 2).half(), ((high_N1 - low_N1) / (2 * LARGEST_CODE)).half()
    steps_Nk = ((kept_Nk - offset_N1.float()) / scale_N1.float()).nan_to_num(0.0)  # 0 / 0 where all are equal
    codes_Nk = steps_Nk.round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
    return {"logits": codes_Nk, **parts, "scale": scale_N1, "offset": offset_N1}


def decode_logits(parts: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """Return logits_NK (float32) of parts by name, a row per image (`encode_logits`). Classes without a logit of their own
    have DROPPED or, where there is a `tail`, their mean."""
    kept_Nk = parts["logits"].float()
    if "scale" in parts:
        kept_Nk = kept_Nk * parts["scale"].float() + parts["offset"].float()
    if "classes" not in parts:
        return kept_Nk
    others_N1 = parts["tail"].float() if "tail" in parts else kept_Nk.new_full((len(kept_Nk), 1), DROPPED)
    return others_N1.repeat(1, num_classes).scatter_(1, parts["classes"].long(), kept_Nk)
