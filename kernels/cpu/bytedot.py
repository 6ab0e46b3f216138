"""Byte dot products of four packed rows at a time, in registers: sums of codes that integers weight.

The words of four rows are interleaved byte by byte, so that each int32 lane holds one byte of every row, and a byte dot
product with the four weights adds all of them up.  Codes are told apart by masks alone: part ``p`` of a byte is what
the dot product of its lowest ``b (p + 1)`` bits has more than that of its lowest ``b p`` bits, taken once per row.
"""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from ..layout import lane_mask
from .simd import Vector
from .simd.dots import byte_dot, has_feature, register_lanes
from .simd.vectors import (
    _by_width,
    _call,
    _concatenate,
    _constant,
    _order,
    _pointer,
    _splat,
    _vector_pointer,
)

__all__ = ["ROWS", "vadd_heads", "vadd_mixed", "vmix", "vquads", "vunmix", "vunmix_heads"]

ROWS = 4  # rows that meet in a lane
_LANE_BYTES = 16  # unpack instructions stay within 128 bits


def _unpack(count: int, size: int, high: bool) -> list[int]:
    """What ``punpck`` of elements of ``size`` bytes takes from two vectors of ``count`` bytes."""
    order = []
    half = _LANE_BYTES // 2
    for lane in range(0, count, _LANE_BYTES):
        for k in range(lane + half * high, lane + half * (high + 1), size):
            order += [*range(k, k + size), *range(count + k, count + k + size)]
    return order


@intrinsic
def vmix(typingctx, a, b, c, d):
    """Four rows of ``l`` int32 words, byte by byte: lane ``l q + 4 k + i`` has their bytes ``16 k + 4 q + i``."""
    mixed = Vector("i32", ROWS * a.lanes)

    def codegen(context, builder, sig, args):
        count = 4 * a.lanes
        as_bytes = Vector("u8", count)
        a_, b_, c_, d_ = (builder.bitcast(x, as_bytes.llvm) for x in args)
        lanes = []
        for high in (False, True):
            order = _order(_unpack(count, 1, high))
            ab, cd = builder.shuffle_vector(a_, b_, order), builder.shuffle_vector(c_, d_, order)
            lanes += [builder.shuffle_vector(ab, cd, _order(_unpack(count, 2, up))) for up in (False, True)]
        return _concatenate(builder, [builder.bitcast(x, a.llvm) for x in lanes])

    return signature(mixed, a, a, a, a), codegen


@cache
def permutes() -> bool:
    """Whether :func:`vadd_heads` can tell lanes apart: by an instruction of AVX-512."""
    return has_feature("avx512f")


def _dot(builder, parts):
    return byte_dot(builder, parts, is_small=True)  # weights are small


@intrinsic
def vadd_mixed(typingctx, acc, mixed, weights):
    """Add what four rows, :func:`vmix`, times four weights, bytes of an int32 number from 0 to 127, come to.

    ``acc`` has int32 lanes for each part of a byte, of which the width of the codes follows; :func:`vunmix` ends it.
    """
    parts = acc.lanes // mixed.lanes
    bits = 8 // parts

    def codegen(context, builder, sig, args):
        factor = _splat(builder, mixed, args[2])
        width = min(register_lanes(), mixed.lanes)
        results = []
        for part in range(parts):
            mask = lane_mask(8) if part == parts - 1 else lane_mask(bits * (part + 1))
            low = args[1] if part == parts - 1 else builder.and_(args[1], _constant(mixed, mask))
            lanes = range(part * mixed.lanes, (part + 1) * mixed.lanes)
            total = builder.shuffle_vector(args[0], args[0], _order(lanes))
            results.append(
                _by_width(builder, mixed, (total, low, factor), width, lambda x: _dot(builder, x))
            )
        return _concatenate(builder, results)

    return signature(acc, acc, mixed, types.int32), codegen


