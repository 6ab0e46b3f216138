r"""``head_linear``: :func:`~..linear.linear` to packed rows, and :func:`~..head_dots.head_dots` of its floats.

What a layer of attention needs of transformed features: the messages and every head's terms of the logits, without a
float matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import linear as product
from ..aggregate import new_output
from ..arithmetic import finish
from ..backend import implementation, is_direct
from ..head_dots import check_vectors, head_dots_reference
from ..library import register

__all__ = ["head_linear", "head_linear_reference", "with_multipliers"]


def head_linear_reference(
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
    y = product.linear_reference(
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, bias,
        multiplier=multiplier,
    )  # fmt: skip
    packed = finish(y, None, False, out_scale, out_offset, out_bits, out_unit=out_unit)
    return *with_multipliers(packed), head_dots_reference(y, vectors, heads)


def with_multipliers(packed: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Packed rows, and their multipliers, none (``[0]``) where the rows have one range."""
    return packed if isinstance(packed, tuple) else (packed, packed.new_empty(0, dtype=torch.uint8))


def _fake(
    x_words: Tensor, w_words: Tensor, vectors: Tensor, heads: int, out_bits: int, out_unit: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x_words.size(0)
    packed = with_multipliers(new_output(x_words, rows, w_words.size(0), out_bits, out_unit))
    return *packed, x_words.new_empty((vectors.size(0), rows, heads), dtype=torch.float32)


def _check(w_words: Tensor, vectors: Tensor, heads: int, out_bits: int, **of_product: Any) -> None:
    if out_bits == 0:
        raise ValueError("Expected packed output of 1, 2, 4 or 8 bits (got 'out_bits' of 0)")
    product.check_product(w_words=w_words, out_bits=out_bits, row_scale=None, addend=None, **of_product)
    check_vectors(vectors, heads, w_words.size(0))


register(head_linear_reference, _fake, _check)


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
    *,
    is_checked: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Packed rows of ``y = x^ w^T + b`` and the dot products ``<y_nh, a_vh>`` of its heads.

    Args:
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, bias, multiplier,
            out_scale, out_offset, out_bits, out_unit, is_checked: As those of :func:`~..linear.linear`.
        vectors: ``[V, O]`` float32.
        heads: ``H``, which divides ``O``.

    Returns:
        ``[N, row_words(O, out_bits)]`` int32; with ``out_unit`` the multipliers of the rows, ``[N]`` uint8, else none,
        ``[0]``; and the dot products, ``[V, N, H]`` float32.  Bitwise the same on every backend.

    Raises:
        TypeError, ValueError: As :func:`~..linear.linear`; without ``out_bits``, or if ``heads`` does not divide ``O``.
    """
    args = (
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, vectors, heads, out_scale,
        out_offset, out_bits, bias, multiplier, out_unit,
    )  # fmt: skip
    if is_checked and x_words.is_cpu and is_direct():
        return implementation("head_linear", "cpu")(*args)
    return torch.ops.qgnn.head_linear.default(*args)
