"""The types of vectors and of memory in numba, and what intrinsics are built from in LLVM."""
# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, register_model

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


def _splat(builder, vector: Vector, value):
    seed = builder.insert_element(ir.Constant(vector.llvm, ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(seed, seed, ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), None))


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


def _first_lanes(builder, vector: Vector, count):
    """The mask of lanes below ``count``."""
    index = Vector("i32", vector.lanes)
    lanes = ir.Constant(index.llvm, list(range(vector.lanes)))
    count = builder.trunc(count, ir.IntType(32))
    return builder.icmp_signed("<", lanes, _splat(builder, index, count))


def _alignment(vector: Vector) -> int:
    return _ELEMENTS[vector.element].width // 8 if not vector.is_float else 4


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


def _pointer(context, builder, array_type, array, offset):
    if isinstance(array_type, Raw):
        return builder.gep(array, [offset])
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


def _vector_pointer(context, builder, array_type, array, offset, vector: Vector):
    pointer = _pointer(context, builder, array_type, array, offset)
    return builder.bitcast(pointer, vector.llvm.as_pointer())


def _shaped(array, like) -> Vector:
    """The vector of ``array``'s elements with as many lanes as ``like``, a constant or a vector."""
    lanes = like.lanes if isinstance(like, Vector) else like.literal_value
    return Vector(_OF_DTYPE[array.dtype], lanes)
