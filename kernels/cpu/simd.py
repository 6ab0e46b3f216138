"""Explicit vectors inside numba kernels: a value type over LLVM vectors, with loads, stores,
arithmetic and casts.

A ``Vector(element, lanes)`` lives in registers.  LLVM legalizes any power-of-two number of lanes to
what the machine has (AVX-512, AVX2, SSE, NEON), so a kernel is written once.  Integer lanes are
unsigned where it matters (shifts, casts, ``vmax``). Float operations carry no fast-math flags: LLVM
neither contracts nor reassociates them.

``array`` arguments are C-contiguous, ``offset`` counts elements from the start of the array's data,
and nothing is bounds-checked.
"""
# mypy: ignore-errors

from __future__ import annotations

import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from ..layout import lane_mask

__all__ = [
    "Vector",
    "atomic_add",
    "keep",
    "peek",
    "poke",
    "prefetch",
    "raw",
    "raw_aligned",
    "raw_at",
    "vabs",
    "vcast",
    "vdot",
    "vfirst",
    "vfma",
    "vfold_max",
    "vfold_sum",
    "vfull_adder",
    "vheads",
    "vjoin",
    "vlanes",
    "vlive",
    "vload",
    "vload_first",
    "vmax",
    "vmin",
    "vpositive",
    "vreach",
    "vround",
    "vsplat",
    "vspread",
    "vstep",
    "vstore",
    "vstore_first",
    "vstore_parts",
    "vstream",
    "vsum",
    "vtile",
    "vtop",
    "vview",
    "vwithin",
]

_ELEMENTS = {
    "u8": ir.IntType(8),
    "u16": ir.IntType(16),
    "i32": ir.IntType(32),
    "i64": ir.IntType(64),
    "f32": ir.FloatType(),
}
_SCALARS = {
    "u8": types.uint8,
    "u16": types.uint16,
    "i32": types.int32,
    "i64": types.int64,
    "f32": types.float32,
}
_OF_DTYPE = {
    types.uint8: "u8",
    types.uint16: "u16",
    types.int32: "i32",
    types.int64: "i64",
    types.float32: "f32",
}


class Vector(types.Type):
    """The numba type of ``lanes`` elements (``"u8"``, ``"u16"``, ``"i32"`` or ``"f32"``) in a
    register.
    """

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"Vector({element}x{lanes})")

    @property
    def is_float(self) -> bool:
        return self.element == "f32"

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_ELEMENTS[self.element], self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


class Raw(types.Type):
    """The data of an array without its owner: passing it on counts no references."""

    def __init__(self, dtype) -> None:
        self.dtype = dtype
        super().__init__(name=f"Raw({dtype})")


@register_model(Raw)
class _RawModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, dmm.lookup(fe_type.dtype).get_data_type().as_pointer())


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


def _constant(vector: Vector, value: int | float) -> ir.Constant:
    return ir.Constant(vector.llvm, [value] * vector.lanes)


