"""``quantize_pack``: float rows to packed rows in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import check_range, quantize_codes
from .checks import check_matrix
from .layout import check_bits, pack_codes, row_words
from .library import register

__all__ = ["quantize_pack", "quantize_pack_reference"]

SCHEMA = "(Tensor x, Tensor scale, Tensor offset, int bits) -> Tensor"


def quantize_pack_reference(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    return pack_codes(quantize_codes(x, scale, offset, bits), bits)


def _fake(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    return x.new_empty((x.size(0), row_words(x.size(1), bits)), dtype=torch.int32)


def _check(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> None:
    check_bits(bits)
    check_matrix(x, "x")
    check_range(scale, offset, *x.shape)


register("quantize_pack", SCHEMA, _fake, _check)


def quantize_pack(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    r"""Quantize and pack ``c = clamp(floor((x - l) / s + 1/2), 0, Q)``.

    Args:
        x: ``[N, F]`` float32.
        scale: Step ``s > 0``: one element, ``[F]`` or ``[N, 1]``, float32.
        offset: Range start ``l``, shaped likewise.
        bits: 1, 2, 4 or 8.

    Returns:
        ``[N, row_words(F, bits)]`` int32 words.  Bitwise the same on every backend.
    """
    return torch.ops.qgnn.quantize_pack(x, scale, offset, bits)
