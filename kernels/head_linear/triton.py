"""``head_linear`` on Triton: the product, then its rows' codes and dot products."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..head_dots.triton import head_dots
from ..linear.triton import linear
from ..quantize_pack.triton import quantize_pack
from . import with_multipliers

__all__ = ["head_linear"]


def head_linear(
    vectors: Tensor,
    heads: int,
    out_scale: Tensor,
    out_offset: Tensor,
    out_bits: int,
    out_unit: Tensor | None,
    **product: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    y = linear(**product)
    packed = quantize_pack(y, out_scale, out_offset, out_bits, out_unit)
    return *with_multipliers(packed), head_dots(y, vectors, heads)
