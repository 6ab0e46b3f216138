"""Packed codes in vectors."""
# mypy: ignore-errors

from __future__ import annotations

from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from ...layout import lane_mask
from .vectors import (
    Vector,
    _alignment,
    _concatenate,
    _constant,
    _first_lanes,
    _order,
    _shaped,
    _store_masked,
    _vector_pointer,
)


@intrinsic(prefer_literal=True)
def vlanes(typingctx, element, lanes):
    """A zero vector, to carry a type."""
    vector = Vector(element.literal_value, lanes.literal_value)
    return signature(vector, element, lanes), lambda context, *_: _constant(vector, 0)


@intrinsic
def vspread(typingctx, words, like):
    """Unpack int32 lanes of codes into the lanes of ``like`` (``u8`` or wider), part after part.

    The width of the codes follows from the two types.
    """
    chunk = 4 * words.lanes
    parts = like.lanes // chunk
    bits = 8 // parts
    codes = Vector("u8", chunk)

    def codegen(context, builder, sig, args):
        lanes = []
        for part in range(parts):
            shifted = builder.lshr(args[0], _constant(words, bits * part)) if part else args[0]
            if parts > 1:
                shifted = builder.and_(shifted, _constant(words, lane_mask(bits)))
            lanes.append(builder.bitcast(shifted, codes.llvm))
        joined = _concatenate(builder, lanes)
        return joined if like.element == "u8" else builder.zext(joined, like.llvm)

    return signature(like, words, like), codegen


@intrinsic
def vjoin(typingctx, lanes, like):
    """Pack ``u8`` lanes of codes into the int32 lanes of ``like``: :func:`vspread`, turned round."""
    chunk = 4 * like.lanes
    parts = lanes.lanes // chunk

    def codegen(context, builder, sig, args):
        word = None
        for part in range(parts):
            codes = builder.shuffle_vector(args[0], args[0], _order(range(part * chunk, (part + 1) * chunk)))
            shifted = builder.bitcast(codes, like.llvm)
            if part:
                shifted = builder.shl(shifted, _constant(like, 8 // parts * part))
            word = shifted if word is None else builder.or_(word, shifted)
        return word

    return signature(like, lanes, like), codegen


@intrinsic(prefer_literal=True)
def vload_parts(typingctx, array, offset, step, like, parts):
    """Lanes of ``like`` from slices that :func:`vstore_parts` stores there."""
    vector = _shaped(array, like)
    piece = Vector(vector.element, vector.lanes // parts.literal_value)

    def codegen(context, builder, sig, args):
        slices, position = [], args[1]
        for _ in range(parts.literal_value):
            pointer = _vector_pointer(context, builder, array, args[0], position, piece)
            slices.append(builder.load(pointer, align=_alignment(piece)))
            position = builder.add(position, args[2])
        return _concatenate(builder, slices)

    return signature(vector, array, types.intp, types.intp, like, parts), codegen


@intrinsic(prefer_literal=True)
def vstore_parts(typingctx, array, offset, step, value, parts, count):
    """Store ``parts`` equal slices of ``value`` at ``offset``, ``offset + step``, ...

    Of each slice the first ``count`` lanes are stored, or all with a ``count`` of :obj:`None`.
    """
    piece = Vector(value.element, value.lanes // parts.literal_value)
    whole = isinstance(count, types.NoneType)

    def codegen(context, builder, sig, args):
        mask = None if whole else _first_lanes(builder, piece, args[5])
        position = args[1]
        for part in range(parts.literal_value):
            lanes = range(part * piece.lanes, (part + 1) * piece.lanes)
            chosen = builder.shuffle_vector(args[3], args[3], _order(lanes))
            pointer = _vector_pointer(context, builder, array, args[0], position, piece)
            _store_masked(builder, chosen, pointer, mask, piece)
            position = builder.add(position, args[2])
        return context.get_dummy_value()

    offsets = (types.intp, types.intp)
    count = count if whole else types.intp
    return signature(types.void, array, *offsets, value, parts, count), codegen
