"""Linear maps of what single edges compute, and what surrounds them: concatenations, towers, softmax over few heads.

Where the range of what is mapped depends on the whole edge, or where functions come before it, a linear map does not
split into products of sources, targets and edges (:mod:`.products`): the kernel maps every edge by itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.generated.kept import FEW
from ..kernels.generated.program import Product, Use
from ..kernels.layout import top_code
from .marks import LINEAR
from .operations import OPERATIONS, Handle
from .shadow import NotTraceable
from .spaces import CONST, EDGE, MIXED, SHAPED

__all__ = ["fits_a_kernel", "joined", "linear_map", "product_arrays", "product_of", "softmax", "widens"]

aten = torch.ops.aten


def product_of(lin: Any) -> Product | None:
    """A packed linear layer as a kernel maps edges by it; :obj:`None` where it does not."""
    site = lin.input_quantizer
    if lin.words is None or site is None or site._forward_hooks or site._forward_pre_hooks:
        return None
    spec, own = site.spec, lin._site
    if not spec.is_fixed or spec.granularity not in ("tensor", "row") or own.is_zero_one:
        return None
    if lin._num_in * top_code(spec.bits) * top_code(own.bits) >= 2**31:
        return None
    return Product(lin._num_in, lin._num_out, spec.bits, own.bits, spec.has_multipliers, lin.bias is not None)


def product_arrays(lin: Any) -> tuple[Tensor, ...]:
    """The arrays of :func:`product_of`, as they are now."""
    site, nothing = lin.input_quantizer, lin.weight_scale.new_empty(0)
    bias, unit = (nothing if t is None else t.reshape(-1) for t in (lin.bias, site.unit))
    scale, lower = lin.weight_scale.reshape(-1), lin.weight_lower.reshape(-1)
    return lin.words, scale, lower, bias, site.scale.reshape(1), site.lower.reshape(1), unit


def fits_a_kernel(node: fx.Node, record: Any) -> bool:
    """Whether an operation is a linear map that a kernel applies to every edge."""
    if node.target is not LINEAR:
        return False
    source, number, _ = node.args
    assert isinstance(source, fx.Node)
    product = product_of(record.linears[number])
    return product is not None and math.prod(record.shapes[source][1:]) == product.num_in


def widens(builder: Any, node: fx.Node) -> bool:
    """Whether ``node`` follows, number by number, from a linear map of edges, which are then mapped in the kernel."""
    if builder.spaces.of.get(node) != EDGE or node not in builder.record.shapes:
        return False
    if fits_a_kernel(node, builder.record):
        return True
    known = node.target in SHAPED or node.target in OPERATIONS
    return known and any(widens(builder, arg) for arg in node.all_input_nodes)


def linear_map(builder: Any, node: fx.Node) -> Handle:
    """A packed linear map of every edge.

    Raises:
        NotTraceable: If it is none that kernels apply.
    """
    source, number, _ = node.args
    assert isinstance(source, fx.Node)
    if not fits_a_kernel(node, builder.record):
        raise NotTraceable("no kernel for a linear map of each edge in this range")
    lin = builder.record.linears[number]
    if lin not in builder.maps:
        builder.maps.append(lin)
    parts = [Use(handle.index) for handle in _side_by_side(builder, source)]
    index = builder.add("linear", tuple(parts), lin._num_out, builder.maps.index(lin))
    return Handle(index, builder.record.shapes[node][1:])


def _side_by_side(builder: Any, node: fx.Node, chosen: int | None = None) -> list[Handle]:
    """What ``node``, or the part ``chosen`` of its first dimension after that of edges, holds: its pieces in order."""
    record, spaces = builder.record, builder.spaces
    shape, target = record.shapes[node], node.target
    source: Any = node.args[0] if node.args else None
    number: Any = node.args[2] if len(node.args) > 2 else None
    if chosen == 0 and shape[1] == 1:
        return _side_by_side(builder, node)
    if target is aten.repeat.default and _repeats_one(node, record.shapes[source], chosen is not None):
        return _side_by_side(builder, source)
    if spaces.of[node] in (MIXED, EDGE):
        if target is aten.cat.default and _is_behind(node, shape, 1 if chosen is None else 2):
            return [handle for part in source for handle in _side_by_side(builder, part, chosen)]
        if target is aten.select.int and chosen is None and node.args[1] == 1 and len(record.shapes[source]) == 3:
            return _side_by_side(builder, source, number)
        if target in SHAPED and math.prod(record.shapes[source]) == math.prod(shape):
            same = len(record.shapes[source]) == len(shape)
            if chosen is None or (same and record.shapes[source][1] == shape[1]):
                return _side_by_side(builder, source, chosen)
    if chosen is None:
        return [builder.edge(node)]
    if spaces.of[node] in (MIXED, CONST):
        raise NotTraceable("no kernel for a part of what is computed in it")
    return [builder.part(node, chosen)]


def _repeats_one(node: fx.Node, shape: tuple[int, ...], chosen: bool) -> bool:
    """Whether a repetition has all numbers of ``shape`` as they are, or does where one of its parts is chosen."""
    times: Any = node.args[1]
    several = [k for k, count in enumerate(times) if count != 1]
    return len(times) == len(shape) and (several == [1] and shape[1] == 1 if chosen else not several)


def _is_behind(node: fx.Node, shape: tuple[int, ...], first: int) -> bool:
    """Whether what is joined stands one behind the other, from the dimension ``first`` on."""
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim %= len(shape)
    return dim >= first and all(size == 1 for size in shape[first:dim])


def joined(builder: Any, node: fx.Node) -> Handle:
    """Several values of an edge one behind the other.

    Raises:
        NotTraceable: If they are mixed otherwise.
    """
    shape = builder.record.shapes[node]
    parts: Any = node.args[0]
    if not _is_behind(node, shape, 1):
        raise NotTraceable("values of edges are joined otherwise than one behind the other")
    uses = tuple(Use(builder.edge(part).index) for part in parts)
    return Handle(builder.add("join", uses, math.prod(shape[1:])), shape[1:])


def softmax(builder: Any, node: fx.Node) -> Handle:
    """A softmax over the last of few numbers of an edge.

    Raises:
        NotTraceable: If it is over others.
    """
    source: Any = node.args[0]
    dims = builder.record.shapes[node][1:]
    dim: Any = node.args[1]
    if dim % (len(dims) + 1) != len(dims) or math.prod(dims) > FEW:
        raise NotTraceable("a softmax over many features of an edge")
    x = builder.edge(source)
    one = (*dims[:-1], 1)
    top = Handle(builder.add("top", (Use(x.index),), math.prod(one)), one)
    numerators = builder.apply("exp", builder.apply("sub", Handle(x.index, dims), top))
    total = Handle(builder.add("dot", (Use(numerators.index),), math.prod(one)), one)
    return Handle(builder.apply("div", numerators, total).index, dims)
