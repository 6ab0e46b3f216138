"""What generated kernels add to :mod:`..cpu.simd`: loads and sums by fixed patterns of lanes, functions of vectors.

A tile of a row has ``parts * lanes`` numbers in a vector: lane ``p * lanes + k`` holds the feature ``p * step + first +
k``, as codes come out of packed words (:mod:`..layout`).  Lanes beyond ``width`` hold zeros where they were loaded.
"""
# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from ..cpu.simd import (
    Vector,
    vcast,
    vfma,
    vmax,
    vmin,
    vsplat,
    vview,
)
from ..cpu.simd.vectors import (
    _alignment,
    _call,
    _concatenate,
    _constant,
    _order,
    _suffix,
    _vector_pointer,
)
from ..layout import next_power_of_two

__all__ = [
    "vabove",
    "vabs",
    "vexp",
    "vexpm1",
    "vgreater",
    "vhead_sum",
    "vleaky",
    "vload_tile",
    "vlog",
    "vlog1p",
    "vneg",
    "vpattern",
    "vrelu",
    "vsigmoid",
    "vsoftplus",
    "vsqrt",
    "vstore_tile",
    "vtanh",
    "vwhere",
]


def _mask(lanes: int, count: int):
    return ir.Constant(ir.VectorType(ir.IntType(1), lanes), [int(k < count) for k in range(lanes)])


def _load(context, builder, array_type, array, offset, vector: Vector, count: int):
    """The first ``count`` lanes from memory, then zeros."""
    if count <= 0:
        return _constant(vector, 0)
    pointer = _vector_pointer(context, builder, array_type, array, offset, vector)
    if count >= vector.lanes:
        return builder.load(pointer, align=_alignment(vector))
    alignment = ir.Constant(ir.IntType(32), _alignment(vector))
    args = [pointer, alignment, _mask(vector.lanes, count), _constant(vector, 0)]
    return _call(builder, f"llvm.masked.load.{_suffix(vector)}.p0", vector.llvm, args)


@intrinsic(prefer_literal=True)
def vload_tile(typingctx, array, base, first, step, parts, lanes, width):
    """Features of a float32 row at ``array[base]``, in the lanes of a tile; all but the first two are constants."""
    first, step, parts, lanes, width = (v.literal_value for v in (first, step, parts, lanes, width))
    piece, whole = Vector("f32", lanes), Vector("f32", lanes * parts)

    def codegen(context, builder, sig, args):
        loads = []
        for part in range(parts):
            start = part * step + first
            at = builder.add(args[1], ir.IntType(64)(start))
            # Lanes past this part's own bytes belong to the next part: numbers that nobody stores.
            loads.append(_load(context, builder, array, args[0], at, piece, min(width - start, lanes)))
        return _concatenate(builder, loads)

    return signature(whole, array, types.intp, *(types.literal(v) for v in (first, step, parts, lanes, width))), codegen


@intrinsic(prefer_literal=True)
def vstore_tile(typingctx, array, base, value, first, step, parts, lanes, width):
    """Store the lanes of a tile that are features, as :func:`vload_tile` reads them."""
    first, step, parts, lanes, width = (v.literal_value for v in (first, step, parts, lanes, width))
    piece = Vector("f32", lanes)

    def codegen(context, builder, sig, args):
        for part in range(parts):
            start = part * step + first
            count = min(width - start, lanes, step - first)
            if count <= 0:
                continue
            at = builder.add(args[1], ir.IntType(64)(start))
            pointer = _vector_pointer(context, builder, array, args[0], at, piece)
            chosen = builder.shuffle_vector(args[2], args[2], _order(range(part * lanes, (part + 1) * lanes)))
            if count == lanes:
                builder.store(chosen, pointer, align=_alignment(piece))
                continue
            alignment = ir.Constant(ir.IntType(32), _alignment(piece))
            name = f"llvm.masked.store.{_suffix(piece)}.p0"
            _call(builder, name, ir.VoidType(), [chosen, pointer, alignment, _mask(lanes, count)])
        return context.get_dummy_value()

    constants = (types.literal(v) for v in (first, step, parts, lanes, width))
    return signature(types.void, array, types.intp, value, *constants), codegen


def _numbers(pattern: str) -> list[int]:
    """``"0x16 1x16"`` is sixteen zeros and sixteen ones."""
    found = []
    for run in pattern.split():
        number, _, count = run.partition("x")
        found += [int(number)] * int(count)
    return found


