"""The shared end of every kernel: affine step, scales, bias, ReLU, then float rows or packed rows.

Each operation is one float32 rounding, in the order of :mod:`..arithmetic`.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER, is_per_row, multiplied
from ..layout import parts_per_byte, row_words
from . import jit
from .memory import empty
from .simd import (
    peek,
    poke,
    raw,
    vabs,
    vcast,
    vload,
    vload_first,
    vmax,
    vmin,
    vsplat,
    vstore,
    vstore_first,
    vstream,
    vtop,
    vview,
)

__all__ = [
    "GROUP",
    "Epilogue",
    "code_pitch",
    "epilogue",
    "finish_rows",
    "pack_row",
    "quantize_group",
]

GROUP = 16  # features per step
PACK_BYTES = 64  # bytes of a packed row per step
STREAM_BYTES = 1 << 24  # results beyond this size are written past the caches

SCALE, OFFSET, TERM, BIAS, INVERSE, LOW = range(6)  # rows of ``columns``
# Bits of ``flags``:
HAS_DST, HAS_TERM, HAS_BIAS, ROW_RANGE, STREAM, HAS_ROW_SCALE, HAS_ADDEND, HAS_UNIT = 1, 2, 4, 8, 16, 32, 64, 128


class Epilogue(NamedTuple):
    """What follows an accumulation ``acc`` with a coefficient per row, in the form kernels take.

    ``y = acc * scale + coefficient * offset``, ``y *= dst``, ``y += term * row_term``, ``y +=
    bias``, ``y += addend``, ``y = max(floor, y)``, ``y *= row_scale``, then quantization with the inverse step and
    start of the output range.
    """

    columns: np.ndarray  # [6, ceil16(F)] float32
    dst: np.ndarray  # [N] float32 or empty, as the next four
    row_term: np.ndarray
    row_inverse: np.ndarray
    row_low: np.ndarray
    row_scale: np.ndarray
    addend: np.ndarray  # [N, F] float32, flat, or empty
    flags: int
    floor: float
    width: int
    bits: int  # of packed output, 0 for float32
    out: np.ndarray  # flat float32, empty for packed output
    packed: np.ndarray  # flat int32, empty for float32 output
    # Of packed rows with multipliers:
    multiplier: np.ndarray  # [N] uint8, a result; empty without
    unit_inverse: np.float32
    steps: np.ndarray  # [16, 2, 16 or ceil16(F)] float32: inverse step and start of the range that m makes


_EMPTY = np.empty(0, np.float32)


def flat(tensor: Tensor | None) -> np.ndarray:
    """The elements of a tensor as a flat array; empty for :obj:`None`."""
    return _EMPTY if tensor is None else tensor.detach().contiguous().view(-1).numpy()


def epilogue(
    rows: int,
    width: int,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    dst_scale: Tensor | None = None,
    term: Tensor | None = None,
    row_term: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> tuple[Any, Epilogue]:
    """Allocate the result and gather its epilogue; without ``scale`` the affine step is skipped.

    With ``out_unit`` the result is a pair, the words and the multipliers of their rows.
    """
    if out_bits:
        out = empty((rows, row_words(width, out_bits)), torch.int32)
    else:
        out = empty((rows, width), torch.float32)
    columns = torch.zeros((6, -(-width // GROUP) * GROUP), dtype=torch.float32)
    columns[SCALE, :width] = 1 if scale is None else scale.reshape(-1)
    flags = HAS_DST * (dst_scale is not None) + HAS_TERM * (term is not None)
    flags += HAS_BIAS * (bias is not None) + HAS_ROW_SCALE * (row_scale is not None)
    flags += HAS_ADDEND * (addend is not None)
    for index, value in ((OFFSET, offset), (TERM, term), (BIAS, bias)):
        if value is not None:
            columns[index, :width] = value.detach().reshape(-1)
    row_inverse = row_low = multipliers = None
    unit_inverse, steps = np.float32(0), _EMPTY
    if out_unit is not None:
        assert out_scale is not None
        assert out_offset is not None
        flags |= HAS_UNIT
        multipliers = empty((rows,), torch.uint8) if width else torch.ones(rows, dtype=torch.uint8)
        unit_inverse = np.float32(out_unit.reshape(1).reciprocal().item())
        steps = _steps(out_scale.detach(), out_offset.detach(), columns.size(1))
    elif out_bits:
        assert out_scale is not None
        assert out_offset is not None
        inverse = out_scale.detach().reciprocal()
        if is_per_row(out_scale) or is_per_row(out_offset):
            flags |= ROW_RANGE
            row_inverse, row_low = inverse.expand(rows, 1), out_offset.detach().expand(rows, 1)
        else:
            columns[INVERSE, :width] = inverse.reshape(-1)
            columns[LOW, :width] = out_offset.detach().reshape(-1)
    elif width % GROUP == 0 and out.data_ptr() % 64 == 0 and 4 * out.numel() >= STREAM_BYTES:
        flags |= STREAM
    spec = Epilogue(
        columns.numpy(),
        flat(dst_scale),
        flat(row_term),
        flat(row_inverse),
        flat(row_low),
        flat(row_scale),
        flat(addend),
        flags,
        0.0 if relu else -np.inf,
        width,
        out_bits,
        _EMPTY if out_bits else flat(out),
        flat(out) if out_bits else np.empty(0, np.int32),
        np.empty(0, np.uint8) if multipliers is None else flat(multipliers),
        unit_inverse,
        steps,
    )
    return (out if multipliers is None else (out, multipliers)), spec


def _steps(scale: Tensor, offset: Tensor, stretch: int) -> np.ndarray:
    """Inverse step and start of each multiplier's range, ``[16, 2, GROUP or stretch]``; columns that are alike once."""
    factors = torch.arange(LARGEST_MULTIPLIER + 1, dtype=torch.uint8)
    ranges = multiplied(scale, offset, factors)
    width = max(value.size(1) for value in ranges)
    steps = torch.zeros((LARGEST_MULTIPLIER + 1, 2, GROUP if width == 1 else stretch), dtype=torch.float32)
    used = GROUP if width == 1 else width
    steps[:, 0, :used], steps[:, 1, :used] = ranges[0].reciprocal(), ranges[1]
    return steps.view(-1).numpy()