def _call(builder, name: str, result, args):
    """Call an LLVM intrinsic, declared on first use."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, args)


def _suffix(vector: Vector) -> str:
    prefix = "f32" if vector.is_float else f"i{_ELEMENTS[vector.element].width}"
    return f"v{vector.lanes}{prefix}"


# -- arithmetic ------------------------------------------------------------------------------------


def _binary(op, int_name: str, float_name: str | None) -> None:
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(op, Vector, Vector)
    def _lower(context, builder, sig, args):
        name = float_name if sig.return_type.is_float else int_name
        return getattr(builder, name)(*args)


_binary(operator.add, "add", "fadd")
_binary(operator.sub, "sub", "fsub")
_binary(operator.mul, "mul", "fmul")
_binary(operator.truediv, "udiv", "fdiv")
_binary(operator.and_, "and_", None)
_binary(operator.or_, "or_", None)
_binary(operator.xor, "xor", None)


def _shift(op, name: str) -> None:
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vector) and isinstance(args[1], types.Integer):
                return signature(args[0], args[0], types.int64)
            return None

    @lower_builtin(op, Vector, types.Integer)
    def _lower(context, builder, sig, args):
        vector = sig.return_type
        count = builder.trunc(args[1], _ELEMENTS[vector.element]) if vector.element != "i64" else args[1]
        return getattr(builder, name)(args[0], _splat(builder, vector, count))


_shift(operator.rshift, "lshr")
_shift(operator.lshift, "shl")


def _splat(builder, vector: Vector, value):
    seed = builder.insert_element(ir.Constant(vector.llvm, ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(seed, seed, ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), None))


@intrinsic(prefer_literal=True)
def vsplat(typingctx, value, like):
    """All lanes equal to a float or integer scalar, as float32 or int32 lanes.

    ``like`` is the number of lanes or a vector with as many.
    """
    lanes = like.lanes if isinstance(like, Vector) else like.literal_value
    vector = Vector("f32" if isinstance(value, types.Float) else "i32", lanes)
    scalar = _SCALARS[vector.element]

    def codegen(context, builder, sig, args):
        return _splat(builder, vector, context.cast(builder, args[0], sig.args[0], scalar))

    return signature(vector, value, like), codegen


@intrinsic
def vfma(typingctx, a, b, c):
    """``a * b + c`` in one rounding (float lanes)."""

    def codegen(context, builder, sig, args):
        return _call(builder, f"llvm.fma.{_suffix(a)}", a.llvm, args)

    return signature(a, a, a, a), codegen


_ZMM = 16  # int32 lanes of an AVX-512 register


def _by_register(builder, vector: Vector, args, one):
    """Apply ``one`` to the register-sized slices of the arguments and join the results."""
    return _by_width(builder, vector, args, _ZMM, one)


def _by_width(builder, vector: Vector, args, width: int, one):
    """Apply ``one`` to slices of ``width`` lanes of the arguments and join the results."""
    results = []
    for start in range(0, vector.lanes, width):
        order = _order(range(start, start + width))
        results.append(one([builder.shuffle_vector(x, x, order) for x in args]))
    return _concatenate(builder, results)


_XOR3, _MAJORITY = 0x96, 0xE8  # truth tables of vpternlog


def _full_adder(context, builder, vector: Vector, a, b, c):
    """Bitwise sum and carry of three words; two instructions where AVX-512 is at hand."""
    features = getattr(context.codegen(), "_tm_features", "")
    if vector.lanes % _ZMM == 0 and "+avx512f" in features:
        # LLVM shares a ^ b between the two trees and so misses the second ternary instruction.
        def ternary(table: int):
            def one(parts):
                name = "llvm.x86.avx512.pternlog.d.512"
                return _call(builder, name, parts[0].type, [*parts, ir.IntType(32)(table)])

            return _by_register(builder, vector, (a, b, c), one)

        return ternary(_XOR3), ternary(_MAJORITY)
    half = builder.xor(a, b)
    carry = builder.or_(builder.and_(a, b), builder.and_(half, c))
    return builder.xor(half, c), carry


@intrinsic
def vfull_adder(typingctx, a, b, c):
    """``(sum, carry)`` of three words, each bit on its own: ``a + b + c = sum + 2 carry``."""
    pair = types.UniTuple(a, 2)

    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, pair, _full_adder(context, builder, a, *args))

    return signature(pair, a, a, a), codegen


def _select(name: str, comparison: str):
    def impl(typingctx, a, b):
        def codegen(context, builder, sig, args):
            if a.is_float:
                chosen = builder.fcmp_ordered(comparison, *args)
            else:
                chosen = builder.icmp_unsigned(comparison, *args)
            return builder.select(chosen, *args)

        return signature(a, a, a), codegen

    impl.__name__ = name
    return intrinsic(impl)


vmax = _select("vmax", ">")  # the second operand where either is NaN
vmin = _select("vmin", "<")


@intrinsic
def vwithin(typingctx, v, low, high, inside, outside):
    """``inside`` where ``low <= v <= high``, else ``outside``, on float lanes."""

    def codegen(context, builder, sig, args):
        above = builder.fcmp_ordered(">=", args[0], args[1])
        below = builder.fcmp_ordered("<=", args[0], args[2])
        return builder.select(builder.and_(above, below), args[3], args[4])

    return signature(v, v, v, v, v, v), codegen


@intrinsic
def vstep(typingctx, total, value, threshold, amount):
    """``total + amount`` where ``value >= threshold``, else ``total``.

    ``value`` has unsigned lanes, ``threshold`` and ``amount`` are integers that fit those of ``value`` and ``total``.
    """

    def codegen(context, builder, sig, args):
        bound = builder.trunc(args[2], _ELEMENTS[value.element])
        chosen = builder.icmp_unsigned(">=", args[1], _splat(builder, value, bound))
        amounts = _splat(builder, total, builder.trunc(args[3], _ELEMENTS[total.element]))
        return builder.add(args[0], builder.select(chosen, amounts, _constant(total, 0)))

    return signature(total, total, value, types.int64, types.int64), codegen


@intrinsic
def vreach(typingctx, total, value, threshold):
    """``total + 1`` in the int32 lanes where a float lane of ``value`` reaches the scalar ``threshold``."""

    def codegen(context, builder, sig, args):
        reached = builder.fcmp_ordered(">=", args[1], _splat(builder, value, args[2]))
        return builder.add(args[0], builder.zext(reached, total.llvm))

    return signature(total, total, value, types.float32), codegen


@intrinsic
def vpositive(typingctx, v, positive, otherwise):
    """``positive`` where ``v > 0``, else ``otherwise``, on float lanes."""

    def codegen(context, builder, sig, args):
        chosen = builder.fcmp_ordered(">", args[0], _constant(v, 0.0))
        return builder.select(chosen, args[1], args[2])

    return signature(v, v, v, v), codegen


@intrinsic
def vfirst(typingctx, v, count, otherwise):
    """The first ``count`` lanes of ``v``, and those of ``otherwise``."""

    def codegen(context, builder, sig, args):
        return builder.select(_first_lanes(builder, v, args[1]), args[0], args[2])

    return signature(v, v, types.intp, v), codegen


@intrinsic
def vtile(typingctx, v, like):
    """``v`` over and over in as many lanes as ``like``."""
    vector = Vector(v.element, like.lanes)

    def codegen(context, builder, sig, args):
        return builder.shuffle_vector(args[0], args[0], _order([k % v.lanes for k in range(like.lanes)]))

    return signature(vector, v, like), codegen


def _fold(name: str):
    def impl(typingctx, v, like):
        def codegen(context, builder, sig, args):
            value, lanes = args[0], v.lanes
            while lanes > like.lanes:
                lanes //= 2
                halves = [
                    builder.shuffle_vector(value, value, _order(range(k, k + lanes))) for k in (0, lanes)
                ]
                if name == "vfold_sum":
                    value = builder.add(*halves)
                else:
                    value = builder.select(builder.fcmp_ordered(">", *halves), *halves)
            return value

        return signature(Vector(v.element, like.lanes), v, like), codegen

    impl.__name__ = name
    return intrinsic(impl)


vfold_max = _fold("vfold_max")  # of float lanes that repeat with the period of ``like``
vfold_sum = _fold("vfold_sum")  # the same of integers


@intrinsic
def vdot(typingctx, acc, unsigned, signed):
    """``acc + sum of four products`` per int32 lane, of bytes without and with sign (VNNI)."""

    def codegen(context, builder, sig, args):
        features = getattr(context.codegen(), "_tm_features", "")
        if acc.lanes % _ZMM == 0 and "+avx512vnni" in features:
            name = "llvm.x86.avx512.vpdpbusd.512"
            return _by_register(builder, acc, args, lambda parts: _dot_vnni(builder, name, parts))
        total = args[0]
        for byte in range(4):
            a = builder.lshr(args[1], _constant(acc, 8 * byte))
            a = builder.and_(a, _constant(acc, 255))
            b = builder.shl(args[2], _constant(acc, 24 - 8 * byte))
            b = builder.ashr(b, _constant(acc, 24))
            total = builder.add(total, builder.mul(a, b))
        return total

    return signature(acc, acc, acc, acc), codegen


def _dot_vnni(builder, name: str, parts):
    lanes = parts[0].type
    as_bytes = Vector("u8", 4 * _ZMM).llvm
    args = [parts[0], *(builder.bitcast(part, as_bytes) for part in parts[1:])]
    return _call(builder, name, lanes, args)


@intrinsic
def vsum(typingctx, a):
    """The sum of the integer lanes, modulo 2^32."""

    def codegen(context, builder, sig, args):
        return _call(builder, f"llvm.vector.reduce.add.{_suffix(a)}", _ELEMENTS[a.element], args)

    return signature(_SCALARS[a.element], a), codegen


@intrinsic
def vabs(typingctx, a):
    """The absolute values of float lanes."""
    return signature(a, a), lambda context, builder, sig, args: _call(
        builder, f"llvm.fabs.{_suffix(a)}", a.llvm, args
    )


@intrinsic
def vtop(typingctx, a):
    """The largest of the lanes: unsigned, or of floats that are neither negative nor NaN, which compare as integers."""
    lanes = Vector("i32", a.lanes) if a.is_float else a

    def codegen(context, builder, sig, args):
        value = builder.bitcast(args[0], lanes.llvm)
        top = _call(builder, f"llvm.vector.reduce.umax.{_suffix(lanes)}", _ELEMENTS[lanes.element], [value])
        return builder.bitcast(top, _ELEMENTS[a.element])

    return signature(_SCALARS[a.element], a), codegen


@intrinsic(prefer_literal=True)
def vcast(typingctx, a, element):
    """Convert the lanes: integers are zero-extended or truncated, int32 and float32 convert as
    signed values.
    """
    target = Vector(element.literal_value, a.lanes)

    def codegen(context, builder, sig, args):
        if target.is_float and a.is_float:
            return args[0]
        if target.is_float:
            convert = builder.sitofp if a.element[0] == "i" else builder.uitofp
            return convert(args[0], target.llvm)
        if a.is_float:
            return builder.fptosi(args[0], target.llvm)
        old, new = _ELEMENTS[a.element].width, _ELEMENTS[target.element].width
        if new == old:
            return args[0]
        return (builder.zext if new > old else builder.trunc)(args[0], target.llvm)

    return signature(target, a, element), codegen


@intrinsic
def vround(typingctx, a, array):
    """Float lanes converted to the elements of ``array``: themselves, or whole numbers."""
    target = Vector(_OF_DTYPE[array.dtype], a.lanes)

    def codegen(context, builder, sig, args):
        return args[0] if target.is_float else builder.fptosi(args[0], target.llvm)

    return signature(target, a, array), codegen


@intrinsic(prefer_literal=True)
def vview(typingctx, a, element):
    """Reinterpret the register's bits as lanes of another element."""
    bits = 32 if a.is_float else _ELEMENTS[a.element].width
    name = element.literal_value
    width = 32 if name == "f32" else _ELEMENTS[name].width
    target = Vector(name, a.lanes * bits // width)

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], target.llvm)

    return signature(target, a, element), codegen


