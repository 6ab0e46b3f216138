"""Byte dot products, by the best instructions of the processor that code is compiled for."""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

from numba.core.registry import cpu_target
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from .vectors import Vector, _by_width, _call, _constant

__all__ = ["byte_dot", "has_feature", "register_lanes", "vdot", "vdot_small"]

_BYTES = 4  # that meet in a lane
_TOP = 0x80808080 - (1 << 32)  # the top bit of each byte, as an int32


@cache
def has_feature(*names: str) -> bool:
    """Whether the processor that kernels are compiled for has all of LLVM's features ``names``."""
    features = getattr(cpu_target.target_context.codegen(), "_tm_features", "")
    return {f"+{name}" for name in names} <= set(features.split(","))


@cache
def register_lanes() -> int:
    """int32 lanes of the registers that byte dot products use."""
    return 16 if has_feature("avx512vnni") or has_feature("avx512bw") else 8


def byte_dot(builder, parts, is_small: bool):
    """``acc + sum of four products`` in each int32 lane of a register, the second operand without, the third with sign.

    ``is_small``: no sum of the products of two neighbouring bytes passes 15 bits.
    """
    acc, unsigned, signed = parts
    count = acc.type.count
    bits = 32 * count
    if has_feature("avx512vnni") if bits == 512 else has_feature("avx512vnni", "avx512vl") or has_feature("avxvnni"):
        operands = [acc, *_as_bytes(builder, unsigned, signed)]
        return _call(builder, f"llvm.x86.avx512.vpdpbusd.{bits}", acc.type, operands)
    if has_feature("avx512bw") if bits == 512 else has_feature("avx2") and bits == 256:
        if is_small:
            return builder.add(acc, _by_pairs(builder, unsigned, signed))
        # 127 and 128 times two signed bytes stay within 16 bits, 255 times them does not.
        top = _constant(Vector("i32", count), _TOP)
        high, low = builder.and_(unsigned, top), builder.and_(unsigned, builder.not_(top))
        acc = builder.add(acc, _by_pairs(builder, low, signed))
        return builder.add(acc, _by_pairs(builder, high, signed))
    lanes = Vector("i32", count)
    for byte in range(_BYTES):
        x = builder.and_(builder.lshr(unsigned, _constant(lanes, 8 * byte)), _constant(lanes, 255))
        y = builder.ashr(builder.shl(signed, _constant(lanes, 24 - 8 * byte)), _constant(lanes, 24))
        acc = builder.add(acc, builder.mul(x, y))
    return acc


def _by_pairs(builder, unsigned, signed):
    """Sums of products by way of the sums of two neighbours in 16 bits."""
    lanes, pairs = unsigned.type, Vector("u16", 2 * unsigned.type.count)
    wide = lanes.count == 16
    names = ("512.pmaddubs.w.512", "512.pmaddw.d.512") if wide else ("2.pmadd.ub.sw", "2.pmadd.wd")
    first, second = (f"llvm.x86.avx{name}" for name in names)
    products = _call(builder, first, pairs.llvm, _as_bytes(builder, unsigned, signed))
    return _call(builder, second, lanes, [products, _constant(pairs, 1)])


def _as_bytes(builder, *parts):
    lanes = Vector("u8", _BYTES * parts[0].type.count).llvm
    return [builder.bitcast(part, lanes) for part in parts]


def _intrinsic(name: str, is_small: bool, doc: str):
    def impl(typingctx, acc, unsigned, signed):
        def codegen(context, builder, sig, args):
            width = min(register_lanes(), acc.lanes)
            return _by_width(builder, acc, args, width, lambda parts: byte_dot(builder, parts, is_small))

        return signature(acc, acc, acc, acc), codegen

    impl.__name__, impl.__doc__ = name, doc
    return intrinsic(impl)


vdot = _intrinsic(
    "vdot", False, "``acc + sum of four products`` per int32 lane, of bytes without and with sign."
)  # fmt: skip
vdot_small = _intrinsic("vdot_small", True, ":func:`vdot` where two neighbouring products come to 15 bits at most.")
