"""From PyG's graph arguments to plans: every adjacency format, self-loops and symmetric normalization, cached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex

from ..kernels.plan import GraphPlan, plan_cache
from ..kernels.spmm import segment_sum, spmm
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
class Edges:
    """An edge list: ``src`` and ``dst`` [E] int64, ``weight`` [E] or :obj:`None` for ones."""

    src: Tensor
    dst: Tensor
    weight: Tensor | None


def edges_of(edge_index: Any, edge_weight: Tensor | None = None, flow: str = "source_to_target") -> Edges:
    """Read an ``edge_index`` [2, E], ``EdgeIndex``, ``torch.sparse`` or ``SparseTensor`` transposed adjacency.

    Values of a sparse adjacency are its weights, unless all are one; as in PyG, they come before ``edge_weight``.
    """
    if is_sparse(edge_index) and flow != "source_to_target":
        raise ValueError(
            f"Expected the flow 'source_to_target' for a sparse adjacency (got {flow!r}); "
            f"pass its transpose instead: adj_t.t()"
        )
    if not isinstance(edge_index, Tensor):
        if not hasattr(edge_index, "coo"):
            raise TypeError(
                f"Expected 'edge_index' to be a tensor, an EdgeIndex or a SparseTensor "
                f"(got {type(edge_index).__name__})"
            )
        dst, src, value = edge_index.coo()
        return Edges(src, dst, _unless_ones(value))
    if edge_index.layout == torch.strided:
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"Expected 'edge_index' of shape [2, E] (got {list(edge_index.shape)})")
        first, second = _plain(edge_index).unbind(0)
        src, dst = (first, second) if flow == "source_to_target" else (second, first)
        return Edges(src, dst, edge_weight)
    coo = edge_index.to_sparse_coo().coalesce()
    dst, src = coo.indices()
    return Edges(src, dst, _unless_ones(coo.values()))


def is_sparse(edge_index: Any) -> bool:
    """Whether ``edge_index`` is a transposed adjacency matrix rather than a list of edges."""
    return not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided


def graph_size(
    edge_index: Any, num_src: int, num_dst: int | None, size: Any = None, flow: str = "source_to_target"
) -> tuple[int, int]:
    """Number of nodes that send and that receive messages, as PyG finds it.

    Args:
        edge_index: The graph; the size of a matrix or an ``EdgeIndex`` comes before ``size``.
        num_src: Nodes that have features to send.
        num_dst: Nodes that receive and have features, :obj:`None` where they have none.
        size: The caller's, rows and columns of ``edge_index``.
        flow: Which of the two send.

    Raises:
        ValueError: If these do not agree.
    """
    if isinstance(edge_index, EdgeIndex):
        size = edge_index.sparse_size()
    elif is_sparse(edge_index):
        size = (edge_index.size(1), edge_index.size(0))
    src, dst = (None, None) if size is None else size if flow == "source_to_target" else size[::-1]
    for what, found, expected in (("source", num_src, src), ("target", num_dst, dst)):
        if found is not None and expected is not None and found != expected:
            raise ValueError(f"Expected features of {expected} {what} nodes, the size of the graph (got {found})")
    return num_src, next(n for n in (num_dst, dst, num_src) if n is not None)


def _plain(edge_index: Any) -> Any:
    """An ``EdgeIndex`` wraps a tensor and has no memory of its own to tell two of them apart."""
    return edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index


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

    def repeated(self, copies: int) -> NormalizedGraph:
        """``copies`` of the graph side by side (see :meth:`GraphPlan.repeated`)."""
        if copies == 1:
            return self
        weight = None if self.weight is None else self.weight.repeat(copies, *([1] * (self.weight.dim() - 1)))
        source = None if self.source is None else self.source.repeat(copies, 1)
        shared = self.target is self.source or self.target is None
        target = source if self.target is self.source else None if shared else self.target.repeat(copies, 1)
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


_fixed: dict[tuple[Any, ...], Any] | None = None


@contextmanager
def fixed_graph() -> Iterator[None]:
    """Let ``torch.compile(fullgraph=True)`` trace models on one graph.

    A compiled function cannot look a graph up by its memory.  Inside the context the calls of layers remember their
    graph, and what is compiled there uses it as a constant: run the model once (for training with its backward pass),
    compile it, and call it with that graph only.  (:func:`qgnn_plugin.compressed_activations` still breaks the graph.)
    ::

        with qgnn.fixed_graph():
            packed(x, edge_index)
            compiled = torch.compile(packed, fullgraph=True)
            compiled(x, edge_index)

    Raises:
        ValueError: If layers see two graphs of the same size inside.
        KeyError: If something is compiled before it was run.
    """
    global _fixed
    before, _fixed = _fixed, {}
    try:
        yield
    finally:
        _fixed = before


def has_fixed_graph() -> bool:
    """Whether a context of :func:`fixed_graph` is open."""
    return _fixed is not None


def _cached(tensors: tuple[Any, ...], key: tuple[Any, ...], build: Any, copies: int = 1) -> Any:
    """Cache by identity; a graph whose weights are being learned, or in a foreign format, is built anew."""
    if copies != 1:
        return _cached(tensors, (*key, copies), lambda: _cached(tensors, key, build).repeated(copies))
    if _fixed is not None and torch.compiler.is_compiling():
        return _fixed[key]
    value = _looked_up(tensors, key, build)
    if _fixed is not None and _fixed.setdefault(key, value) is not value:
        raise ValueError("Expected one graph inside 'fixed_graph' (got another of the same size); use two contexts")
    return value


def _looked_up(tensors: tuple[Any, ...], key: tuple[Any, ...], build: Any) -> Any:
    tensors = tuple(_plain(t) for t in tensors)
    if all(t is None or (isinstance(t, Tensor) and not t.requires_grad) for t in tensors):
        return plan_cache.get(tensors, key, build)
    return build()


def plain_graph(
    edge_index: Any, size: tuple[int, int], flow: str, weight: Tensor | None = None, *, copies: int = 1
) -> NormalizedGraph:
    """The graph as it is: no self-loops added, no normalization.

    A ``torch.sparse`` adjacency is a matrix: its values multiply.  As in PyG's unweighted layers, those of a
    ``SparseTensor`` do not.  ``copies`` of it stand side by side.
    """

    def build() -> NormalizedGraph:
        edges = edges_of(edge_index, weight, flow)
        plan = GraphPlan.from_edges(edges.src, edges.dst, *size)
        values = edges.weight if isinstance(edge_index, Tensor) else weight
        return NormalizedGraph(plan, None if values is None else _sorted(plan, values), None, None)

    return _cached((edge_index, weight), ("plain", size, flow), build, copies)


def _sorted(plan: GraphPlan, weight: Tensor) -> Tensor:
    """The weights in CSR order, in memory of their own: what is cached must not follow the caller's tensor."""
    return weight.clone() if plan.perm is None else plan.sort(weight)


