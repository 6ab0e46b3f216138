"""``linear_pair`` on the CPU: one product, whose floats the other adds."""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..linear.cpu import linear

__all__ = ["linear_pair"]


def linear_pair(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    bias: Tensor | None,
    multiplier: Tensor | None,
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
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    out_unit: Tensor | None = None,
) -> Any:
    other = linear(
        x2_words, w2_words, x2_scale, x2_offset, w2_scale, w2_offset, in_features2, x2_bits, w2_bits, bias2,
        multiplier=multiplier2,
    )  # fmt: skip
    return linear(
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, bias, relu, out_scale,
        out_offset, out_bits, None, other, multiplier, out_unit,
    )  # fmt: skip
