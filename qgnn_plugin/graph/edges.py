"""PyG's graph arguments, in every format, as edges with weights: read, and checked where something is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.utils import to_edge_index

from ..kernels.plan import GraphPlan
from ..kernels.plan_op import traced_plan
from .samples import layer_name

__all__ = [
    "Edges",
    "LoopedPlan",
    "edges_of",
    "entries_of",
    "graph_size",
    "is_sparse",
    "may_look",
    "memory_of",
    "own_order",
]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MATRICES = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


@dataclass(frozen=True, eq=False)
class Edges:
    """An edge list: ``src`` and ``dst`` [E] integers, ``weight`` [E] or :obj:`None` for ones."""

    src: Tensor
    dst: Tensor
    weight: Tensor | None


def edges_of(
    edge_index: Any,
    edge_weight: Tensor | None = None,
    flow: str = "source_to_target",
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    *,
    weighted: bool = True,
) -> Edges:
    """Read an ``edge_index`` [2, E], ``EdgeIndex``, ``torch.sparse`` or ``SparseTensor`` transposed adjacency.

    Values of a sparse adjacency are its weights, unless all are one; as in PyG, they come before ``edge_weight``.

    Args:
        edge_index: The graph.
        edge_weight: ``[E]`` or, as ``data.edge_attr`` has them, ``[E, 1]``.
        flow: Of messages, as in PyG.
        size: Number of sources and targets, which a matrix has to have.
        dtype: Of the weights; by default their own, or float32 for integers and booleans.
        weighted: Whether the values of a ``SparseTensor`` are weights; else they may be features ``[E, D]``.

    Raises:
        TypeError: If these are no graph, or weights are complex.
        ValueError: If there is not one finite weight per edge, or a matrix is of another size.
    """
    if is_sparse(edge_index) and flow != "source_to_target":
        raise ValueError(
            f"Expected the flow 'source_to_target' for a sparse adjacency (got {flow!r}); "
            f"pass its transpose instead: adj_t.t()"
        )
    if size is not None and is_sparse(edge_index):
        _check_size(edge_index, size)
    if not isinstance(edge_index, Tensor):
        dst, src, value = edge_index.coo()
        return Edges(src, dst, _unless_ones(_checked(value, src, dtype, "values")) if weighted else None)
    if edge_index.layout == torch.strided:
        first, second = _checked_pair(edge_index).unbind(0)
        src, dst = (first, second) if flow == "source_to_target" else (second, first)
        return Edges(src, dst, _checked(edge_weight, src, dtype, "'edge_weight'"))
    if edge_index.layout not in MATRICES or edge_index.dim() != 2:
        raise TypeError(
            f"Expected a matrix in COO, CSR or CSC format (got {edge_index.dim()} dimensions in {edge_index.layout}); "
            f"use 'to_sparse_csr()'"
        )
    # Entries that a compressed matrix repeats are several: a mean counts them, a maximum picks one of them.
    (dst, src), values = entries_of(edge_index)
    return Edges(src, dst, _unless_ones(_checked(values, src, dtype, "values")))


def entries_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ``[2, E]`` and values of the entries of a ``torch.sparse`` matrix, which is only read.

    PyG's own function marks a COO matrix as coalesced, in place, which autograd takes for a change of its values.
    """
    if matrix.layout != torch.sparse_coo:
        return to_edge_index(matrix)
    matrix = matrix.coalesce()
    return matrix.indices().detach().long(), matrix.values()


def _checked_pair(edge_index: Tensor) -> Tensor:
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(f"Expected 'edge_index' of shape [2, E] (got {list(edge_index.shape)})")
    if edge_index.dtype not in INTEGERS:
        raise ValueError(f"Expected 'edge_index' to be of integer type (got {edge_index.dtype}); use edge_index.long()")
    return edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index


