"""RGATConv: one map for each node and relation, in the place of two for each edge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.generated.program import MAX_WIDTH, Node, Operand, Program, Use
from ...kernels.generated.run import can_run, row_program
from ...kernels.plan import GraphPlan
from ..lazy.deferred import materialized
from ..lazy.producers import row_blocks
from .nodes import PackedNodes
from .plans import found_by_contents, plan_of

__all__ = ["rgat"]

SMALLEST = 1e-16  # that PyG's softmax adds to what it divides by


def rgat(
    layer: Any, x: Any, edge_index: Any, edge_type: Any = None, edge_attr: Any = None, size: Any = None,
    return_attention_weights: Any = None,
) -> Any:  # fmt: skip
    r"""RGATConv of additive attention over all relations:

    .. math::
        \sum_{(j, r)} \alpha_{ijr} x_j W_r \qquad
        \alpha_{ijr} = \mathrm{softmax}_{(j, r)}\, \mathrm{LeakyReLU}(q(x_i W_r) + k(x_j W_r))

    PyG multiplies both ends of every edge by the weight of its relation.  Here each node is, once for each relation, by
    the same product of a vector and a matrix, so that codes of the maps ``q`` and ``k`` are those of the converted
    layer; the rest is one kernel over edges from these.
    """
    if edge_attr is not None or size is not None or not _takes(layer, x, edge_index, edge_type):
        return None
    num_nodes, num_relations, heads = x.size(0), layer.num_relations, layer.heads
    nodes = layer.quantized_arguments({"x": x})["x"]
    width = heads * layer.out_channels
    program = _program(width, heads, float(layer.negative_slope))
    if not isinstance(nodes, PackedNodes) or can_run(program, x.device) is not None:
        return None

    def expanded() -> GraphPlan:
        plan_of(edge_index, (num_nodes, num_nodes), layer.flow)  # refuses edges between nodes that there are not
        return GraphPlan.from_edges(edge_type * num_nodes + edge_index[0], edge_index[1], *shape)

    shape = (num_relations * num_nodes, num_nodes)
    plan = found_by_contents((edge_index, edge_type), ("expanded", *shape), expanded)
    mapped = _mapped(layer, nodes.values(), width)
    terms = {name: _term(layer, name, mapped) for name in ("q", "k")}
    of_targets = terms["q"].index_select(0, edge_type * num_nodes + edge_index[1])
    out, alpha = row_program(program, plan, [(mapped,), (terms["k"],), (of_targets,)])
    out = layer.update(out.view(num_nodes, heads, layer.out_channels))
    return (out, (edge_index, alpha)) if isinstance(return_attention_weights, bool) else out


def _takes(layer: Any, x: Any, edge_index: Any, edge_type: Any) -> bool:
    """Whether ``rgat`` computes what PyG's ``forward`` would."""
    cls: Any = type(layer).float_class
    own = [f.__module__.startswith("torch_geometric.") for f in (cls.aggregate, cls.message, cls.update)]
    plain = layer.attention_mode == "additive-self-attention" and layer.attention_mechanism == "across-relation"
    plain = plain and layer.mod is None and layer.num_blocks is None and layer.aggr in ("add", "sum")
    if not plain or not all(own) or layer.flow != "source_to_target" or {"q", "k"} - layer._shapes.keys():
        return False
    if layer.training or (layer._smp is not None and layer._is_smoothing):
        return False
    tensors = (x, edge_index, edge_type)
    if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors) or x.dim() != 2:
        return False
    if x.dtype is not torch.float32 or edge_index.dtype is not torch.int64 or edge_type.dtype is not torch.int64:
        return False
    if edge_type.shape != edge_index.shape[1:] or edge_type.numel() == 0 or edge_type.device.type != "cpu":
        return False
    fits = layer.heads * layer.out_channels <= MAX_WIDTH
    return fits and int(edge_type.min()) >= 0 and int(edge_type.max()) < layer.num_relations


def _mapped(layer: Any, x: Tensor, width: int) -> Tensor:
    """``x W_r`` of each relation, ``[R N, M]``, row by row as PyG has them edge by edge."""
    if layer.num_bases is None:
        weight = layer.weight
    else:
        weight = torch.matmul(layer.att, layer.basis.view(layer.num_bases, -1))
    weight = weight.detach().view(layer.num_relations, x.size(1), width)
    out = x.new_empty((layer.num_relations, x.size(0), width))
    for own, relation in zip(out, weight, strict=True):
        for rows in row_blocks(x.size(0), width, x.device):
            part = x[rows].unsqueeze(1)
            own[rows] = torch.bmm(part, relation.expand(part.size(0), -1, -1)).squeeze(1)
    return out.view(-1, width)


def _term(layer: Any, name: str, mapped: Tensor) -> Tensor:
    """A term of the logits, ``[R N, H]``."""
    taken = layer._taken(mapped, f"{name}_input_quantizer")
    return materialized(layer._times(taken, layer._quantized_weight(name)))


def _program(width: int, heads: int, slope: float) -> Program:
    """Attention of targets over what sources send, with a term of the logits of each edge's own."""

    def node(op: str, *args: int | Use, width: int = heads, value: float = 0.0, row: bool = False) -> Node:
        return Node(op, tuple(a if isinstance(a, Use) else Use(a) for a in args), width, value, row)

    nodes = (
        node("load", width=width, value=0),
        node("load", value=1),
        node("load", value=2),
        node("add", 2, 1),
        node("leaky_relu", 3, value=slope),
        node("max", 4, row=True),
        node("sub", 4, 5),
        node("exp", 6),
        node("sum", 7, row=True),
        node("literal", width=1, value=SMALLEST, row=True),
        node("add", 8, Use(9, "repeat"), row=True),
        node("div", 7, 10),
        node("mul", 0, Use(11, "repeat"), width=width),
        node("sum", 12, width=width, row=True),
    )
    operands = (Operand("source", width), Operand("source", heads), Operand("edge", heads))
    return Program(operands, nodes, (13,), (11,))
