"""Loads and stores: of vectors, of numbers and of cache lines."""
# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from .vectors import (
    _OF_DTYPE,
    _ZMM,
    Raw,
    Vector,
    _alignment,
    _call,
    _concatenate,
    _constant,
    _first_lanes,
    _pointer,
    _shaped,
    _splat,
    _store_masked,
    _suffix,
    _vector_pointer,
)


@intrinsic
def raw(typingctx, array):
    """The data of ``array``, which must outlive it; every load and store here takes either.

    numba counts a reference whenever an array enters a function: atomics that a loop over short
    rows would mostly wait for.
    """

    def codegen(context, builder, sig, args):
        return context.make_array(array)(context, builder, args[0]).data

    return signature(Raw(array.dtype), array), codegen


@intrinsic
def raw_at(typingctx, address, kind):
    """The data at ``address``, of what ``kind`` is a number of."""
    data = Raw(kind.dtype)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(data))

    return signature(data, types.int64, kind), codegen


@intrinsic
def raw_aligned(typingctx, data):
    """The float32 numbers from the first address of ``data``, :func:`raw`, on that is a multiple of 64."""
    floats = Raw(types.float32)

    def codegen(context, builder, sig, args):
        address = builder.ptrtoint(args[0], ir.IntType(64))
        address = builder.and_(builder.add(address, ir.IntType(64)(63)), ir.IntType(64)(-64))
        return builder.inttoptr(address, context.get_value_type(floats))

    return signature(floats, data), codegen


@intrinsic
def keep(typingctx, array):
    """Do nothing, after the last use of ``raw(array)``: numba frees an array after its own last use."""
    return signature(types.void, array), lambda context, *_: context.get_dummy_value()


@intrinsic(prefer_literal=True)
def vload(typingctx, array, offset, like):
    """``array[offset : offset + lanes]``; ``like`` is the number of lanes or such a vector."""
    vector = _shaped(array, like)

    def codegen(context, builder, sig, args):
        pointer = _vector_pointer(context, builder, array, args[0], args[1], vector)
        return builder.load(pointer, align=_alignment(vector))

    return signature(vector, array, types.intp, like), codegen


@intrinsic(prefer_literal=True)
def vload_first(typingctx, array, offset, like, count):
    """The first ``count`` elements of ``array[offset : offset + lanes]``, then zeros; no other is
    read.

    A ``count`` of :obj:`None` stands for all lanes.
    """
    vector = _shaped(array, like)
    whole = isinstance(count, types.NoneType)

    def codegen(context, builder, sig, args):
        pointer = _vector_pointer(context, builder, array, args[0], args[1], vector)
        if whole:
            return builder.load(pointer, align=_alignment(vector))
        mask = _first_lanes(builder, vector, args[3])
        alignment = ir.Constant(ir.IntType(32), _alignment(vector))
        name = f"llvm.masked.load.{_suffix(vector)}.p0"
        return _call(builder, name, vector.llvm, [pointer, alignment, mask, _constant(vector, 0)])

    return signature(vector, array, types.intp, like, count if whole else types.intp), codegen


@intrinsic
def vgather(typingctx, array, index):
    """``array[index]`` for int32 lanes of ``index``."""
    vector = Vector(_OF_DTYPE[array.dtype], index.lanes)

    def codegen(context, builder, sig, args):
        long = ir.VectorType(ir.IntType(64), vector.lanes)
        start = _pointer(context, builder, array, args[0], ir.IntType(64)(0))
        size = ir.Constant(long, [_alignment(vector)] * vector.lanes)
        start = _splat(builder, Vector("i64", vector.lanes), builder.ptrtoint(start, ir.IntType(64)))
        address = builder.add(start, builder.mul(builder.zext(args[1], long), size))
        pointers = ir.VectorType(vector.llvm.element.as_pointer(), vector.lanes)
        alignment = ir.Constant(ir.IntType(32), _alignment(vector))
        mask = ir.Constant(ir.VectorType(ir.IntType(1), vector.lanes), [True] * vector.lanes)
        name = f"llvm.masked.gather.{_suffix(vector)}.v{vector.lanes}p0"
        found = [builder.inttoptr(address, pointers), alignment, mask, _constant(vector, 0)]
        return _call(builder, name, vector.llvm, found)

    return signature(vector, array, index), codegen