def _checked(weight: Any, src: Tensor, dtype: torch.dtype | None, name: str) -> Tensor | None:
    """Weights as floats, one per edge."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or weight.layout != torch.strided or weight.is_complex():
        kind = f"{weight.dtype}, {weight.layout}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"Expected {name} to be a dense tensor of real numbers (got {kind}); use torch.as_tensor")
    count = src.numel()
    if tuple(weight.shape) not in ((count,), (count, 1)):
        raise ValueError(
            f"Expected {name} of shape [{count}] or [{count}, 1], one per edge (got {list(weight.shape)}); "
            f"for features of edges use a layer that takes 'edge_attr'"
        )
    if weight.device != src.device:
        raise ValueError(f"Expected {name} on the device of the edges, {src.device} (got {weight.device}); use '.to'")
    weight = weight.reshape(-1)
    if dtype is None and not weight.is_floating_point():
        dtype = torch.float32
    weight = weight if dtype is None else weight.to(dtype)
    if may_look(weight) and not bool(weight.detach().isfinite().all()):
        raise ValueError(f"Expected finite {name} (got NaN or infinity); check them: torch.isfinite")
    return weight


def may_look(values: Tensor) -> bool:
    """Whether to read ``values`` back: not while compiling, nor in every step of training on a device."""
    return not torch.compiler.is_compiling() and (values.device.type == "cpu" or not values.requires_grad)


def _check_size(matrix: Any, size: tuple[int, int]) -> None:
    found = tuple(matrix.shape) if isinstance(matrix, Tensor) else _sizes(matrix)
    if found is not None and len(found) == 2 and found != (size[1], size[0]):
        raise ValueError(
            f"Expected a matrix of {size[1]} targets (rows) and {size[0]} sources (columns), as there are features "
            f"(got {list(found)}); a matrix is the transposed adjacency"
        )


def _sizes(sparse_tensor: Any) -> tuple[int, ...] | None:
    sizes = getattr(sparse_tensor, "sparse_sizes", None)
    return None if sizes is None else tuple(sizes())


def is_sparse(edge_index: Any) -> bool:
    """Whether ``edge_index`` is a transposed adjacency matrix rather than a list of edges.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(edge_index, Tensor):
        return edge_index.layout != torch.strided
    if not hasattr(edge_index, "coo"):
        raise TypeError(
            f"Expected 'edge_index' to be a tensor, an EdgeIndex or a SparseTensor "
            f"(got {type(edge_index).__name__}); use torch.as_tensor(edge_index)"
        )
    return True


def graph_size(layer: Any, edge_index: Any, num_src: int, num_dst: int | None, size: Any = None) -> tuple[int, int]:
    """Number of nodes that send and that receive messages, as PyG finds it.

    Args:
        layer: Whose graph it is.
        edge_index: The graph; the size of a matrix or an ``EdgeIndex`` comes before ``size``.
        num_src: Nodes in the first feature matrix, which send.
        num_dst: Nodes in the second, which add their own share; :obj:`None` where there is none.
        size: The caller's: rows and columns of ``edge_index``.

    Raises:
        ValueError: If these do not agree.
    """
    if isinstance(edge_index, EdgeIndex):
        size = edge_index.sparse_size()
    elif is_sparse(edge_index):
        size = (edge_index.size(1), edge_index.size(0))
    sizes = (None, None) if size is None else size
    for what, found, expected in zip(("source", "target"), (num_src, num_dst), sizes, strict=True):
        if found is not None and expected is not None and found != expected:
            raise ValueError(
                f"Expected features of {expected} {what} nodes in '{layer_name(layer)}', the size of its graph "
                f"(got {found})"
            )
    if layer.flow == "source_to_target":
        return num_src, next(n for n in (num_dst, sizes[1], num_src) if n is not None)
    if num_dst not in (None, num_src):
        raise ValueError(
            f"Expected as many target as source nodes, {num_src}, in '{layer_name(layer)}', whose flow is "
            f"'target_to_source': there PyG counts those that receive by the first of a pair (got {num_dst})"
        )
    return num_src, num_src


