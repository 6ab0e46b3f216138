"""``unpack_dequantize``: packed rows to float rows in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import check_multiplier, check_range, dequantize_codes, multiplied
from ..backend import implementation, is_direct
from ..layout import check_packed, unpack_codes
from ..library import register

__all__ = ["unpack_dequantize", "unpack_dequantize_reference"]


def unpack_dequantize_reference(
    words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int, multiplier: Tensor | None = None
) -> Tensor:
    if multiplier is not None:
        scale, offset = multiplied(scale, offset, multiplier)
    return dequantize_codes(unpack_codes(words, num_features, bits), scale, offset)


def _fake(words: Tensor, num_features: int) -> Tensor:
    return words.new_empty((words.size(0), num_features), dtype=torch.float32)


def _check(
    words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int, multiplier: Tensor | None
) -> None:
    check_packed(words, num_features, bits)
    check_range(scale, offset, words.size(0), num_features)
    check_multiplier(multiplier, scale, offset, words.size(0))


register(unpack_dequantize_reference, _fake, _check)


def unpack_dequantize(
    words: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    multiplier: Tensor | None = None,
    *,
    is_checked: bool = False,
) -> Tensor:
    r"""Unpack and dequantize, ``x^ = c s + l``.

    Args:
        words: ``[N, row_words(F, bits)]`` int32.
        scale: Step ``s``: one element, ``[F]`` or ``[N, 1]``, float32.
        offset: Range start ``l``, shaped likewise.
        num_features: ``F``.
        bits: 1, 2, 4 or 8.
        multiplier: ``[N]`` uint8: row ``i`` has the range ``(s m_i, l m_i)``.  Not with a range per row.
        is_checked: As that of :func:`~qgnn_plugin.kernels.linear.linear`.

    Returns:
        ``[N, F]`` float32.  Bitwise the same on every backend.

    Raises:
        TypeError: If an argument has another dtype.
        ValueError: If one has another shape, or is on another device.
    """
    if is_checked and words.is_cpu and is_direct():
        return implementation("unpack_dequantize", "cpu")(words, scale, offset, num_features, bits, multiplier)
    return torch.ops.qgnn.unpack_dequantize.default(words, scale, offset, num_features, bits, multiplier)