@intrinsic(prefer_literal=True)
def vpattern(typingctx, array, base, size, pattern):
    """``array[base + pattern[lane]]`` of the ``size`` numbers at ``base``, for lanes fixed in the text ``pattern``."""
    order, count = _numbers(pattern.literal_value), size.literal_value
    source, target = Vector("f32", max(2, next_power_of_two(count))), Vector("f32", len(order))

    def codegen(context, builder, sig, args):
        loaded = _load(context, builder, array, args[0], args[1], source, count)
        return builder.shuffle_vector(loaded, loaded, _order([max(0, k) for k in order]))

    return signature(target, array, types.intp, size, pattern), codegen


@intrinsic(prefer_literal=True)
def vhead_sum(typingctx, v, pattern, head):
    """The sum of the lanes that the text ``pattern`` gives to ``head``; any order."""
    order, wanted = _numbers(pattern.literal_value), head.literal_value
    chosen = [k for k, number in enumerate(order) if number == wanted]

    def codegen(context, builder, sig, args):
        size = max(2, next_power_of_two(len(chosen)))
        lanes = chosen + [v.lanes] * (size - len(chosen))  # the first lane of a zero vector
        mask = ir.Constant(ir.VectorType(ir.IntType(32), size), lanes)
        picked = builder.shuffle_vector(args[0], _constant(v, 0), mask)
        part = Vector("f32", size)
        zero = ir.Constant(ir.FloatType(), 0.0)
        name = f"llvm.vector.reduce.fadd.{_suffix(part)}"
        call = _call(builder, name, ir.FloatType(), [zero, picked])
        call.fastmath.add("reassoc")
        return call

    return signature(types.float32, v, pattern, head), codegen


def _intrinsic(name: str, llvm: str):
    def impl(typingctx, v):
        def codegen(context, builder, sig, args):
            return _call(builder, f"llvm.{llvm}.{_suffix(v)}", v.llvm, args)

        return signature(v, v), codegen

    impl.__name__ = name
    return intrinsic(impl)


vsqrt = _intrinsic("vsqrt", "sqrt")
vabs = _intrinsic("vabs", "fabs")
_vrint = _intrinsic("_vrint", "rint")


@intrinsic
def vneg(typingctx, v):
    """``-v``."""
    return signature(v, v), lambda context, builder, sig, args: builder.fneg(args[0])


def _comparison(name: str, operator: str):
    def impl(typingctx, a, b):
        def codegen(context, builder, sig, args):
            holds = builder.fcmp_ordered(operator, *args)
            return builder.select(holds, _constant(a, 1.0), _constant(a, 0.0))

        return signature(a, a, a), codegen

    impl.__name__ = name
    return intrinsic(impl)


vgreater = _comparison("vgreater", ">")
vabove = _comparison("vabove", ">=")