def code_pitch(width: int, bits: int) -> int:
    """Bytes between the rows of unpacked codes that :func:`pack_row` reads."""
    return 4 * row_words(width, bits) * parts_per_byte(bits) + PACK_BYTES if bits else 0


@njit(forceinline=True)
def quantize_group(y, low, inverse, top):
    """``clamp(floor((y - low) * inverse + 1/2), 0, top)`` of float lanes, NaN to 0, as int32 lanes.

    Clamped first: what is left is not negative, and converting it rounds down.
    """
    v = (y - low) * inverse + vsplat(np.float32(0.5), GROUP)
    return vcast(vmin(vmax(v, vsplat(np.float32(0.0), GROUP)), top), "i32")


@njit(forceinline=True)
def pack_row(codes, start, out, at, words, bits):
    """Pack the codes of one row, uint8 from ``codes[start]``, into ``words`` words at ``out[at]``.

    Bytes past the row's features, up to :func:`code_pitch`, must be zero.
    """
    width = 4 * words
    for k in range(0, width, PACK_BYTES):
        word = vsplat(0, 16)
        for part in range(8 // bits):
            lanes = vview(vload(codes, start + part * width + k, PACK_BYTES), "i32")
            word = word | (lanes << (bits * part))
        left = words - k // 4
        if left >= 16:
            vstore(out, at + k // 4, word)
        else:
            vstore_first(out, at + k // 4, word, left)


@njit(forceinline=True)
def row_multiplier(peak, unit_inverse):
    """``clamp(ceil(peak / unit), 1, 15)``, and 1 for NaN."""
    v = peak * unit_inverse
    v = v if v > np.float32(1) else np.float32(1)
    v = v if v < np.float32(LARGEST_MULTIPLIER) else np.float32(LARGEST_MULTIPLIER)
    whole = np.int64(v)
    return whole + np.int64(np.float32(whole) < v)


@jit.kernel
def quantize_units(acc, base, pitch, first, count, spec, codes, code_row):
    """The multipliers of finished rows, from their largest absolute values, and their codes."""
    width = spec.width
    steps, multiplier = raw(spec.steps), raw(spec.multiplier)
    stretch = spec.steps.size // (2 * (LARGEST_MULTIPLIER + 1))
    along = 1 if stretch > GROUP else 0  # columns differ
    top = vsplat(np.float32((1 << spec.bits) - 1), GROUP)
    tail = width % GROUP
    whole = width - tail
    for r in range(count):
        at = base + r * pitch
        peak = vsplat(np.float32(0.0), GROUP)
        for f in range(0, whole, GROUP):
            peak = vmax(vabs(vload(acc, at + f, GROUP)), peak)
        if tail:
            peak = vmax(vabs(vload_first(acc, at + whole, GROUP, tail)), peak)
        m = row_multiplier(vtop(peak), spec.unit_inverse)
        poke(multiplier, first + r, m)
        step = 2 * m * stretch
        inverse, low = vload(steps, step, GROUP), vload(steps, step + stretch, GROUP)
        for f in range(0, whole, GROUP):
            if along:
                inverse, low = vload(steps, step + f, GROUP), vload(steps, step + stretch + f, GROUP)
            code = quantize_group(vload(acc, at + f, GROUP), low, inverse, top)
            vstore(codes, r * code_row + f, vcast(code, "u8"))
        if tail:
            if along:
                inverse, low = vload(steps, step + whole, GROUP), vload(steps, step + stretch + whole, GROUP)
            code = quantize_group(vload_first(acc, at + whole, GROUP, tail), low, inverse, top)
            vstore_first(codes, r * code_row + whole, vcast(code, "u8"), tail)


@jit.kernel
def finish_rows(acc, base, pitch, coefficient, first, count, spec, codes):
    """Turn accumulated rows into the result rows ``[first, first + count)``.

    Row ``r`` of ``acc`` (float32) starts at ``base + r * pitch``; ``coefficient`` has one value per
    row; ``codes`` has :func:`code_pitch` zeroed bytes per row.  The three are :func:`.simd.raw`.  Where rows get
    multipliers, ``acc`` holds the finished rows afterwards.
    """
    width, bits, flags = spec.width, spec.bits, spec.flags
    table, stretch = raw(spec.columns), spec.columns.shape[1]
    dst, row_term = raw(spec.dst), raw(spec.row_term)
    row_inverse, row_low = raw(spec.row_inverse), raw(spec.row_low)
    row_scale, addend = raw(spec.row_scale), raw(spec.addend)
    out, packed = raw(spec.out), raw(spec.packed)
    floor = vsplat(np.float32(spec.floor), GROUP)
    top = vsplat(np.float32((1 << bits) - 1), GROUP)
    words = (width * bits + 31) // 32
    code_row = 4 * words * (8 // bits) + PACK_BYTES if bits else 0
    for f in range(0, width, GROUP):
        scale = vload(table, SCALE * stretch + f, GROUP)
        offset = vload(table, OFFSET * stretch + f, GROUP)
        term = vload(table, TERM * stretch + f, GROUP)
        bias = vload(table, BIAS * stretch + f, GROUP)
        inverse = vload(table, INVERSE * stretch + f, GROUP)
        low = vload(table, LOW * stretch + f, GROUP)
        whole = width - f >= GROUP
        for r in range(count):
            i = first + r
            if whole:
                y = vload(acc, base + r * pitch + f, GROUP)
            else:
                y = vload_first(acc, base + r * pitch + f, GROUP, width - f)
            y = y * scale + vsplat(peek(coefficient, r), GROUP) * offset
            if flags & HAS_DST:
                y = y * vsplat(peek(dst, i), GROUP)
            if flags & HAS_TERM:
                y = y + term * vsplat(peek(row_term, i), GROUP)
            if flags & HAS_BIAS:
                y = y + bias
            if flags & HAS_ADDEND:
                if whole:
                    y = y + vload(addend, i * width + f, GROUP)
                else:
                    y = y + vload_first(addend, i * width + f, GROUP, width - f)
            y = vmax(floor, y)
            if flags & HAS_ROW_SCALE:
                y = y * vsplat(peek(row_scale, i), GROUP)
            if flags & HAS_UNIT:
                if whole:
                    vstore(acc, base + r * pitch + f, y)
                else:
                    vstore_first(acc, base + r * pitch + f, y, width - f)
            elif bits:
                if flags & ROW_RANGE:
                    inverse = vsplat(peek(row_inverse, i), GROUP)
                    low = vsplat(peek(row_low, i), GROUP)
                code = vcast(quantize_group(y, low, inverse, top), "u8")
                if whole:
                    vstore(codes, r * code_row + f, code)
                else:
                    vstore_first(codes, r * code_row + f, code, width - f)
            elif flags & STREAM:
                vstream(out, i * width + f, y)
            elif whole:
                vstore(out, i * width + f, y)
            else:
                vstore_first(out, i * width + f, y, width - f)
    if flags & HAS_UNIT:
        quantize_units(acc, base, pitch, first, count, spec, codes, code_row)
    if bits:
        for r in range(count):
            pack_row(codes, r * code_row, packed, (first + r) * words, words, bits)
