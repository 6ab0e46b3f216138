"""Operators and functions of vectors, lane by lane and over lanes."""
# mypy: ignore-errors

from __future__ import annotations

import operator

from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

from .vectors import (
    _ELEMENTS,
    _OF_DTYPE,
    _SCALARS,
    _ZMM,
    Vector,
    _by_register,
    _call,
    _constant,
    _first_lanes,
    _order,
    _splat,
    _suffix,
)


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
def vclimb(typingctx, total, value, threshold, amount):
    """``total + amount`` in the int32 lanes where ``value`` reaches ``threshold``, both of float lanes."""

    def codegen(context, builder, sig, args):
        reached = builder.fcmp_ordered(">=", args[1], args[2])
        return builder.add(args[0], builder.select(reached, _splat(builder, total, args[3]), _constant(total, 0)))

    return signature(total, total, value, value, types.int32), codegen


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
                orders = (range(lanes), range(lanes, 2 * lanes))
                if name == "vrun_sum":
                    orders = (range(0, 2 * lanes, 2), range(1, 2 * lanes, 2))
                halves = [builder.shuffle_vector(value, value, _order(order)) for order in orders]
                if name != "vfold_max":
                    value = (builder.fadd if v.is_float else builder.add)(*halves)
                else:
                    value = builder.select(builder.fcmp_ordered(">", *halves), *halves)
            return value

        return signature(Vector(v.element, like.lanes), v, like), codegen

    impl.__name__ = name
    return intrinsic(impl)


vfold_max = _fold("vfold_max")  # of float lanes that repeat with the period of ``like``
vrun_sum = _fold("vrun_sum")  # sums of runs of neighbouring lanes, as many as ``like`` has lanes
vfold_sum = _fold("vfold_sum")  # their sums, of floats by halves: lane ``k`` of the lower one plus ``k`` of the upper


@intrinsic
def vsum(typingctx, a):
    """The sum of the integer lanes, modulo 2^32."""

    def codegen(context, builder, sig, args):
        return _call(builder, f"llvm.vector.reduce.add.{_suffix(a)}", _ELEMENTS[a.element], args)

    return signature(_SCALARS[a.element], a), codegen


@intrinsic
def vabs(typingctx, a):
    """The absolute values of float lanes."""
    return signature(a, a), lambda context, builder, sig, args: _call(builder, f"llvm.fabs.{_suffix(a)}", a.llvm, args)


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
