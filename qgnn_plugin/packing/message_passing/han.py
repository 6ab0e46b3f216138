"""HANConv: one product per type of nodes, and attention over relations by blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

from ...kernels.backend import backend_for
from ...kernels.generated.program import MAX_WIDTH, Node, Operand, Program, Use
from ...kernels.generated.run import row_program
from ...kernels.plan import GraphPlan
from ...kernels.streams import lasting
from ..layers.linear import PackedLinear
from ..lazy.deferred import materialized
from ..lazy.producers import row_blocks
from .nodes import PackedNodes

__all__ = ["han"]

STRETCH = 64  # rows that are summed as edges of one
Type = str
Relation = tuple[str, str, str]


def han(layer: Any, x_dict: Any, edge_index_dict: Any, return_semantic_attention_weights: bool = False) -> Any:
    r"""HANConv, whose nodes have a result :math:`h_r` of graph attention for each relation ``r`` into them:

    .. math::
        \sum_r \beta_r h_r \qquad \beta = \mathrm{softmax}_r\, q^T \mathrm{mean}_i \tanh(W h_{ri} + b)

    What a type of nodes sends, and its terms of the logits of all relations, come from one kernel without floats of
    all nodes; what the attention over relations is a mean of is made by blocks of rows.  Logits and means are float32
    sums in another order than PyG's.
    """
    if not _takes(layer, x_dict, edge_index_dict):
        return None
    nodes = dict[Type, _Nodes]()
    for kind, x in x_dict.items():
        made = _Nodes.of(layer, kind, x, [relation for relation in edge_index_dict if kind in relation[::2]])
        if made is None:
            return None
        nodes[kind] = made
    outs = _by_relation(layer, nodes, edge_index_dict)
    nodes.clear()
    out, attention = dict[Type, Tensor | None](), dict[Type, Tensor | None]()
    for kind in x_dict:
        out[kind], attention[kind] = _grouped(layer, outs.pop(kind))
    return (out, attention) if return_semantic_attention_weights else out


def _takes(layer: Any, x_dict: Any, edge_index_dict: Any) -> bool:
    """Whether ``han`` computes what PyG's ``forward`` would."""
    site = layer.argument_quantizers["x"] if "x" in layer.argument_quantizers else None  # noqa: SIM401 - a ModuleDict
    if site is None or not site.spec.is_fixed or site.spec.granularity == "channel":
        return False
    if layer._smp is not None and layer._is_smoothing:
        return False
    cls: Any = type(layer).float_class
    if cls.aggregate is not MessagePassing.aggregate or cls.update is not MessagePassing.update:
        return False  # whose results may be held elsewhere
    if "alpha" in layer.argument_quantizers and "alpha" not in layer.float_arguments:
        return False
    if not isinstance(x_dict, dict) or not isinstance(edge_index_dict, dict):
        return False
    maps = [layer.k_lin, *(layer.proj._modules.get(kind) for kind in x_dict)]
    if not all(isinstance(lin, PackedLinear) and not lin._is_seen for lin in maps):
        return False
    taken = layer.k_lin.input_quantizer
    if layer.k_lin.words is None or (taken is not None and not taken.spec.is_row_local):
        return False
    tensors = [*x_dict.values(), *edge_index_dict.values()]
    if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors):
        return False
    relations = ["__".join(relation) for relation in edge_index_dict]
    known = all(name in layer.lin_src and name in layer.lin_dst for name in relations)
    ends = {kind for relation in edge_index_dict for kind in relation[::2]}
    rows = [x.dim() == 2 and x.size(0) > 0 and x.dtype is torch.float32 for x in x_dict.values()]
    return known and ends <= x_dict.keys() and all(rows)


