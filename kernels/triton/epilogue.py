"""The canonical epilogue: floats scaled, with bias and ReLU, written as they are or as codes of packed rows.

Tiles are those of :mod:`.bits`; CPUs have theirs in :mod:`..cpu.epilogue`.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from .bits import load_range, part_features

try:
    from triton.language.target_info import is_cuda
except ImportError:  # of a version that does not tell
    is_cuda = None

__all__ = [
    "pack_features",
    "pack_part",
    "part_peak",
    "quantize",
    "relu",
    "row_multipliers",
    "scale_bias_relu",
    "store_part",
    "store_words",
    "write_part",
    "write_words",
]  # fmt: skip

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
_KNOWS_TARGET = tl.constexpr(is_cuda is not None and os.environ.get("TRITON_INTERPRET", "0") != "1")


@triton.jit
def quantize(x, scale, offset, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """``clamp(floor((x - l) * (1 / s) + 1/2), 0, Q)`` as int32; 0 for NaN."""
    return whole_part((x - offset) * tl.div_rn(1.0, scale) + 0.5, bits)


@triton.jit
def whole_part(position, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """``clamp(floor(position), 0, Q)`` as int32; 0 for NaN.

    On NVIDIA a conversion to unsigned clamps at 0 and takes NaN for 0, and one to a byte clamps at 255 as well.
    """
    top: tl.constexpr = (1 << bits) - 1
    if _KNOWS_TARGET:
        if is_cuda():
            if bits == 8:
                code = tl.inline_asm_elementwise(
                    "cvt.rzi.u8.f32 $0, $1;", "=r,f", [position], dtype=tl.int32, is_pure=True, pack=1
                )
            else:
                most = tl.minimum(position, top * 1.0, propagate_nan=tl.PropagateNan.ALL)
                code = tl.inline_asm_elementwise(
                    "cvt.rzi.u32.f32 $0, $1;", "=r,f", [most], dtype=tl.int32, is_pure=True, pack=1
                )
        else:
            code = tl.minimum(at_least_zero(position), top * 1.0).to(tl.int32)
    else:
        code = tl.minimum(at_least_zero(position), top * 1.0).to(tl.int32)  # from 0 on, truncation is the floor
    return code


@triton.jit
def at_least_zero(x):
    """``max(x, 0)``, and 0 for NaN: one instruction, which the interpreter takes for NumPy's, and that hands NaN on."""
    return tl.where(x > 0, x, 0.0) if _INTERPRETED else tl.maximum(x, 0.0)


@triton.jit
def relu(x):
    """``max(x, 0)``, and NaN for NaN, as torch has it."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pack_features(codes, bits: tl.constexpr, rows: tl.constexpr, words: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pack a feature tile of int32 codes into a word tile (int32)."""
    parts: tl.constexpr = 8 // bits
    shift = tl.arange(0, parts) * bits
    if parts > 1:
        lanes = tl.sum(codes << shift[None, :, None], 1)
    else:
        lanes = tl.reshape(codes, [rows, 4 * words])
    lanes = tl.reshape(lanes, [rows, words, 4])
    return tl.sum(lanes << (8 * tl.arange(0, 4))[None, None, :], 2)


