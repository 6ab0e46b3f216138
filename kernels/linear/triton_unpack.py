"""Codes of packed bytes as operands of an integer product: four at a time where four bytes share a register.

A byte tile ``[M, B]`` holds ``8 / bits`` parts of codes.  In the layout of :mod:`..layout` part ``p`` of all bytes is
what a shift of whole words by ``bits p`` and a mask of whole words leave, so a register gives four codes for two
instructions.  Triton has no view of bytes as words; inline PTX works on registers, four bytes each.  Elsewhere (AMD,
the interpreter) the same is said byte by byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["operand", "word_sums"]

# The first part of every byte; all bits moved down by one part; codes of 8 bits less 128.
_KEEP_1 = tl.constexpr("and.b32 $0, $1, 0x01010101;")
_KEEP_2 = tl.constexpr("and.b32 $0, $1, 0x03030303;")
_KEEP_4 = tl.constexpr("and.b32 $0, $1, 0x0F0F0F0F;")
_NEXT_1 = tl.constexpr("shr.u32 $0, $1, 1;")
_NEXT_2 = tl.constexpr("shr.u32 $0, $1, 2;")
_NEXT_4 = tl.constexpr("shr.u32 $0, $1, 4;")
_LESS_128 = tl.constexpr("xor.b32 $0, $1, 0x80808080;")


@triton.jit
def _by_words(tile, code: tl.constexpr):  # type: ignore[no-untyped-def]
    """One instruction on registers of four bytes."""
    return tl.inline_asm_elementwise(code, "=r,r", [tile], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _keep(tile, BITS: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of the first part, each a byte; of 8 bits, less 128."""
    if not PTX:
        if BITS == 8:
            tile = (tile.to(tl.int32) - 128).to(tl.int8)
        else:
            tile = tile & ((1 << BITS) - 1)
    elif BITS == 1:
        tile = _by_words(tile, _KEEP_1)
    elif BITS == 2:
        tile = _by_words(tile, _KEEP_2)
    elif BITS == 4:
        tile = _by_words(tile, _KEEP_4)
    else:
        tile = _by_words(tile, _LESS_128)
    return tile


@triton.jit
def _next(tile, BITS: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next part in the place of the first; above it stands what the mask takes away."""
    if not PTX:
        tile = tile >> BITS
    elif BITS == 1:
        tile = _by_words(tile, _NEXT_1)
    elif BITS == 2:
        tile = _by_words(tile, _NEXT_2)
    else:
        tile = _by_words(tile, _NEXT_4)
    return tile


@triton.jit
def _pair(tile, BITS: tl.constexpr, PTX: tl.constexpr, APART: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first part and the one ``APART`` after it, on a new last axis."""
    other = tile
    for _ in tl.static_range(APART):
        other = _next(other, BITS, PTX)
    return tl.join(_keep(tile, BITS, PTX), _keep(other, BITS, PTX))


@triton.jit
def operand(tile, BITS: tl.constexpr, PTX: tl.constexpr, M: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """A byte tile ``[M, B]`` of int8 as codes ``[M, 8 / BITS * B]`` of int8, part after part; of 8 bits, less 128."""
    if BITS == 8:
        codes = _keep(tile, BITS, PTX)
    elif BITS == 4:
        codes = tl.reshape(tl.permute(_pair(tile, 4, PTX, 1), (0, 2, 1)), [M, 2 * B])
    elif BITS == 2:  # axes: bytes, high and low bit of the part's number
        quad = tl.join(_pair(tile, 2, PTX, 2), _pair(_next(tile, 2, PTX), 2, PTX, 2))
        codes = tl.reshape(tl.permute(quad, (0, 2, 3, 1)), [M, 4 * B])
    else:
        odd = _next(tile, 1, PTX)
        second, third = _next(odd, 1, PTX), _next(_next(odd, 1, PTX), 1, PTX)
        even_parts = tl.join(_pair(tile, 1, PTX, 4), _pair(second, 1, PTX, 4))
        odd_parts = tl.join(_pair(odd, 1, PTX, 4), _pair(third, 1, PTX, 4))
        codes = tl.reshape(tl.permute(tl.join(even_parts, odd_parts), (0, 2, 3, 4, 1)), [M, 8 * B])
    return codes


@triton.jit
def word_sums(words, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of the codes of each int32 word: neighbouring fields are added up until one is left."""
    x = words.to(tl.uint32, bitcast=True)
    if BITS < 2:
        x = (x & 0x55555555) + ((x >> 1) & 0x55555555)
    if BITS < 4:
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    if BITS < 8:
        x = (x & 0x0F0F0F0F) + ((x >> 4) & 0x0F0F0F0F)
    x = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
    return ((x & 0xFFFF) + (x >> 16)).to(tl.int32, bitcast=True)
