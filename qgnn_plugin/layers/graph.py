"""From PyG's graph arguments to plans: every adjacency format, self-loops and symmetric normalization, cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.plan import GraphPlan, plan_cache
from ..kernels.spmm import segment_sum, spmm

__all__ = ["Edges", "NormalizedGraph", "edges_of", "gcn_graph", "looped_plan", "mean_graph", "plain_graph"]


@dataclass(frozen=True, eq=False)
class Edges:
    """An edge list: ``src`` and ``dst`` [E] int64, ``weight`` [E] or :obj:`None` for ones."""

    src: Tensor
    dst: Tensor
    weight: Tensor | None


def edges_of(edge_index: Any, edge_weight: Tensor | None = None, flow: str = "source_to_target") -> Edges:
    """Read an ``edge_index`` [2, E], ``EdgeIndex``, ``torch.sparse`` or ``SparseTensor`` transposed adjacency.

    Values of a sparse adjacency are its weights, unless all are one or ``edge_weight`` is given.
    """
    if not isinstance(edge_index, Tensor):
        if not hasattr(edge_index, "coo"):
            raise TypeError(
                f"Expected 'edge_index' to be a tensor, an EdgeIndex or a SparseTensor (got {type(edge_index).__name__})"
            )
        dst, src, value = edge_index.coo()
        return Edges(src, dst, edge_weight if edge_weight is not None else _unless_ones(value))
    if edge_index.layout == torch.strided:
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"Expected 'edge_index' of shape [2, E] (got {list(edge_index.shape)})")
        plain = edge_index.as_subclass(Tensor)
        first, second = plain[0], plain[1]
        src, dst = (first, second) if flow == "source_to_target" else (second, first)
        return Edges(src, dst, edge_weight)
    coo = edge_index.to_sparse_coo().coalesce()
    dst, src = coo.indices()
    return Edges(src, dst, edge_weight if edge_weight is not None else _unless_ones(coo.values()))


def _unless_ones(value: Tensor | None) -> Tensor | None:
    if value is None or (not value.requires_grad and bool((value == 1).all())):
        return None
    return value


@dataclass(frozen=True, eq=False)
class NormalizedGraph:
    r"""A plan with the factors of :math:`P = \mathrm{diag}(t)\, W\, \mathrm{diag}(s)`.

    Args:
        plan: The graph.
        weight: ``[E]`` of ``W`` in CSR order, or :obj:`None` for ones.
        source: ``[num_src, 1]`` factor ``s`` applied before quantization, or :obj:`None`.
        target: ``[num_dst, 1]`` factor ``t`` applied after aggregation, or :obj:`None`.
    """

    plan: GraphPlan
    weight: Tensor | None
    source: Tensor | None
    target: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        """``P x`` in floats."""
        if self.source is not None:
            x = x * self.source.view(-1, *([1] * (x.dim() - 1)))
        out = spmm(self.plan, x, self.weight)
        return out if self.target is None else out * self.target.view(-1, *([1] * (out.dim() - 1)))


def _cached(tensors: tuple[Any, ...], key: tuple[Any, ...], build: Any) -> Any:
    """Cache by identity; a graph whose weights are being learned, or in a foreign format, is built anew."""
    if all(t is None or (isinstance(t, Tensor) and not t.requires_grad) for t in tensors):
        return plan_cache.get(tensors, key, build)
    return build()


def plain_graph(edge_index: Any, size: tuple[int, int], flow: str, weight: Tensor | None = None) -> NormalizedGraph:
    """The graph as it is: no self-loops added, no normalization."""

    def build() -> NormalizedGraph:
        edges = edges_of(edge_index, weight, flow)
        plan = GraphPlan.from_edges(edges.src, edges.dst, *size)
        return NormalizedGraph(plan, None if edges.weight is None else plan.sort(edges.weight), None, None)

    return _cached((edge_index, weight), ("plain", size, flow), build)


def mean_graph(edge_index: Any, size: tuple[int, int], flow: str) -> NormalizedGraph:
    """The graph with ``P`` the mean over neighbours (0 where there are none); edge values are ignored, as in SAGEConv."""

    def build() -> NormalizedGraph:
        edges = edges_of(edge_index, None, flow)
        plan = GraphPlan.from_edges(edges.src, edges.dst, *size)
        return NormalizedGraph(plan, None, None, (1 / plan.degree.clamp_min(1)).view(-1, 1))

    return _cached((edge_index,), ("mean", size, flow), build)


def gcn_graph(
    edge_index: Any,
    edge_weight: Tensor | None,
    num_nodes: int,
    *,
    improved: bool = False,
    add_self_loops: bool = True,
    normalize: bool = True,
    flow: str = "source_to_target",
    dtype: torch.dtype = torch.float32,
) -> NormalizedGraph:
    r"""The operator of GCNConv, :math:`D^{-1/2} (A + I) D^{-1/2}`, split into source and target factors.

    The semantics are those of :func:`torch_geometric.nn.conv.gcn_conv.gcn_norm`: existing self-loops keep their weight,
    degrees are weighted in-degrees.
    """

    def build() -> NormalizedGraph:
        edges = edges_of(edge_index, edge_weight, flow)
        if normalize and add_self_loops:
            edges = _with_self_loops(edges, num_nodes, 2.0 if improved else 1.0, dtype)
        plan = GraphPlan.from_edges(edges.src, edges.dst, num_nodes, num_nodes)
        weight = None if edges.weight is None else plan.sort(edges.weight).to(dtype)
        if not normalize:
            return NormalizedGraph(plan, weight, None, None)
        degree = plan.degree.to(dtype) if weight is None else segment_sum(plan, weight)
        factor = degree.pow(-0.5)
        factor = factor.masked_fill(factor == float("inf"), 0).view(-1, 1)
        return NormalizedGraph(plan, weight, factor, factor)

    key = ("gcn", num_nodes, improved, add_self_loops, normalize, flow, dtype)
    return _cached((edge_index, edge_weight), key, build)


def _with_self_loops(edges: Edges, num_nodes: int, fill: float, dtype: torch.dtype) -> Edges:
    keep = edges.src != edges.dst
    nodes = torch.arange(num_nodes, device=edges.src.device)
    src, dst = torch.cat([edges.src[keep], nodes]), torch.cat([edges.dst[keep], nodes])
    if edges.weight is None and fill == 1.0:
        return Edges(src, dst, None)
    weight = edges.weight if edges.weight is not None else torch.ones(keep.numel(), dtype=dtype, device=src.device)
    loops = weight.new_full((num_nodes,), fill)
    if edges.weight is not None:
        loops = loops.index_put((edges.src[~keep],), weight[~keep])
    return Edges(src, dst, torch.cat([weight[keep], loops]))


def looped_plan(edge_index: Any, size: tuple[int, int], flow: str) -> GraphPlan:
    """The plan of a graph whose self-loops are removed and put back once per node, as GATConv does."""

    def build() -> GraphPlan:
        edges = edges_of(edge_index, None, flow)
        keep = edges.src != edges.dst
        nodes = torch.arange(min(size), device=edges.src.device)
        return GraphPlan.from_edges(
            torch.cat([edges.src[keep], nodes]), torch.cat([edges.dst[keep], nodes]), size[0], size[1]
        )

    return _cached((edge_index,), ("looped", size, flow), build)