def mean_graph(
    edge_index: Any, size: tuple[int, int], flow: str, dtype: torch.dtype = torch.float32, *, copies: int = 1
) -> NormalizedGraph:
    """The graph with ``P`` the mean over neighbours, 0 where there are none; values as in :func:`plain_graph`."""

    def build() -> NormalizedGraph:
        graph = plain_graph(edge_index, size, flow)
        target = (1 / graph.plan.degree.to(dtype).clamp_min(1)).view(-1, 1)
        return NormalizedGraph(graph.plan, graph.weight, None, target)

    return _cached((edge_index,), ("mean", size, flow, dtype), build, copies)


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
    """

    def build() -> NormalizedGraph:
        edges = edges_of(edge_index, edge_weight, flow)
        if normalize and add_self_loops:
            fill = 2.0 if improved else 1.0
            if not is_sparse(edge_index):
                edges = _with_remaining_loops(edges, num_nodes, fill, dtype)
            else:
                if not isinstance(edge_index, Tensor):
                    edges = _without_loops(edges)
                edges = _with_loops(edges, num_nodes, fill, dtype)
        plan = GraphPlan.from_edges(edges.src, edges.dst, num_nodes, num_nodes)
        weight = None if edges.weight is None else _sorted(plan, edges.weight).to(dtype)
        if not normalize:
            return NormalizedGraph(plan, weight, None, None)
        degree = plan.degree.to(dtype) if weight is None else segment_sum(plan, weight)
        factor = degree.pow(-0.5)
        factor = factor.masked_fill(factor == float("inf"), 0).view(-1, 1)
        return NormalizedGraph(plan, weight, factor, factor)

    key = ("gcn", num_nodes, improved, add_self_loops, normalize, flow, dtype)
    return _cached((edge_index, edge_weight), key, build, copies)


def _without_loops(edges: Edges) -> Edges:
    keep = edges.src != edges.dst
    weight = None if edges.weight is None else edges.weight[keep]
    return Edges(edges.src[keep], edges.dst[keep], weight)


def _with_remaining_loops(edges: Edges, num_nodes: int, fill: float, dtype: torch.dtype) -> Edges:
    """A self-loop of weight ``fill`` where there is none, in a weighted graph; of weight 1 in an unweighted one."""
    loop = edges.src == edges.dst
    kept, weight = _without_loops(edges), edges.weight
    if weight is None:
        return _with_loops(kept, num_nodes, 1.0, dtype)
    fills = weight.new_full((num_nodes,), fill).index_put((edges.src[loop],), weight[loop])
    return _with_loops(kept, num_nodes, fills, dtype)


def _with_loops(edges: Edges, num_nodes: int, fill: float | Tensor, dtype: torch.dtype) -> Edges:
    """One more self-loop per node, of weight ``fill``."""
    nodes = torch.arange(num_nodes, device=edges.src.device)
    src, dst, weight = torch.cat([edges.src, nodes]), torch.cat([edges.dst, nodes]), edges.weight
    if weight is None and isinstance(fill, float) and fill == 1.0:
        return Edges(src, dst, None)
    if weight is None:
        weight = torch.ones(edges.src.numel(), dtype=dtype, device=src.device)
    loops = weight.new_full((num_nodes,), fill) if isinstance(fill, float) else fill
    return Edges(src, dst, torch.cat([weight, loops]))


def looped_plan(edge_index: Any, size: tuple[int, int], flow: str) -> GraphPlan:
    """The plan of a graph whose self-loops are removed and put back once per node, as GATConv does."""

    def build() -> GraphPlan:
        kept = _without_loops(edges_of(edge_index, None, flow))
        looped = _with_loops(Edges(kept.src, kept.dst, None), min(size), 1.0, torch.float32)
        return GraphPlan.from_edges(looped.src, looped.dst, *size)

    return _cached((edge_index,), ("looped", size, flow), build)


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
        return self.operator(edge_index, edge_weight, samples.num_nodes, x.dtype, samples.count)

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