@intrinsic(prefer_literal=True)
def vlive(typingctx, count, whole):
    """``count``, or :obj:`None` with the constant ``whole = 1``: what :func:`vload_first` takes."""
    if whole.literal_value:
        return signature(types.none, types.intp, whole), lambda context, *_: context.get_dummy_value()
    return signature(types.intp, types.intp, whole), lambda context, builder, sig, args: args[0]


_LINE_BYTES = 64


def _store(name: str, nontemporal: bool):
    def impl(typingctx, array, offset, value):
        def codegen(context, builder, sig, args):
            pointer = _vector_pointer(context, builder, array, args[0], args[1], value)
            size = _alignment(value) * value.lanes
            lanes_bytes = min(_LINE_BYTES, size) if nontemporal else _alignment(value)
            store = builder.store(args[2], pointer, align=lanes_bytes)
            if nontemporal:
                node = builder.module.add_metadata([ir.IntType(32)(1)])
                store.set_metadata("nontemporal", node)
            return context.get_dummy_value()

        return signature(types.void, array, types.intp, value), codegen

    impl.__name__ = name
    return intrinsic(impl)


vstore = _store("vstore", nontemporal=False)
vstream = _store("vstream", nontemporal=True)  # to whole cache lines


@intrinsic
def vstore_first(typingctx, array, offset, value, count):
    """Store the first ``count`` lanes at ``array[offset]``, or all with a ``count`` of :obj:`None`."""
    whole = isinstance(count, types.NoneType)

    def codegen(context, builder, sig, args):
        pointer = _vector_pointer(context, builder, array, args[0], args[1], value)
        mask = None if whole else _first_lanes(builder, value, args[3])
        _store_masked(builder, args[2], pointer, mask, value)
        return context.get_dummy_value()

    return signature(types.void, array, types.intp, value, count if whole else types.intp), codegen


@intrinsic
def peek(typingctx, array, offset):
    """``array[offset]`` of the flattened array, without numba's handling of negative indices."""

    def codegen(context, builder, sig, args):
        return builder.load(_pointer(context, builder, array, args[0], args[1]))

    return signature(array.dtype, array, types.intp), codegen


@intrinsic
def poke(typingctx, array, offset, value):
    """Set ``array[offset]`` of the flattened array to a number."""

    def codegen(context, builder, sig, args):
        number = context.cast(builder, args[2], value, array.dtype)
        builder.store(number, _pointer(context, builder, array, args[0], args[1]))
        return context.get_dummy_value()

    return signature(types.void, array, types.intp, value), codegen


@intrinsic
def vheads(typingctx, weights, base, heads, shift, like, lanewise):
    """``weights[base + heads[shift + lane]]`` in as many float lanes as ``like``.

    ``heads`` of :obj:`None` stands for zeros; ``lanewise`` of :obj:`None` promises that each
    sixteen lanes share a head, so that one load serves them.
    """
    vector, group = Vector("f32", like.lanes), Vector("f32", _ZMM)

    def weight(context, builder, args, lane):
        at = builder.add(args[3], ir.IntType(64)(lane))
        head = builder.load(_pointer(context, builder, heads, args[2], at))
        at = builder.add(args[1], builder.sext(head, ir.IntType(64)))
        return builder.load(_pointer(context, builder, weights, args[0], at))

    def codegen(context, builder, sig, args):
        if isinstance(heads, types.NoneType):
            value = builder.load(_pointer(context, builder, weights, args[0], args[1]))
            return _splat(builder, vector, value)
        groups = []
        for start in range(0, like.lanes, _ZMM):
            if isinstance(lanewise, types.NoneType):
                groups.append(_splat(builder, group, weight(context, builder, args, start)))
                continue
            lanes = ir.Constant(group.llvm, ir.Undefined)
            for lane in range(_ZMM):
                value = weight(context, builder, args, start + lane)
                lanes = builder.insert_element(lanes, value, ir.IntType(32)(lane))
            groups.append(lanes)
        return _concatenate(builder, groups)

    offsets = (types.intp, heads, types.intp)
    return signature(vector, weights, *offsets, like, lanewise), codegen


@intrinsic
def prefetch(typingctx, array, offset):
    """Bring the cache line that holds ``array[offset]`` into the second-level cache."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, array, args[0], args[1])
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, word(0), word(2), word(1)])
        return context.get_dummy_value()

    return signature(types.void, array, types.intp), codegen


@intrinsic
def atomic_add(typingctx, array, offset, value):
    """Add to ``array[offset]`` (int64) atomically and return the previous value."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, array, args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "monotonic")

    return signature(types.int64, array, types.intp, types.int64), codegen
