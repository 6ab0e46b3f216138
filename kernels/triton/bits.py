"""What the kernels share: the fields of packed words, and ranges.

A *word tile* is ``[ROWS, WORDS]`` uint32.  A *feature tile* is ``[ROWS, PARTS, 4 * WORDS]``: entry
``(r, p, j)`` is feature ``p B + 4 w_0 + j`` of a row of ``B`` bytes (:mod:`..layout`).  Codes of
one word stay in one thread, so unpacking never crosses threads.  Epilogues (:mod:`.epilogue`) take one part at a time,
a *part tile* ``[ROWS, 4 * WORDS]``: a whole feature tile in float32 would be what decides how many
registers a kernel needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "COLUMN",
    "HEAD",
    "ONE",
    "ROW",
    "by_feature",
    "feature_tile",
    "field_codes",
    "field_floats",
    "field_max",
    "field_shift",
    "isolate",
    "isolated_part",
    "load_range",
    "load_words",
    "multiplied_part",
    "nibbles",
    "part_features",
    "part_sums",
    "power_of_two",
    "row_magic",
    "select_part",
    "spread",
    "sums_by_part",
]  # fmt: skip

# Kinds of range tensors: one element, one per column, one per row.
ONE = tl.constexpr(0)
COLUMN = tl.constexpr(1)
ROW = tl.constexpr(2)
HEAD = tl.constexpr(3)  # one per row and head

_TWO_23 = tl.constexpr(8388608.0)


@triton.jit
def _halve(x, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Even and odd fields of ``width`` bits, each alone in ``2 * width`` bits; a new last axis."""
    mask: tl.constexpr = ((1 << 32) - 1) // ((1 << (2 * width)) - 1) * ((1 << width) - 1)
    return tl.join(x & mask, (x >> width) & mask)


