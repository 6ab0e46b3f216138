"""Linear maps of edges as sums: of the products of what sources, targets and edges contribute (:mod:`.products`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.generated.program import Use
from .edge_maps import fits_a_kernel, linear_map
from .evaluate import Values
from .leaves import SIDE, Leaf
from .operations import Handle
from .products import Part, affine_of, parts_of
from .shadow import NotTraceable

__all__ = ["product"]

aten = torch.ops.aten
Dims = tuple[int, ...]


def product(builder: Any, node: fx.Node) -> Handle:
    """A linear map as the sum of its parts, or of every edge by itself."""
    dims: Dims = (math.prod(builder.record.shapes[node][1:]),)
    total = row_sum = None
    try:
        parts = parts_of(node, builder.record, builder.spaces)
    except NotTraceable:
        if not fits_a_kernel(node, builder.record):
            raise
        return linear_map(builder, node)
    for part in parts:
        side, key = SIDE[builder.spaces.of[part.node]], (node, part.node, part.first)
        if part.codes is None or part.columns is None:
            term = builder.leaf(("product", *key), side, dims, Leaf(part.node, value=part.product))
        else:
            term = _map(builder, key, side, part, dims)
        total = _plus(builder, total, term, part.sign)
        if part.row_sum is not None:
            of_row = builder.leaf(("row sum", *key), side, (1,), Leaf(part.node, value=part.row_sum))
            row_sum = _plus(builder, row_sum, of_row, part.sign)
    assert total is not None
    if row_sum is not None:
        total = _affine(builder, node, total, row_sum)
    elif node.target is aten.addmm.default:
        total = builder.apply("add", total, _once(builder, node.args[0], dims))
    return Handle(total.index, builder.record.shapes[node][1:])


def _map(builder: Any, key: Any, side: str, part: Part, dims: Dims) -> Handle:
    """The product of few numbers of an edge, computed in the kernel."""
    count = math.prod(builder.record.shapes[part.node][1:])
    x = builder.leaf(("codes", *key), side, (count,), Leaf(part.node, value=part.codes))
    columns = builder.leaf(("columns", *key), "constant", (count * dims[0],), Leaf(part.node, value=part.columns))
    return Handle(builder.add("map", (Use(x.index), Use(columns.index)), dims[0]), dims)


def _plus(builder: Any, total: Handle | None, part: Handle, sign: int) -> Handle:
    if total is None:
        return part if sign > 0 else builder.apply("neg", part)
    return builder.apply("add" if sign > 0 else "sub", total, part)


def _affine(builder: Any, node: fx.Node, total: Handle, row_sum: Handle) -> Handle:
    """From sums of codes to numbers, by the operations of the packed linear map in their order."""
    step, dims = affine_of(node, builder.record), total.dims

    def constant(name: str, value: Callable[[], Tensor]) -> Handle:
        def spread(values: Values) -> Tensor:
            return value().reshape(-1).expand(dims).reshape(1, -1)

        return builder.leaf((name, node), "constant", dims, Leaf(node, value=spread))

    y = builder.apply("mul", total, constant("weight scale", step.weight_scale))
    y = builder.apply("add", y, builder.apply("mul", row_sum, constant("weight lower", step.weight_lower)))
    y = builder.apply("mul", y, constant("scale", step.scale))
    y = builder.apply("add", y, constant("term", step.term))
    return y if step.bias is None else builder.apply("add", y, constant("bias", step.bias))


def _once(builder: Any, arg: Any, dims: Dims) -> Handle:
    """A vector that all edges share."""
    assert isinstance(arg, fx.Node)

    def value(values: Values) -> Tensor:
        return values[arg].reshape(-1).expand(dims).reshape(1, -1)

    return builder.leaf(("once", arg, dims), "constant", dims, Leaf(arg, value=value))
