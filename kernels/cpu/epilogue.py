"""The shared end of every kernel: affine step, scales, bias, ReLU, then float rows or packed rows.

Each operation is one float32 rounding, in the order of :mod:`..arithmetic`.
"""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER, is_per_row
from ..layout import parts_per_byte, row_words
from . import jit
from .address import at
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
    "address",
    "code_pitch",
    "epilogue",
    "finish_rows",
    "opened",
    "pack_row",
    "quantize_group",
]

GROUP = 16  # features per step
PACK_BYTES = 64  # bytes of a packed row per step
STREAM_BYTES = 1 << 24  # results beyond this size are written past the caches

SCALE, OFFSET, TERM, BIAS, INVERSE, LOW = range(6)  # rows of ``columns``
# Bits of ``flags``:
HAS_DST, HAS_TERM, HAS_BIAS, ROW_RANGE, STREAM, HAS_ROW_SCALE, HAS_ADDEND, HAS_UNIT = 1, 2, 4, 8, 16, 32, 64, 128
RELU, MULTIPLIED = 256, 512


class Epilogue(NamedTuple):
    """What follows an accumulation ``acc`` with a coefficient per row, in the form kernels work with.

    ``y = acc * scale + coefficient * offset``, ``y *= dst``, ``y += term * row_term``, ``y +=
    bias``, ``y += addend``, ``y = max(floor, y)``, ``y *= row_scale``, then quantization with the inverse step and
    start of the output range.

    Kernels make it of the numbers that :func:`epilogue` gives (:func:`opened`).
    """

    columns: np.ndarray  # [6, ceil16(F)] float32
    dst: np.ndarray  # [N] float32, or [1] with a step of 0, or empty, as the next one
    dst_step: int
    row_term: np.ndarray
    term_step: int
    row_inverse: np.ndarray  # [N] float32 or empty, as the next two
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
    multiples: np.ndarray  # [N] uint8: by which ``dst`` and ``row_term`` are multiplied; empty without


# An epilogue as numbers and addresses, which enter compiled code in a fraction of the time that arrays take.
Closed = tuple[int, ...]

COLUMN_COUNTS = (8, 10, 14, 16)  # where it has the numbers of scales and offsets, and of those of the output

_EMPTY = np.empty(0, np.float32)


def flat(tensor: Tensor | None) -> np.ndarray:
    """The elements of a tensor as a flat array; empty for :obj:`None`."""
    if tensor is None:
        return _EMPTY
    if tensor.requires_grad:
        tensor = tensor.detach()
    tensor = tensor.contiguous()
    return (tensor if tensor.dim() == 1 else tensor.view(-1)).numpy()


def address(tensor: Tensor, held: list[Tensor]) -> int:
    """Where a tensor's elements are, one after another; a copy that this takes goes to ``held``."""
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
        held.append(tensor)
    return tensor.data_ptr()


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
    multiples: Tensor | None = None,
) -> tuple[Any, Closed, list[Tensor]]:
    """Allocate the result and gather its epilogue; without ``scale`` the affine step is skipped.

    ``dst_scale`` and ``row_term`` may be of one element; ``multiples``, uint8 ``[rows]``, multiply both.  ``term`` may
    be left to the kernel, where ``row_term`` is given.

    Returns:
        The result, with ``out_unit`` a pair, the words and the multipliers of their rows; its epilogue for kernels
        (:func:`opened`); and tensors that have to be kept until the kernel has run.
    """
    held: list[Tensor] = []
    multipliers = row_inverse = None
    flags = HAS_ADDEND if addend is not None else 0
    if dst_scale is not None:
        flags |= HAS_DST
    if row_term is not None:
        flags |= HAS_TERM
    if bias is not None:
        flags |= HAS_BIAS
    if row_scale is not None:
        flags |= HAS_ROW_SCALE
    if relu:
        flags |= RELU
    if multiples is not None:
        flags |= MULTIPLIED
    if out_bits:
        out = empty((rows, row_words(width, out_bits)), torch.int32)
        assert out_scale is not None
        assert out_offset is not None
        if out_unit is not None:
            flags |= HAS_UNIT
            multipliers = empty((rows,), torch.uint8) if width else torch.ones(rows, dtype=torch.uint8)
        elif is_per_row(out_scale) or is_per_row(out_offset):
            flags |= ROW_RANGE
            row_inverse = out_scale.detach().reciprocal().expand(rows, 1)
            held.append(row_inverse)
            out_offset = out_offset.detach().expand(rows, 1)
    else:
        out = empty((rows, width), torch.float32)
        if 4 * rows * width >= STREAM_BYTES and width % GROUP == 0 and out.data_ptr() % 64 == 0:
            flags |= STREAM
    closed = (
        rows, width, out_bits, flags, out.data_ptr(),
        0 if multipliers is None else multipliers.data_ptr(),
        0 if out_unit is None else out_unit.data_ptr(),
        0 if scale is None else address(scale, held), 0 if scale is None else scale.numel(),
        0 if offset is None else address(offset, held), 0 if offset is None else offset.numel(),
        0 if term is None else address(term, held),
        0 if bias is None else address(bias, held),
        0 if out_scale is None else address(out_scale, held), 0 if out_scale is None else out_scale.numel(),
        0 if out_offset is None else address(out_offset, held), 0 if out_offset is None else out_offset.numel(),
        0 if row_inverse is None else address(row_inverse, held),
        0 if dst_scale is None else address(dst_scale, held), int(dst_scale is not None and dst_scale.numel() > 1),
        0 if row_term is None else address(row_term, held), int(row_term is not None and row_term.numel() > 1),
        0 if row_scale is None else address(row_scale, held),
        0 if addend is None else address(addend, held),
        0 if multiples is None else address(multiples, held),
    )  # fmt: skip
    return (out if multipliers is None else (out, multipliers)), closed, held


