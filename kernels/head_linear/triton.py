"""``head_linear`` on Triton: the product, then its rows' codes and dot products."""

from __future__ import annotations

from torch import Tensor

from ..head_dots.triton import head_dots
from ..linear.triton import linear
from ..quantize_pack.triton import quantize_pack
from . import with_multipliers

__all__ = ["head_linear"]


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
) -> tuple[Tensor, Tensor, Tensor]:
    y = linear(
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, bias, multiplier=multiplier
    )
    packed = quantize_pack(y, out_scale, out_offset, out_bits, out_unit)
    return *with_multipliers(packed), head_dots(y, vectors, heads)