@triton.jit
def store_words(out, tile, row, row_ok, first, W: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a word tile (int32)."""
    word = first + tl.arange(0, WORDS)
    target = out + (row.to(tl.int64) * W)[:, None] + word[None, :]
    tl.store(target, tile, mask=row_ok[:, None] & (word < W)[None, :])


@triton.jit
def scale_bias_relu(y, dst_scale, bias, feature, feature_ok, RELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """What follows the affine step of a part tile: destination factor (``[ROWS]``), bias, ReLU."""
    if dst_scale is not None:
        y = y * dst_scale[:, None]
    if bias is not None:
        y = y + tl.load(bias + feature, mask=feature_ok, other=0.0)[None, :]
    if RELU:
        y = relu(y)
    return y


@triton.jit
def part_peak(y, feature_ok):
    """Largest absolute values of the rows of a part tile, ``[ROWS]``; NaN counts as 0."""
    return at_least_zero(tl.max(tl.where(feature_ok[None, :], tl.abs(y), 0.0), 1))  # a maximum leaves NaN out


@triton.jit
def row_multipliers(peak, unit, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """``clamp(ceil(peak / p), 1, LARGEST)``, whole numbers in float32."""
    steps = tl.ceil(peak * tl.div_rn(1.0, tl.load(unit)))
    steps = tl.where(steps > 1, steps, 1.0)  # false for NaN
    return tl.minimum(steps, LARGEST * 1.0)


@triton.jit
def store_part(  # type: ignore[no-untyped-def]
    y, out, row, row_ok, first, part: tl.constexpr, F: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr
):
    """Store the values of a part tile."""
    feature, feature_ok = part_features(first, part, F, W, WORDS)
    target = out + (row.to(tl.int64) * F)[:, None] + feature[None, :]
    tl.store(target, y, mask=row_ok[:, None] & feature_ok[None, :])


@triton.jit
def pack_part(  # type: ignore[no-untyped-def]
    y, row, row_ok, first, out_scale, out_offset, part: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr, times=None,
):  # fmt: skip
    """The codes of a part tile where they lie in their words, so that the bitwise or over the parts is what
    :func:`store_words` stores.  ``times``, ``[ROWS]`` float32, are the rows' multipliers.
    """
    feature, feature_ok = part_features(first, part, F, W, WORDS)
    scale = load_range(out_scale, OUT_SCALE, row, row_ok, feature, feature_ok)
    offset = load_range(out_offset, OUT_OFFSET, row, row_ok, feature, feature_ok)
    if times is not None:
        scale, offset = scale * times[:, None], offset * times[:, None]
    codes = quantize(y, scale, offset, BITS)
    if F * BITS < 32 * W:  # bits that no feature has are 0
        codes = tl.where(feature_ok[None, :], codes, 0)
    lanes = tl.reshape(codes, [ROWS, WORDS, 4]) << (8 * tl.arange(0, 4))[None, None, :]
    return tl.sum(lanes, 2) << (part * BITS)


@triton.jit
def write_part(  # type: ignore[no-untyped-def]
    y, values, peak, packed, out, row, row_ok, first, out_scale, out_offset, out_unit, part: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    PACK: tl.constexpr, OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Store a part tile as floats, or add its codes to the words ``packed``.

    With ``out_unit`` it joins ``values``, and ``peak``, ``[ROWS]``: that of a row comes before the first of its codes.
    (Without, values that were held would not fit the registers.)
    """
    if out_unit is not None:
        values += (y,)
        peak = tl.maximum(peak, part_peak(y, part_features(first, part, F, W, WORDS)[1]))
    elif PACK:
        packed = packed | pack_part(
            y, row, row_ok, first, out_scale, out_offset, part, F, W, BITS, ROWS, WORDS, OUT_SCALE, OUT_OFFSET
        )
    else:
        store_part(y, out, row, row_ok, first, part, F, W, WORDS)
    return values, peak, packed


@triton.jit
def write_words(  # type: ignore[no-untyped-def]
    values, peak, packed, out, row, row_ok, first, out_scale, out_offset, out_unit, out_multiplier,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Store the words of rows after :func:`write_part` of all parts, with ``out_unit`` their multipliers as well."""
    if out_unit is not None:
        times = row_multipliers(peak, out_unit, LARGEST)
        tl.store(out_multiplier + row, times.to(tl.uint8), mask=row_ok)
        for part in tl.static_range(8 // BITS):
            packed |= pack_part(
                values[part], row, row_ok, first, out_scale, out_offset, part,
                F, W, BITS, ROWS, WORDS, OUT_SCALE, OUT_OFFSET, times,
            )  # fmt: skip
    store_words(out, packed, row, row_ok, first, W, WORDS)
