"""``unpack_dequantize``: packed rows to float rows in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import check_range, dequantize_codes
from .layout import check_packed, unpack_codes
from .library import register

__all__ = ["unpack_dequantize", "unpack_dequantize_reference"]

SCHEMA = "(Tensor words, Tensor scale, Tensor offset, int num_features, int bits) -> Tensor"


def unpack_dequantize_reference(
    words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int
) -> Tensor:
    return dequantize_codes(unpack_codes(words, num_features, bits), scale, offset)


def _fake(words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int) -> Tensor:
    return words.new_empty((words.size(0), num_features), dtype=torch.float32)


def _check(words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int) -> None:
    check_packed(words, num_features, bits)
    check_range(scale, offset, words.size(0), num_features)


register("unpack_dequantize", SCHEMA, _fake, _check)


def unpack_dequantize(
    words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int
) -> Tensor:
    r"""Unpack ``[N, row_words(F, bits)]`` words and dequantize, ``x^ = c s + l``, into ``[N, F]``
    float32.

    ``scale`` and ``offset`` have one element, ``[F]`` or ``[N, 1]``.  Bitwise the same on every
    backend.
    """
    return torch.ops.qgnn.unpack_dequantize(words, scale, offset, num_features, bits)
