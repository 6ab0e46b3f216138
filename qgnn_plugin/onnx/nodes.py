"""Nodes of ONNX graphs for the ops of packed models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
from onnxscript import opset20

__all__ = ["custom_node", "plan_in_standard_ops"]

op: Any = opset20  # typed for constants, where these are nodes
DOMAIN = "qgnn"  # of the ops, version 1
_DOMAIN = onnxscript.values.Opset(DOMAIN, 1)
INT64 = onnxscript.INT64.dtype
INT32 = onnxscript.INT32.dtype


def custom_node(target: Any) -> Callable[..., Any]:
    """What translates an op to a node of our domain: tensors are its inputs, other arguments its attributes."""
    schema = target._schema
    name = schema.name.partition("::")[2] + (f"_{schema.overload_name}" if schema.overload_name else "")
    call = onnxscript.values.Op(_DOMAIN, name, _schema(name, schema))

    def node(*args: Any, **kwargs: Any) -> Any:
        values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        values |= dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        inputs: list[Any] = []
        attributes: dict[str, Any] = {}
        for argument in schema.arguments:
            value = values[argument.name]
            if _is_input(argument):
                inputs.append(op.Constant(value_int=value) if isinstance(value, int) else value)
            elif value is not None:
                attributes[argument.name] = int(value) if isinstance(value, bool) else value
        while inputs and inputs[-1] is None:
            inputs.pop()
        return call(*inputs, **attributes)

    return node


def _is_input(argument: Any) -> bool:
    return "Tensor" in str(argument.type) or type(argument.real_type).__name__ == "SymIntType"


_KINDS = {"int": "INT", "bool": "INT", "float": "FLOAT", "str": "STRING"}


def _schema(name: str, schema: Any) -> Any:
    """The ONNX schema of an op; each tensor has a type of its own."""
    from onnx import defs

    formal, option = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
    inputs, attributes = [], []
    for argument in schema.arguments:
        if _is_input(argument):
            kind = option.Optional if "Optional" in str(argument.type) else option.Single
            inputs.append(formal(argument.name, f"T_{argument.name}", param_option=kind))
        else:
            kind = getattr(defs.OpSchema.AttrType, _KINDS[str(argument.type)])
            attributes.append(defs.OpSchema.Attribute(argument.name, kind, required=False))
    outputs = [formal(f"output_{k}", f"T_output_{k}") for k in range(len(schema.returns))]
    types = [(p.type_str, _TENSORS, "") for p in (*inputs, *outputs)]
    return defs.OpSchema(
        name, DOMAIN, 1, inputs=inputs, outputs=outputs, attributes=attributes, type_constraints=types
    )


_TENSORS = [f"tensor({kind})" for kind in ("uint8", "int8", "int32", "int64", "float16", "float", "double", "bool")]


def plan_in_standard_ops(src: Any, dst: Any, num_src: Any, num_dst: Any, loops: str = "none") -> Any:
    """``qgnn::plan`` (see :mod:`qgnn_plugin.kernels.plan_op`): a stable sort by destination, and counts."""
    one, zero = op.Constant(value_ints=[1]), op.Constant(value_ints=[0])
    src, dst = op.Cast(src, to=INT64), op.Cast(dst, to=INT64)
    ids = _range(op.Shape(src))
    if loops != "none":
        nodes = _range(op.Min(_vector(num_src), _vector(num_dst)))
        added = op.Add(nodes, op.Shape(src))
        if loops != "more":
            is_loop = op.Equal(src, dst)
            own, kept = (op.Reshape(op.NonZero(m), op.Constant(value_ints=[-1])) for m in (is_loop, op.Not(is_loop)))
            if loops == "remaining":
                added = op.ScatterElements(added, op.Gather(src, own), own, axis=0)
            src, dst, ids = (op.Gather(v, kept) for v in (src, dst, kept))
            ids = kept
        src, dst = op.Concat(src, nodes, axis=0), op.Concat(dst, nodes, axis=0)
        ids = op.Concat(ids, added, axis=0)
    count = op.Shape(dst)
    key = op.Add(op.Mul(dst, count), _range(count))  # unique, so that the order is stable
    _, order = op.TopK(key, count, largest=0, sorted=1)
    zeros = op.Expand(zero, _vector(num_dst))
    counts = op.ScatterElements(zeros, dst, op.Expand(one, count), axis=0, reduction="add")
    rowptr = op.Concat(zero, op.CumSum(counts, op.Constant(value_int=0)), axis=0)
    return rowptr, op.Cast(op.Gather(src, order), to=INT32), op.Gather(ids, order)


def _vector(size: Any) -> Any:
    """A size as a vector of one element."""
    if isinstance(size, int):
        return op.Constant(value_ints=[size])
    return op.Reshape(size, op.Constant(value_ints=[1]))


def _range(count: Any) -> Any:
    """``0 .. count - 1`` for a vector of one element."""
    scalar = op.Squeeze(count)
    return op.Range(op.Constant(value_int=0), scalar, op.Constant(value_int=1))