@intrinsic
def vwhere(typingctx, condition, a, b):
    """``a`` where ``condition`` is not 0, else ``b``."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_unordered("!=", args[0], _constant(a, 0.0)), args[1], args[2])

    return signature(a, condition, a, b), codegen


@njit(forceinline=True)
def vrelu(x):
    return vmax(vsplat(0.0, x), x)  # NaN stays NaN


@njit(forceinline=True)
def vleaky(x, slope):
    return vwhere(vgreater(x, vsplat(0.0, x)), x, x * vsplat(slope, x))


@njit(forceinline=True)
def _exp_parts(x):
    """``n`` and ``r`` with ``x = n ln 2 + r``."""
    n = _vrint(x * vsplat(1.4426950408889634, x))
    r = vfma(n, vsplat(-0.693359375, x), x)
    return n, vfma(n, vsplat(2.12194440e-4, x), r)


@njit(forceinline=True)
def _exp_tail(r):
    """``(exp(r) - 1 - r) / r^2`` for ``|r| <= ln 2 / 2`` (Cephes, expf)."""
    p = vsplat(1.9875691500e-4, r)
    p = vfma(p, r, vsplat(1.3981999507e-3, r))
    p = vfma(p, r, vsplat(8.3334519073e-3, r))
    p = vfma(p, r, vsplat(4.1665795894e-2, r))
    p = vfma(p, r, vsplat(1.6666665459e-1, r))
    return vfma(p, r, vsplat(5.0000001201e-1, r))


@njit(forceinline=True)
def _power_of_two(n):
    """``2^n`` of whole numbers in ``[-126, 127]``."""
    return vview((vcast(n, "i32") + vsplat(127, n)) << 23, "f32")


@njit(forceinline=True)
def vexp(x):
    """``exp(x)`` to 2 units in the last place; 0 below -103, infinity above 88.72, NaN for NaN."""
    y = vmin(vsplat(88.8, x), vmax(vsplat(-104.0, x), x))
    n, r = _exp_parts(y)
    value = vfma(_exp_tail(r), r * r, r) + vsplat(1.0, x)
    # In two factors, so that neither leaves the exponents there are.
    half = _vrint(n * vsplat(0.5, x))
    return value * _power_of_two(half) * _power_of_two(n - half)


@njit(forceinline=True)
def vexpm1(x):
    """``exp(x) - 1``."""
    near = vfma(_exp_tail(x), x * x, x)
    return vwhere(vgreater(vsplat(0.34, x), vabs(x)), near, vexp(x) - vsplat(1.0, x))


@njit(forceinline=True)
def vlog(x):
    """``log(x)`` of positive normal numbers to 2 units in the last place (Cephes, logf); -inf at 0, NaN below."""
    bits = vview(x, "i32")
    e = vcast((bits >> 23) - vsplat(126, x), "f32")
    m = vview((bits & vsplat(0x007FFFFF, x)) | vsplat(0x3F000000, x), "f32")  # in [1/2, 1)
    small = vgreater(vsplat(0.707106781186547524, x), m)
    e = e - small
    m = m + small * m - vsplat(1.0, x)
    z = m * m
    p = vsplat(7.0376836292e-2, x)
    p = vfma(p, m, vsplat(-1.1514610310e-1, x))
    p = vfma(p, m, vsplat(1.1676998740e-1, x))
    p = vfma(p, m, vsplat(-1.2420140846e-1, x))
    p = vfma(p, m, vsplat(1.4249322787e-1, x))
    p = vfma(p, m, vsplat(-1.6668057665e-1, x))
    p = vfma(p, m, vsplat(2.0000714765e-1, x))
    p = vfma(p, m, vsplat(-2.4999993993e-1, x))
    p = vfma(p, m, vsplat(3.3333331174e-1, x))
    y = p * m * z
    y = vfma(e, vsplat(-2.12194440e-4, x), y)
    y = vfma(z, vsplat(-0.5, x), y)
    y = vfma(e, vsplat(0.693359375, x), m + y)
    zero = vsplat(0.0, x)
    y = vwhere(vgreater(x, vsplat(3.4028235e38, x)), x, y)  # infinity
    # What is neither above zero nor zero, NaN included, gives NaN.
    return vwhere(vgreater(x, zero), y, vsplat(-1.0, x) / vwhere(vabove(x, zero), vabs(x), zero / zero))


@njit(forceinline=True)
def vlog1p(x):
    """``log(1 + x)``, also of small ``x``."""
    one = vsplat(1.0, x)
    w = one + x
    rest = w - one
    exact = vgreater(vabs(rest), vsplat(0.0, x))
    return vwhere(exact, vlog(w) * (x / vwhere(exact, rest, one)), x)


@njit(forceinline=True)
def vsigmoid(x):
    return vsplat(1.0, x) / (vsplat(1.0, x) + vexp(vneg(x)))


@njit(forceinline=True)
def vtanh(x):
    """``tanh(x)`` (Cephes, tanhf)."""
    a = vabs(x)
    s = vsplat(1.0, x) - vsplat(2.0, x) / (vexp(a + a) + vsplat(1.0, x))
    far = vwhere(vgreater(x, vsplat(0.0, x)), s, vneg(s))
    z = x * x
    p = vsplat(-5.70498872745e-3, x)
    p = vfma(p, z, vsplat(2.06390887954e-2, x))
    p = vfma(p, z, vsplat(-5.37397155531e-2, x))
    p = vfma(p, z, vsplat(1.33314422036e-1, x))
    p = vfma(p, z, vsplat(-3.33332819422e-1, x))
    near = vfma(p * z, x, x)
    return vwhere(vgreater(a, vsplat(0.625, x)), far, near)


@njit(forceinline=True)
def vsoftplus(x):
    """``log(1 + exp(x))``; ``x`` itself above 20, as in torch."""
    y = vmax(vsplat(0.0, x), x) + vlog1p(vexp(vneg(vabs(x))))
    return vwhere(vgreater(x, vsplat(20.0, x)), x, y)
