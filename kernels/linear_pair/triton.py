"""``linear_pair`` on Triton: both products in one kernel where it can keep the weights of both, else one that adds the
other's floats.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layout import row_words
from ..linear import Product
from ..linear.triton import linear, multiply, pair_tiles
from ..triton.launch import config_for

__all__ = ["linear_pair"]


def linear_pair(
    x2_words: Tensor,
    w2_words: Tensor,
    x2_scale: Tensor,
    x2_offset: Tensor,
    w2_scale: Tensor,
    w2_offset: Tensor,
    in_features2: int,
    x2_bits: int,
    w2_bits: int,
    bias2: Tensor | None,
    multiplier2: Tensor | None,
    relu: bool,
    out_scale: Tensor | None,
    out_offset: Tensor | None,
    out_bits: int,
    out_unit: Tensor | None,
    **product: Any,
) -> Any:
    first = Product(**product)
    second = Product(
        x2_words, w2_words, x2_scale, x2_offset, w2_scale, w2_offset, in_features2, x2_bits, w2_bits, bias2, multiplier2
    )
    to: dict[str, Any] = {
        "relu": relu, "out_scale": out_scale, "out_offset": out_offset, "out_bits": out_bits, "out_unit": out_unit,
    }  # fmt: skip
    inputs = [(p.in_features, p.x_bits) for p in (first, second)]
    config = config_for("linear_pair", x2_words.device, row_words(*inputs[0]))
    if not pair_tiles(config, inputs, w2_words.size(0), out_bits, out_unit is not None):
        return linear(**product, addend=linear(**second._asdict()), **to)
    out, times, _ = multiply(first, other=second, **to)
    return out if times is None else (out, times)
