"""The shared end of every kernel: affine step, scales, bias, ReLU, then float rows or packed rows.

Each operation is one float32 rounding, in the order of :mod:`..arithmetic`.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER, is_per_row
from ..layout import row_words
from . import jit
from .address import at
from .finish import (
    BIAS,
    GROUP,
    HAS_ADDEND,
    HAS_BIAS,
    HAS_DST,
    HAS_ROW_SCALE,
    HAS_TERM,
    HAS_UNIT,
    INVERSE,
    LOW,
    MULTIPLIED,
    OFFSET,
    RELU,
    ROW_RANGE,
    SCALE,
    STREAM,
    TERM,
    code_pitch,
    column_pitch,
    dot_and_finish_rows,
    finish_rows,
    quantize_group,
)
from .memory import empty

__all__ = [
    "GROUP",
    "Epilogue",
    "address",
    "code_pitch",
    "dot_and_finish_rows",
    "epilogue",
    "finish_rows",
    "opened",
    "quantize_group",
]

STREAM_BYTES = 1 << 24  # results beyond this size are written past the caches


class Epilogue(NamedTuple):
    """What follows an accumulation ``acc`` with a coefficient per row, in the form kernels work with.

    ``y = acc * scale + coefficient * offset``, ``y *= dst``, ``y += term * row_term``, ``y +=
    bias``, ``y += addend``, ``y = max(floor, y)``, ``y *= row_scale``, then quantization with the inverse step and
    start of the output range.

    Kernels make it of the numbers that :func:`epilogue` gives (:func:`opened`).
    """

    columns: np.ndarray  # [6, column_pitch] float32
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
    steps: np.ndarray  # [16, 2, 16 or column_pitch] float32: inverse step and start of the range that m makes
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
def _aligned(count):
    """Zeros from the start of a cache line on."""
    owner = np.zeros(count + GROUP, np.float32)
    start = -(owner.ctypes.data // 4) % GROUP
    return owner[start : start + count]


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
    stretch = column_pitch(width, bits)
    columns = _aligned(6 * stretch).reshape(6, stretch)
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
    steps = _aligned(2 * (LARGEST_MULTIPLIER + 1) * pitch)
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
