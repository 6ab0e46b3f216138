"""From PyG's graph arguments to plans: every adjacency format, self-loops and symmetric normalization, cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.edge_order import inverse_degree, inverse_root_degree
from ..kernels.plan import GraphPlan
from ..kernels.plan_op import inverse_root
from ..kernels.spmm import segment_sum, spmm
from .edges import Edges, LoopedPlan, edges_of, graph_size, is_sparse, may_look, memory_of, own_order
from .fixed import cached, fixed_graph, has_fixed_graph
from .samples import Samples

__all__ = [
    "Edges",
    "NormalizedGraph",
    "NormalizedOperator",
    "edges_of",
    "fixed_graph",
    "gcn_graph",
    "graph_size",
    "has_fixed_graph",
    "is_sparse",
    "looped_plan",
    "mean_graph",
    "plain_graph",
]


@dataclass(frozen=True, eq=False)
class NormalizedGraph:
    r"""A plan with the factors of :math:`P = \mathrm{diag}(t)\, W\, \mathrm{diag}(s)`.

    Args:
        plan: The graph.
        weight: ``[E]`` of ``W`` in CSR order, or :obj:`None` for ones.
        source: ``[num_src, 1]`` factor ``s`` applied before quantization, or :obj:`None`.
        target: ``[num_dst, 1]`` factor ``t`` applied after aggregation, or :obj:`None`.
        propagate: Computes ``P x`` of values in the place of kernels, where somebody looks into it (see
            :mod:`~qgnn_plugin.layers.watched`).
    """

    plan: GraphPlan
    weight: Tensor | None
    source: Tensor | None
    target: Tensor | None
    propagate: Callable[[Tensor], Tensor] | None = None

    def propagated(self, scaled: Tensor) -> Tensor:
        """``P x`` by ``propagate``, of values that have the factor ``s`` in them."""
        assert self.propagate is not None
        if self.source is not None:
            scaled = (scaled / self.source).masked_fill(self.source == 0, 0)
        return self.propagate(scaled)

    def repeated(self, copies: int) -> NormalizedGraph:
        """``copies`` of the graph side by side (see :meth:`GraphPlan.repeated`)."""
        if copies == 1:
            return self
        weight = None if self.weight is None else self.weight.repeat(copies, *([1] * (self.weight.dim() - 1)))
        source = None if self.source is None else self.source.repeat(copies, 1)
        target = source if self.target is self.source else self.target
        if target is not None and target is not source:
            target = target.repeat(copies, 1)
        return NormalizedGraph(self.plan.repeated(copies), weight, source, target)

    def rows(self, start: int, stop: int) -> NormalizedGraph:
        """The rows ``[start, stop)`` of ``P``."""
        if (start, stop) == (0, self.plan.num_dst):
            return self
        weight = None if self.weight is None else self.weight[self.plan.edges(start, stop)]
        target = None if self.target is None else self.target[start:stop]
        return NormalizedGraph(self.plan.rows(start, stop), weight, self.source, target)

    def apply(self, x: Tensor) -> Tensor:
        """``P x`` in floats."""
        if self.source is not None:
            x = x * self.source.view(-1, *([1] * (x.dim() - 1)))
        out = spmm(self.plan, x, self.weight)
        return out if self.target is None else out * self.target.view(-1, *([1] * (out.dim() - 1)))


def _cached(
    edge_index: Any, edge_weight: Any, key: tuple[Any, ...], build: Any, copies: int = 1, loops: str = "none"
) -> Any:
    """See :func:`.fixed.cached`; of a graph with ``loops`` as :class:`LoopedPlan` takes them."""
    if copies != 1:
        one = partial(_cached, edge_index, edge_weight, key, build, loops=loops)
        return _cached(edge_index, edge_weight, (*key, copies), lambda: one().repeated(copies), loops=loops)
    memory, more = memory_of(edge_index)
    return cached((*memory, edge_weight), (*key, *more), build, is_sized=loops in ("none", "more"))


def plain_graph(
    edge_index: Any, size: tuple[int, int], flow: str, weight: Tensor | None = None, *, copies: int = 1
) -> NormalizedGraph:
    """The graph as it is: no self-loops added, no normalization.

    A ``torch.sparse`` adjacency is a matrix: its values multiply.  As in PyG's unweighted layers, those of a
    ``SparseTensor`` do not.  ``copies`` of it stand side by side.  Of edge weights that are being learned only the
    plan is cached.
    """
    if _is_learned(edge_index, weight):
        return _weighted(plain_graph(edge_index, size, flow), edge_index, size, flow, weight).repeated(copies)

    def build() -> NormalizedGraph:
        return _plain(edge_index, size, flow, weight)

    return _cached(edge_index, weight, ("plain", size, flow), build, copies)


def _is_learned(edge_index: Any, weight: Tensor | None) -> bool:
    """Whether edges have weights that require a gradient."""
    return isinstance(weight, Tensor) and weight.requires_grad and not is_sparse(edge_index)


def _weighted(
    graph: NormalizedGraph, edge_index: Any, size: tuple[int, int], flow: str, weight: Tensor | None
) -> NormalizedGraph:
    """``graph``, that of ``edge_index`` without weights, with some."""
    values = edges_of(edge_index, weight, flow, size).weight
    assert values is not None
    return replace(graph, weight=own_order(graph.plan, values))


def _plain(edge_index: Any, size: tuple[int, int], flow: str, weight: Tensor | None = None) -> NormalizedGraph:
    edges = edges_of(edge_index, weight, flow, size, weighted=isinstance(edge_index, Tensor))
    plan = GraphPlan.from_edges(edges.src, edges.dst, *size)
    values = edges.weight if isinstance(edge_index, Tensor) else weight
    return NormalizedGraph(plan, None if values is None else own_order(plan, values), None, None)


def mean_graph(
    edge_index: Any,
    size: tuple[int, int],
    flow: str,
    dtype: torch.dtype = torch.float32,
    weight: Tensor | None = None,
    *,
    copies: int = 1,
) -> NormalizedGraph:
    """The graph with ``P`` the mean over neighbours, 0 where there are none; values as in :func:`plain_graph`.

    Weights multiply what the mean is of, and do not normalize it.
    """
    if _is_learned(edge_index, weight):
        return _weighted(mean_graph(edge_index, size, flow, dtype), edge_index, size, flow, weight).repeated(copies)

    def build() -> NormalizedGraph:
        graph = _plain(edge_index, size, flow, weight)
        if dtype is torch.float32:
            target = inverse_degree(graph.plan.rowptr)
        else:
            target = 1 / graph.plan.degree.to(dtype).clamp_min(1)
        return NormalizedGraph(graph.plan, graph.weight, None, target.view(-1, 1))

    return _cached(edge_index, weight, ("mean", size, flow, dtype), build, copies)


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
    copies: int = 1,
) -> NormalizedGraph:
    r"""The operator of GCNConv, :math:`D^{-1/2} (A + I) D^{-1/2}`, split into source and target factors.

    The semantics are those of :func:`torch_geometric.nn.conv.gcn_conv.gcn_norm`, which differ by format where the graph
    has self-loops already: of an edge list they keep their weight, a ``torch.sparse`` matrix gets one more on top, and
    in a ``SparseTensor`` they are replaced.  Degrees are weighted in-degrees.

    The result is cached; of edge weights that are being learned only the plan is.

    Raises:
        ValueError: If a node's weighted degree is negative, besides what :func:`edges_of` raises.
    """
    size, fill = (num_nodes, num_nodes), 2.0 if improved else 1.0
    if is_sparse(edge_index):
        edge_weight = None  # its values come first
    loops = "none"
    if normalize and add_self_loops:
        loops = "remaining" if not is_sparse(edge_index) else "more" if isinstance(edge_index, Tensor) else "new"

    def plan_of(edges: Edges, weighted: bool = True) -> LoopedPlan:
        return LoopedPlan.of(edges, size, loops, weighted)

    def operator(looped: LoopedPlan, weight: Tensor | None) -> NormalizedGraph:
        weight = None if weight is None else looped.weights(weight, fill)
        return (
            _normalized(looped.plan, weight, dtype) if normalize else NormalizedGraph(looped.plan, weight, None, None)
        )

    if isinstance(edge_weight, Tensor) and edge_weight.requires_grad:
        key: tuple[Any, ...] = ("looped", size, loops, flow)
        looped = _cached(edge_index, None, key, lambda: plan_of(edges_of(edge_index, None, flow, size)), loops=loops)
        return operator(looped, edges_of(edge_index, edge_weight, flow, size, dtype).weight).repeated(copies)

    def build() -> NormalizedGraph:
        edges = edges_of(edge_index, edge_weight, flow, size, dtype)
        weight = edges.weight
        if weight is None and fill != 1.0 and loops in ("more", "new"):
            weight = torch.ones(edges.src.numel(), dtype=dtype, device=edges.src.device)
        return operator(plan_of(edges, weighted=weight is not None), weight)

    key = ("gcn", num_nodes, improved, add_self_loops, normalize, flow, dtype)
    return _cached(edge_index, edge_weight, key, build, copies, loops)


def _normalized(plan: GraphPlan, weight: Tensor | None, dtype: torch.dtype) -> NormalizedGraph:
    """With the factors of ``D^-1/2 W D^-1/2``, 0 for a node without edges."""
    if weight is None and dtype is torch.float32 and not torch.compiler.is_compiling():
        factor = inverse_root_degree(plan.rowptr).view(-1, 1)
        return NormalizedGraph(plan, weight, factor, factor)
    degree = plan.degree.to(dtype) if weight is None else segment_sum(plan, weight)
    factor = inverse_root(degree).view(-1, 1)
    if weight is not None and may_look(factor) and bool(factor.detach().isnan().any()):
        node = int(factor.detach().isnan().flatten().nonzero()[0])
        raise ValueError(
            f"Expected edge weights with a sum of at least 0 into every node, whose root normalizes them "
            f"(got {float(degree.detach()[node]):.4g} at node {node}); use normalize=False for signed weights"
        )
    return NormalizedGraph(plan, weight, factor, factor)


def looped_plan(edge_index: Any, size: tuple[int, int], flow: str) -> GraphPlan:
    """The plan of a graph whose self-loops are removed and put back once per node, as GATConv does."""

    def build() -> GraphPlan:
        edges = edges_of(edge_index, None, flow, size, weighted=False)
        if is_sparse(edge_index) and isinstance(edge_index, Tensor):  # PyG merges what such a matrix repeats
            dst, src = torch.unique(torch.stack([edges.dst, edges.src]), dim=1)
            edges = Edges(src, dst, None)
        return LoopedPlan.of(edges, size, "new", weighted=False).plan

    return _cached(edge_index, None, ("new loops", size, flow), build, loops="new")


class NormalizedOperator:
    """Mixin of layers whose ``A~`` is the normalized adjacency of GCN."""

    add_self_loops: bool
    normalize: bool
    flow: str

    def normalized(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> NormalizedGraph:
        r"""``A~`` for node features ``x`` [*, N, F]; of several samples, as many copies of it.

        Raises:
            ValueError: If ``x`` has no dimension of nodes.
        """
        samples = Samples.of(self, x)
        return self.operator(edge_index, edge_weight, samples.num_nodes, x.dtype, samples.copies)

    def operator(
        self, edge_index: Any, edge_weight: Tensor | None, num_nodes: int, dtype: torch.dtype, copies: int = 1
    ) -> NormalizedGraph:
        """``A~`` of ``copies`` of a graph with ``num_nodes`` nodes."""
        return gcn_graph(
            edge_index,
            edge_weight,
            num_nodes,
            add_self_loops=self.add_self_loops,
            normalize=self.normalize,
            flow=self.flow,
            dtype=dtype,
            copies=copies,
        )