# -- memory --------------------------------------------------------------------------------------


def _pointer(context, builder, array_type, array, offset):
    if isinstance(array_type, Raw):
        return builder.gep(array, [offset])
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


def _vector_pointer(context, builder, array_type, array, offset, vector: Vector):
    pointer = _pointer(context, builder, array_type, array, offset)
    return builder.bitcast(pointer, vector.llvm.as_pointer())


def _first_lanes(builder, vector: Vector, count):
    """The mask of lanes below ``count``."""
    index = Vector("i32", vector.lanes)
    lanes = ir.Constant(index.llvm, list(range(vector.lanes)))
    count = builder.trunc(count, ir.IntType(32))
    return builder.icmp_signed("<", lanes, _splat(builder, index, count))


def _alignment(vector: Vector) -> int:
    return _ELEMENTS[vector.element].width // 8 if not vector.is_float else 4


def _shaped(array, like) -> Vector:
    """The vector of ``array``'s elements with as many lanes as ``like``, a constant or a vector."""
    lanes = like.lanes if isinstance(like, Vector) else like.literal_value
    return Vector(_OF_DTYPE[array.dtype], lanes)


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


# -- packed codes ----------------------------------------------------------------------------------


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


def _order(lanes):
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))


def _store_masked(builder, value, pointer, mask, vector: Vector) -> None:
    if mask is None:
        builder.store(value, pointer, align=_alignment(vector))
        return
    alignment = ir.Constant(ir.IntType(32), _alignment(vector))
    name = f"llvm.masked.store.{_suffix(vector)}.p0"
    _call(builder, name, ir.VoidType(), [value, pointer, alignment, mask])


def _concatenate(builder, vectors):
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        count = 2 * vectors[0].type.count
        vectors = [builder.shuffle_vector(a, b, _order(range(count))) for a, b in pairs]
    return vectors[0]
