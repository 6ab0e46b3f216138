"""``head_linear`` on Triton: the product with its rows' codes and dot products, or one after the other where rows of
other sizes make a program's columns irregular.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..head_dots.triton import head_dots
from ..linear import Product
from ..linear.triton import has_heads, linear, multiply
from ..quantize_pack.triton import quantize_pack
from . import with_multipliers

__all__ = ["head_linear"]


def head_linear(
    w_words: Tensor,
    in_features: int,
    x_bits: int,
    vectors: Tensor,
    heads: int,
    out_scale: Tensor,
    out_offset: Tensor,
    out_bits: int,
    out_unit: Tensor | None,
    **product: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    to: dict[str, Any] = {"out_scale": out_scale, "out_offset": out_offset, "out_bits": out_bits}
    product.update(w_words=w_words, in_features=in_features, x_bits=x_bits)
    if has_heads(in_features, x_bits, w_words.size(0), out_bits, heads, vectors.size(0)):
        words, times, dots = multiply(Product(**product), **to, out_unit=out_unit, vectors=vectors, heads=heads)
        assert dots is not None
        return *with_multipliers(words if times is None else (words, times)), dots
    y = linear(**product)
    packed = quantize_pack(y, out_scale, out_offset, out_bits, out_unit)
    return *with_multipliers(packed), head_dots(y, vectors, heads)
