"""``quantize_pack``: float rows to packed rows in one pass."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import check_range, check_unit, finish
from ..backend import implementation, is_direct
from ..checks import check_matrix
from ..layout import check_bits, row_words
from ..library import register

__all__ = ["pack_mapped", "quantize_pack", "quantize_pack_reference"]


def quantize_pack_reference(x: Tensor, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None = None) -> Any:
    return finish(x, None, out_scale=scale, out_offset=offset, out_bits=bits, out_unit=unit)


def _fake(x: Tensor, bits: int, unit: Tensor | None) -> Any:
    words = x.new_empty((x.size(0), row_words(x.size(1), bits)), dtype=torch.int32)
    return words if unit is None else (words, x.new_empty(x.size(0), dtype=torch.uint8))


def _check(x: Tensor, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None) -> None:
    check_bits(bits)
    check_matrix(x, "x")
    check_range(scale, offset, *x.shape)
    check_unit(unit, scale, offset, bits)


register(quantize_pack_reference, _fake, _check, rows="unit")


def quantize_pack(
    x: Tensor, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None = None, *, is_checked: bool = False
) -> Any:
    r"""Quantize and pack ``c = clamp(floor((x - l) / s + 1/2), 0, Q)``.

    Args:
        x: ``[N, F]`` float32.
        scale: Step ``s > 0``: one element, ``[F]`` or ``[N, 1]``, float32.
        offset: Range start ``l``, shaped likewise.
        bits: 1, 2, 4 or 8.
        unit: What row multipliers count, ``p``, one element, float32: row ``i`` has the range ``(s m_i, l m_i)`` with
            ``m_i = clamp(ceil(max_f |x_if| / p), 1, 15)``.  Not with a range per row.
        is_checked: As that of :func:`~qgnn_plugin.kernels.linear.linear`.

    Returns:
        ``[N, row_words(F, bits)]`` int32 words; with ``unit`` a pair, the words and the multipliers, ``[N]`` uint8.
        Bitwise the same on every backend.

    Raises:
        TypeError: If an argument has another dtype.
        ValueError: If one has another shape, or is on another device, or if ``unit`` comes with a range per row.
    """
    if is_checked and x.is_cpu and is_direct():
        return implementation("quantize_pack", "cpu")(x, scale, offset, bits, unit)
    if unit is None:
        return torch.ops.qgnn.quantize_pack.default(x, scale, offset, bits)
    return torch.ops.qgnn.quantize_pack.rows(x, scale, offset, bits, unit)


def pack_mapped(
    x: Tensor, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None, factor: Tensor | None,
    term: Tensor | None, relu: bool,
) -> Any:  # fmt: skip
    """:func:`quantize_pack` of ``x * factor + term`` by column (``[F]`` each, or neither), with ``relu`` no less than
    0; ``x`` may be written over.
    """
    if x.is_cpu and is_direct():
        module = importlib.import_module(f"{__package__}.cpu")
        return module.pack_scaled(x, None, scale, offset, bits, unit, factor, term, relu)
    if factor is not None and term is not None:
        x = x.mul_(factor).add_(term)
    return quantize_pack(x.relu_() if relu else x, scale, offset, bits, unit, is_checked=True)