@triton.jit
def spread(x, narrow: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """Spread fields of ``narrow`` bits to ``wide`` bits: one new last axis of 2 per doubling.

    Doubling in steps lets sums run in the narrow fields before they are spread further.
    """
    if narrow < wide:
        x = _halve(x, narrow)
    if 2 * narrow < wide:
        x = _halve(x, 2 * narrow)
    if 4 * narrow < wide:
        x = _halve(x, 4 * narrow)
    if 8 * narrow < wide:
        x = _halve(x, 8 * narrow)
    if 16 * narrow < wide:
        x = _halve(x, 16 * narrow)
    return x


@triton.jit
def by_feature(x, bits: tl.constexpr, rows: tl.constexpr, words: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fully spread words ``[rows, words, 2, ...]`` as a feature tile.

    Doubling yields the bits of a code's position from the lowest up: part first, then byte.
    """
    if bits == 1:
        x = tl.permute(x, (0, 4, 3, 2, 1, 6, 5))
    elif bits == 2:
        x = tl.permute(x, (0, 3, 2, 1, 5, 4))
    elif bits == 4:
        x = tl.permute(x, (0, 2, 1, 4, 3))
    else:
        x = tl.permute(x, (0, 1, 3, 2))
    return tl.reshape(x, [rows, 8 // bits, 4 * words])


@triton.jit
def isolate(x, bits: tl.constexpr, rows: tl.constexpr, words: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of each word, ``[rows, words, 32 / bits]``, still shifted by :func:`field_shift`.

    Entry ``4 p + k`` is part ``p`` of byte ``k``.  Leaving the shift to the end (it is linear)
    saves one instruction per code.
    """
    if bits < 8:
        x = tl.join(x & 0x0F0F0F0F, x & 0xF0F0F0F0)
    if bits < 4:
        x = tl.join(x & 0x33333333, x & 0xCCCCCCCC)
    if bits < 2:
        x = tl.join(x & 0x55555555, x & 0xAAAAAAAA)
    x = tl.join(x & 0xFFFF, x >> 16)
    x = tl.join(x & 0x00FF, x & 0xFF00)
    return tl.reshape(x, [rows, words, 32 // bits])


@triton.jit
def field_shift(bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """How far :func:`isolate` leaves the codes of a word from bit 0, ``[1, 1, 32 / bits]``."""
    entry = tl.arange(0, 32 // bits)
    return (entry // 4 * bits + entry % 2 * 8)[None, None, :]


@triton.jit
def field_max(x, y, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """The larger of each pair of fields of ``bits`` bits, where they lie: eight instructions per word.

    With the top bit of every field set in ``x`` and clear in ``y``, ``d = x - y`` borrows from no other field, and its
    top bits compare what is below them.  ``x >= y`` holds where ``x`` has the top bit alone, or both or neither have it
    and ``d`` has it.  (Written without ``~``, which the interpreter lacks for unsigned words.)
    """
    top: tl.constexpr = ((1 << 32) - 1) // ((1 << bits) - 1) << (bits - 1)
    rest: tl.constexpr = ((1 << 32) - 1) ^ top
    d = (x | top) - (y & rest)
    first = (((x ^ d) & (x ^ y)) ^ d) & top
    fields = (first >> (bits - 1)) * ((1 << bits) - 1)
    return ((x ^ y) & fields) ^ y


@triton.jit
def select_part(x, part: tl.constexpr, parts: tl.constexpr):  # type: ignore[no-untyped-def]
    """Part ``part`` of ``[ROWS, N, PARTS]``, ``[ROWS, N]``; the other parts cost nothing."""
    if parts == 8:
        low, high = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 4, 2]))
        x = high if part % 2 == 1 else low
    if parts >= 4:
        low, high = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
        x = high if part // (parts // 4) % 2 == 1 else low
    if parts >= 2:
        low, high = tl.split(x)
        x = high if part // (parts // 2) == 1 else low
    else:
        x = tl.reshape(x, [x.shape[0], x.shape[1]])
    return x


@triton.jit
def sums_by_part(x, bits: tl.constexpr, rows: tl.constexpr, words: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words spread to 16 bits, ``[ROWS, WORDS, 2, ...]``, as ``[ROWS, 2 * WORDS, PARTS]``."""
    if bits == 1:
        x = tl.permute(x, (0, 1, 5, 4, 3, 2))
    elif bits == 2:
        x = tl.permute(x, (0, 1, 4, 3, 2))
    elif bits == 4:
        x = tl.permute(x, (0, 1, 3, 2))
    return tl.reshape(x, [rows, 2 * words, 8 // bits])


@triton.jit
def part_sums(total, part: tl.constexpr, bits: tl.constexpr, rows: tl.constexpr, words: tl.constexpr):  # type: ignore[no-untyped-def]
    """One part of :func:`sums_by_part` as a part tile of int32."""
    pairs = select_part(total, part, 8 // bits)
    pairs = tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), [rows, words, 2, 2])
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), [rows, 4 * words]).to(tl.int32)


@triton.jit
def isolated_part(x, part: tl.constexpr, bits: tl.constexpr, rows: tl.constexpr, words: tl.constexpr):  # type: ignore[no-untyped-def]
    """One part of ``[ROWS, WORDS, 32 / BITS]`` in the order of :func:`isolate` as a part tile, and
    how far :func:`isolate` left its fields from bit 0, ``[1, 4 * WORDS]``.
    """
    parts: tl.constexpr = 8 // bits
    x = tl.permute(tl.reshape(x, [rows, words, parts, 4]), (0, 1, 3, 2))
    tile = select_part(tl.reshape(x, [rows, 4 * words, parts]), part, parts)
    return tile, (part * bits + tl.arange(0, 4 * words) % 2 * 8)[None, :]


@triton.jit
def nibbles(x, bits: tl.constexpr, rows: tl.constexpr, words: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of each word, two in 16 bits each of what :func:`sums_by_part` has: ``[ROWS, 2 * WORDS, PARTS]``.

    The half of a byte that they are in is moved to bit 0, and the shift within it left to the end: three shifts and a
    mask for each pair.
    """
    x = tl.join(x, x >> 8)
    x = tl.join(x & 0x000F000F, (x >> 4) & 0x000F000F)
    if bits < 4:
        x = tl.join(x & 0x00030003, x & 0x000C000C)
    if bits < 2:
        x = tl.join(x & 0x00050005, x & 0x000A000A)
    return tl.reshape(x, [rows, 2 * words, 8 // bits])


@triton.jit
def multiplied_part(total, part: tl.constexpr, bits: tl.constexpr, rows: tl.constexpr, words: tl.constexpr):  # type: ignore[no-untyped-def]
    """One part of sums of products of :func:`nibbles`, or of bytes in the order of :func:`isolate`, as a part tile of
    int32.
    """
    if bits == 8:
        tile, shift = isolated_part(total, part, bits, rows, words)
        tile = tile.to(tl.int32) >> shift
    else:
        tile = part_sums(total, part, bits, rows, words) >> (part % (4 // bits) * bits)
    return tile


@triton.jit
def power_of_two(exponent):
    """``2^exponent`` in float32."""
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_magic(magic, length):
    """``magic``, ``MAGIC_BITS`` of :mod:`.launch`, the bits of 2^23, in a register of every thread.

    It comes from a kernel's argument and (in vain) from the row's length, which is never negative: a
    mask and the bits merge into one three-input instruction per code only where neither constants
    nor the argument's place in constant memory are known to the compiler.
    """
    return (magic | (length >> 31))[:, None, None]


@triton.jit
def field_floats(fields, magic):
    """Fields below 2^23 as float32, exactly and without a conversion instruction.

    ``magic`` comes from :func:`row_magic`.
    """
    return (fields | magic).to(tl.float32, bitcast=True) - _TWO_23


@triton.jit
def field_codes(fields, shift, magic):
    """``fields >> shift`` as float32, exactly, in one more instruction than the mask: both the shift and the removal
    of 2^23 are those of a fused multiplication and addition.
    """
    small = power_of_two(-shift)
    return tl.fma((fields | magic).to(tl.float32, bitcast=True), small, small * -_TWO_23)


@triton.jit
def load_words(pointers, mask):
    return tl.load(pointers, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def feature_tile(first, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Feature numbers ``[PARTS, 4 * WORDS]`` of the words from ``first`` on, and which exist."""
    byte = 4 * first + tl.arange(0, 4 * WORDS)
    feature = tl.arange(0, 8 // BITS)[:, None] * (4 * W) + byte[None, :]
    return feature, (byte < 4 * W)[None, :] & (feature < F)


@triton.jit
def load_range(ptr, kind: tl.constexpr, row, row_ok, feature, feature_ok):  # type: ignore[no-untyped-def]
    """A range tensor broadcast over rows and ``feature`` (a part ``[N]``, or several, ``[P, N]``)."""
    if kind == ONE:
        value = tl.load(ptr)
    elif kind == COLUMN:
        value = tl.expand_dims(tl.load(ptr + feature, mask=feature_ok, other=1.0), 0)
    else:
        value = tl.load(ptr + row, mask=row_ok, other=1.0)[:, None]
        if len(feature.shape) == 2:
            value = value[:, :, None]
    return value


@triton.jit
def part_features(first, part, F: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Feature numbers ``[4 * WORDS]`` of one part of the words from ``first`` on, and which exist."""
    byte = 4 * first + tl.arange(0, 4 * WORDS)
    feature = part * (4 * W) + byte
    return feature, (byte < 4 * W) & (feature < F)
