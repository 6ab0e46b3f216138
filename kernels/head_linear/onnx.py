"""``head_linear`` in operations that ONNX has."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..head_dots import head_dots_reference
from ..linear.onnx import linear
from ..onnx import finish
from . import with_multipliers


def head_linear(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    vectors: Tensor,
    heads: int,
    out_scale: Tensor,
    out_offset: Tensor,
    out_bits: int,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    y = linear(
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, bias, multiplier=multiplier
    )
    packed = finish(y, None, False, out_scale, out_offset, out_bits, out_unit=out_unit)
    return *with_multipliers(packed), head_dots_reference(y, vectors, heads)