def memory_of(edge_index: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors that hold a graph, and what else tells it from others in the same memory."""
    if isinstance(edge_index, EdgeIndex):  # wraps a tensor and has no memory of its own to tell two of them apart
        return (edge_index.as_tensor(),), ()
    if not isinstance(edge_index, Tensor) and hasattr(edge_index, "coo"):
        return tuple(edge_index.coo()), ("SparseTensor", _sizes(edge_index))
    return (edge_index,), ()


def _unless_ones(value: Tensor | None) -> Tensor | None:
    if value is None or (not value.requires_grad and bool((value == 1).all())):
        return None
    return value


# Self-loops ###########################################################################################################


@dataclass(frozen=True, eq=False)
class LoopedPlan:
    """A plan of a caller's edges and added self-loops, and how weights of the edges become weights of the plan.

    Args:
        plan: The graph.
        num_loops: How many nodes got a self-loop; these come after the edges.
        kept: ``[K]`` the caller's edges that are in the plan, or :obj:`None` for all.
        own: Nodes of the caller's self-loops and their edges, whose weights the added ones take over; or :obj:`None`.
    """

    plan: GraphPlan
    num_loops: int = 0
    kept: Tensor | None = None
    own: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, edges: Edges, size: tuple[int, int], loops: str, weighted: bool = True) -> LoopedPlan:
        """Of the edges as they are (``"none"``), with a self-loop per node on top (``"more"``), with its own self-loops
        replaced by them (``"new"``), or, keeping the weights of these, completed (``"remaining"``).

        One that is not ``weighted`` cannot be asked for :meth:`weights`.
        """
        if torch.compiler.is_compiling():
            return TracedLoops.of(edges, size, loops)
        if loops == "none":
            return cls(GraphPlan.from_edges(edges.src, edges.dst, *size))
        kept = own = None
        count = min(size)
        drops: Any = {"drops_loops": loops != "more", "checks_loops": loops == "remaining"}
        plan, dropped = GraphPlan.with_loops(edges.src, edges.dst, *size, **drops)
        if dropped and weighted:
            is_loop = edges.src == edges.dst
            kept, ids = (~is_loop).nonzero().view(-1), is_loop.nonzero().view(-1)
            if loops == "remaining":
                own = (edges.src[ids].long(), ids)
        return cls(plan, count, kept, own)

    def weights(self, weight: Tensor, fill: float) -> Tensor:
        """The caller's weights ``[E]``, with ``fill`` for added self-loops, in CSR order; in memory of their own."""
        parts = [weight if self.kept is None else weight[self.kept]]
        if self.num_loops:
            loops = weight.new_full((self.num_loops,), fill)
            parts.append(loops if self.own is None else loops.index_put((self.own[0],), weight[self.own[1]]))
        return own_order(self.plan, torch.cat(parts) if len(parts) > 1 else parts[0])


class TracedLoops(LoopedPlan):
    """The same in a program that is being traced: ``perm`` names edges as the caller lists them, then the loops."""

    @classmethod
    def of(cls, edges: Edges, size: tuple[int, int], loops: str, weighted: bool = True) -> LoopedPlan:
        plan = traced_plan(edges.src, edges.dst, *size, loops)
        return cls(plan, 0 if loops == "none" else torch.sym_min(*size))

    def weights(self, weight: Tensor, fill: float) -> Tensor:
        loops = weight.new_full((self.num_loops,), fill)
        assert self.plan.perm is not None
        return torch.cat([weight, loops])[self.plan.perm]


def own_order(plan: GraphPlan, weight: Tensor) -> Tensor:
    """``weight`` in CSR order, in memory of its own: what is cached must not follow the caller's tensor."""
    return weight.clone() if plan.perm is None else plan.sort(weight)