def _by_relation(
    layer: Any, nodes: dict[str, _Nodes], edge_index_dict: dict[Relation, Tensor]
) -> dict[Type, list[Tensor]]:
    """What graph attention gives the nodes of each type, relation by relation."""
    outs: dict[Type, list[Tensor]] = {kind: [] for kind in nodes}
    for relation, edge_index in edge_index_dict.items():
        source, target = nodes[relation[0]], nodes[relation[2]]
        sent = {
            "x": (source.features, target.features),
            "alpha": (source.terms["source", relation], target.terms["target", relation]),
        }
        outs[relation[2]].append(materialized(layer._propagated(edge_index, None, sent).relu_()))
    return outs


class _Nodes:
    """What nodes of one type send, and their terms of logits ``[N, H]`` by end and relation."""

    def __init__(self, features: PackedNodes, terms: dict[tuple[str, Relation], Tensor]) -> None:
        self.features, self.terms = features, terms

    @classmethod
    def of(cls, layer: Any, kind: Type, x: Tensor, relations: list[Relation]) -> _Nodes | None:
        """Those of features ``[N, F]``; :obj:`None` where no kernel makes them in one."""
        ends = [(end, r) for r in relations for end, at in (("source", 0), ("target", 2)) if r[at] == kind]
        held = {"source": layer.lin_src, "target": layer.lin_dst}
        vectors = [held[end]["__".join(relation)].detach().reshape(-1) for end, relation in ends]
        lin, site, heads = layer.proj[kind], layer.argument_quantizers["x"], layer.heads
        given = torch.stack(vectors) if vectors else layer.q.detach().reshape(1, -1)  # of nodes without relations
        made = lin.with_head_dots(lin.quantize(x), site, given, heads)
        if made is None:
            return None
        packed, dots = made
        shape = torch.Size((x.size(0), heads, layer.out_channels // heads))
        return cls(PackedNodes(packed, shape, 0), dict(zip(ends, dots, strict=False)))


def _grouped(layer: Any, outs: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The results of all relations into a type of nodes as one, and the weights of these; ``outs`` is written over."""
    if not outs:
        return None, None
    means = torch.stack([_mean(layer, out) for out in outs])
    attention = (layer.q.detach() * means).sum(-1).softmax(0)
    total = outs[0].mul_(attention[0])
    for weight, out in zip(attention[1:], outs[1:], strict=True):
        total.add_(out.mul_(weight))
    return total, attention


def _mean(layer: Any, out: Tensor) -> Tensor:
    """The mean over nodes of the hyperbolic tangent of their linear map, ``[F]``."""

    def sums() -> Iterator[Tensor]:
        for rows in row_blocks(out.size(0), out.size(1), out.device):
            yield _sum_of_tanh(materialized(layer.k_lin(out[rows])))

    return sum(sums(), start=out.new_zeros(out.size(1))).div_(out.size(0))


def _sum_of_tanh(y: Tensor) -> Tensor:
    """The sum over the rows of ``tanh(y)``, ``[F]``; on the CPU by a kernel that takes some rows for edges of one."""
    num_rows, width = y.shape
    if backend_for(y.device) != "cpu" or width > MAX_WIDTH:
        return y.tanh_().sum(0)
    plan = lasting(lambda: _stretches(num_rows))
    return row_program(_tanh_of_rows(width), plan, [(y,)])[0].sum(0)


@lru_cache(maxsize=16)
def _tanh_of_rows(width: int) -> Program:
    nodes = (Node("load", (), width, 0), Node("tanh", (Use(0),), width), Node("sum", (Use(1),), width, is_row=True))
    return Program((Operand("source", width),), nodes, (2,))


@lru_cache(maxsize=16)
def _stretches(num_rows: int) -> GraphPlan:
    """A graph in which each target has :data:`STRETCH` rows in order, the last one those that are left."""
    rowptr = torch.arange(0, num_rows + STRETCH, STRETCH).clamp_(max=num_rows)
    return GraphPlan(rowptr, torch.arange(num_rows, dtype=torch.int32), num_rows)