@njit(forceinline=True)
def floats(place, count):
    return carray(at(place, np.float32), (count,))


@njit(forceinline=True)
def _spread(values, count, width, row):
    """``row[:width]`` of one value, or of one per column, float32 at ``values``."""
    given = floats(values, count)
    if count == 1:
        row[:width] = given[0]
    else:
        for f in range(width):
            row[f] = given[f]


@njit(forceinline=True)
def _fill_steps(steps, stretch, scale, scales, offset, offsets):
    """Inverse step and start of each multiplier's range."""
    step, low = floats(scale, scales), floats(offset, offsets)
    width = max(scales, offsets)
    for m in range(LARGEST_MULTIPLIER + 1):
        inverses, lows = 2 * m * stretch, (2 * m + 1) * stretch
        factor = np.float32(m)
        for f in range(GROUP if width == 1 else width):
            steps[inverses + f] = np.float32(1) / (step[0 if scales == 1 else f] * factor)
            steps[lows + f] = low[0 if offsets == 1 else f] * factor


@jit.kernel
def opened(closed):
    """The :class:`Epilogue` of what :func:`epilogue` has gathered."""
    (
        rows, width, bits, flags, out, multiplier, unit, scale, scales, offset, offsets, term, bias, out_scale,
        out_scales, out_offset, out_offsets, row_inverse, dst, dst_step, row_term, term_step, row_scale, addend,
        multiples,
    ) = closed  # fmt: skip
    stretch = (width + GROUP - 1) // GROUP * GROUP
    columns = np.zeros((6, stretch), np.float32)
    if scales:
        _spread(scale, scales, width, columns[SCALE])
    else:
        columns[SCALE, :width] = 1
    if offsets:
        _spread(offset, offsets, width, columns[OFFSET])
    if term:
        _spread(term, width, width, columns[TERM])
    if flags & HAS_BIAS:
        _spread(bias, width, width, columns[BIAS])
    pitch = 0
    if flags & HAS_UNIT:
        pitch = stretch if max(out_scales, out_offsets) > 1 else GROUP
    steps = np.zeros(2 * (LARGEST_MULTIPLIER + 1) * pitch, np.float32)
    unit_inverse = np.float32(0)
    if flags & HAS_UNIT:
        unit_inverse = np.float32(1) / floats(unit, 1)[0]
        _fill_steps(steps, pitch, out_scale, out_scales, out_offset, out_offsets)
    elif bits and not flags & ROW_RANGE:
        _spread(out_scale, out_scales, width, columns[INVERSE])
        for f in range(width):
            columns[INVERSE, f] = np.float32(1) / columns[INVERSE, f]
        _spread(out_offset, out_offsets, width, columns[LOW])
    per_row = rows if flags & ROW_RANGE else 0
    dsts, terms = rows if dst_step else 1, rows if term_step else 1
    words = (width * bits + 31) // 32
    return Epilogue(
        columns,
        floats(dst, dsts if flags & HAS_DST else 0),
        dst_step,
        floats(row_term, terms if flags & HAS_TERM else 0),
        term_step,
        floats(row_inverse, per_row),
        floats(out_offset, per_row),
        floats(row_scale, rows if flags & HAS_ROW_SCALE else 0),
        floats(addend, rows * width if flags & HAS_ADDEND else 0),
        flags,
        0.0 if flags & RELU else -np.inf,
        width,
        bits,
        floats(out, 0 if bits else rows * width),
        carray(at(out, np.int32), (rows * words if bits else 0,)),
        carray(at(multiplier, np.uint8), (rows if flags & HAS_UNIT else 0,)),
        unit_inverse,
        steps,
        carray(at(multiples, np.uint8), (rows if flags & MULTIPLIED else 0,)),
    )


@cache
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
    dst, row_term, dst_step, term_step = raw(spec.dst), raw(spec.row_term), spec.dst_step, spec.term_step
    row_inverse, row_low = raw(spec.row_inverse), raw(spec.row_low)
    row_scale, addend, multiples = raw(spec.row_scale), raw(spec.addend), raw(spec.multiples)
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
                factor = peek(dst, i * dst_step)
                if flags & MULTIPLIED:
                    factor *= np.float32(peek(multiples, i))
                y = y * vsplat(factor, GROUP)
            if flags & HAS_TERM:
                low_term = peek(row_term, i * term_step)
                if flags & MULTIPLIED:
                    low_term *= np.float32(peek(multiples, i))
                y = y + term * vsplat(low_term, GROUP)
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
