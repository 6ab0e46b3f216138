"""``linear_pair`` in operations that ONNX has."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..linear.onnx import linear


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
    **first: Any,
) -> Any:
    other = linear(
        x2_words, w2_words, x2_scale, x2_offset, w2_scale, w2_offset, in_features2, x2_bits, w2_bits,
        multiplier=multiplier2, bias=bias2,
    )  # fmt: skip
    return linear(**first, addend=other)