def _byte_places(lanes: int) -> list[int]:
    """In which lane of :func:`vmix` of so many words each byte is."""
    places = []
    for byte in range(ROWS * lanes):
        lane, place = divmod(byte, _LANE_BYTES)
        places.append(place // 4 * lanes + 4 * lane + place % 4)
    return places


@intrinsic
def vunmix(typingctx, acc, like):
    """The sums of :func:`vadd_mixed` in the order of :func:`.simd.vspread`; ``like`` has the lanes of a row's words."""
    parts = acc.lanes // (ROWS * like.lanes)
    bits = 8 // parts
    mixed = Vector("i32", ROWS * like.lanes)

    def codegen(context, builder, sig, args):
        order = _order(_byte_places(like.lanes))
        results, below = [], None
        for part in range(parts):
            lanes = range(part * mixed.lanes, (part + 1) * mixed.lanes)
            total = builder.shuffle_vector(args[0], args[0], _order(lanes))
            own = total if below is None else builder.sub(total, below)
            own = builder.lshr(own, _constant(mixed, bits * part)) if part else own
            results.append(builder.shuffle_vector(own, own, order))
            below = total
        return _concatenate(builder, results)

    return signature(acc, acc, like), codegen


# Where the codes of a part are looked at, by width: how far a word is shifted, and the part then kept.  Codes below
# eight bits are the signed operand beside weights of a byte, so none may have the top bit of its own.
_PLACES = {2: ((0, 0), (0, 1), (0, 2), (2, 2)), 4: ((0, 0), (4, 0)), 8: ((0, 0),)}


def _isolated(builder, mixed: Vector, words, bits: int, part: int):
    shift, place = _PLACES[bits][part]
    if shift:
        words = builder.lshr(words, _constant(mixed, shift))
    return builder.and_(words, _constant(mixed, lane_mask(bits) << (bits * place)))


@intrinsic
def vadd_heads(typingctx, acc, mixed, like, weights, base, table, start, lanewise):
    """Add what four rows, :func:`vmix`, times the weights of each head, come to.

    Head ``h`` has its four weights, bytes from 0 to 255 (to 127 beside codes of eight bits), in the int32 number
    ``weights[base + h]``.  ``table[start]`` on
    has the head of every sixteen words of every part, or of every lane of ``acc`` where ``lanewise`` is not None; then
    sixteen numbers are read from ``weights``.  ``like`` has the lanes of a row's words; :func:`vunmix_heads` ends it.
    """
    parts = acc.lanes // mixed.lanes
    bits = 8 // parts
    groups = max(1, like.lanes // 16)

    def codegen(context, builder, sig, args):
        def head_weight(at):
            head = builder.load(_pointer(context, builder, table, args[5], builder.add(args[6], ir.IntType(64)(at))))
            at = builder.add(args[4], builder.sext(head, ir.IntType(64)))
            return builder.load(_pointer(context, builder, weights, args[3], at))

        def spread(part):
            """The weights of a part's lanes."""
            if isinstance(lanewise, types.NoneType):
                width = min(like.lanes, 16)
                one = Vector("i32", width)
                found = [_splat(builder, one, head_weight(part * groups + j)) for j in range(groups)]
                row = _concatenate(builder, found)
                return _concatenate(builder, [row] * ROWS)
            zmm = Vector("i32", 16)
            pointer = _vector_pointer(context, builder, weights, args[3], args[4], zmm)
            all_heads = builder.load(pointer, align=4)
            lanes = []
            for k in range(part * mixed.lanes, (part + 1) * mixed.lanes, 16):
                at = builder.add(args[6], ir.IntType(64)(k))
                index = builder.load(_vector_pointer(context, builder, table, args[5], at, zmm), align=4)
                lanes.append(_call(builder, "llvm.x86.avx512.permvar.si.512", zmm.llvm, [all_heads, index]))
            return _concatenate(builder, lanes)

        width = min(register_lanes(), mixed.lanes)
        results = []
        for part in range(parts):
            lanes = _order(range(part * mixed.lanes, (part + 1) * mixed.lanes))
            total = builder.shuffle_vector(args[0], args[0], lanes)
            factors, codes = spread(part), _isolated(builder, mixed, args[1], bits, part)
            operands = (total, codes, factors) if bits == 8 else (total, factors, codes)
            results.append(_by_width(builder, mixed, operands, width, lambda x: _dot(builder, x)))
        return _concatenate(builder, results)

    offsets = (types.intp, table, types.intp)
    return signature(acc, acc, mixed, like, weights, *offsets, lanewise), codegen


@intrinsic
def vunmix_heads(typingctx, acc, like):
    """The sums of :func:`vadd_heads` in the order of :func:`.simd.vspread`; ``like`` has the lanes of a row's words."""
    mixed = Vector("i32", ROWS * like.lanes)
    parts = acc.lanes // mixed.lanes
    bits = 8 // parts

    def codegen(context, builder, sig, args):
        order = _order(_byte_places(like.lanes))
        results = []
        for part in range(parts):
            lanes = range(part * mixed.lanes, (part + 1) * mixed.lanes)
            own = builder.shuffle_vector(args[0], args[0], _order(lanes))
            place = _PLACES[bits][part][1]
            own = builder.lshr(own, _constant(mixed, bits * place)) if place else own
            results.append(builder.shuffle_vector(own, own, order))
        return _concatenate(builder, results)

    return signature(acc, acc, like), codegen


@intrinsic
def vquads(typingctx, lanes, like):
    """Bytes of edges and heads, ``[edges, heads]``, as ``[edges / 4, heads, 4]``; ``like`` has a lane for each head."""
    heads = like.lanes

    def codegen(context, builder, sig, args):
        order = [
            (quad * ROWS + e) * heads + h
            for quad in range(lanes.lanes // (ROWS * heads))
            for h in range(heads)
            for e in range(ROWS)
        ]
        return builder.shuffle_vector(args[0], args[0], _order(order))

    return signature(lanes, lanes, like), codegen
