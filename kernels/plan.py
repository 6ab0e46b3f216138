"""Graph plans: the CSR view of a graph that every sparse kernel walks, built once per graph and cached.

A plan orders the edges by destination.  Row ``i`` of the plan lists the sources of node ``i``'s messages,
``col[rowptr[i]:rowptr[i + 1]]``; ``perm`` maps a CSR position to the caller's edge, so that edge weights can follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cache import PlanCache, pinned_plans
from .edge_order import check_nodes, order_edges
from .indices import inherit_csr
from .streams import derived, lasting

__all__ = ["GraphPlan", "PlanCache", "check_nodes", "graph_plan", "pinned_plans", "plan_cache"]

MAX_NODES = 2**31 - 1
MOST_PARTS = 64  # of a plan, that are kept


class GraphPlan:
    r"""A graph in CSR form, by destination.

    Args:
        rowptr: ``[num_dst + 1]`` int64, first edge of each destination.
        col: ``[num_edges]`` int32, source node of each edge.
        num_src: Number of source nodes.
        perm: ``[num_edges]`` int64, the caller's edge at each CSR position, or :obj:`None` where they coincide.
    """

    is_traced = False  # whether it is the result of an op in a program that is being traced, and not known yet
    first_edge = 0  # of a part of a plan without ``perm``: the caller's edge at its first position

    def __init__(self, rowptr: Tensor, col: Tensor, num_src: int, perm: Tensor | None = None) -> None:
        self.rowptr = rowptr
        self.col = col
        self.perm = perm
        self.num_src = num_src if isinstance(num_src, torch.SymInt) else int(num_src)
        self.num_dst = rowptr.numel() - 1
        self.num_edges = col.numel()

    @classmethod
    def from_edges(cls, src: Tensor, dst: Tensor, num_src: int, num_dst: int) -> GraphPlan:
        """Sort an edge list (``[E]`` sources, ``[E]`` destinations) by destination; stable, hence deterministic.

        The plan shares no memory with the edges.

        Raises:
            TypeError: If these are no integers.
            ValueError: If there are nodes that do not exist, more than 32 bits can number, or two devices.
        """
        if torch.compiler.is_compiling():  # a program that takes its edges as an input: the op of `plan_op`
            rowptr, col, perm = torch.ops.qgnn.plan(src, dst, num_src, num_dst)
            plan = cls(rowptr, col, num_src, perm)
            plan.is_traced = True
            return plan
        _check_sizes(src, dst, num_src, num_dst)
        order = order_edges(src, dst, num_src, num_dst)
        return cls(order.rowptr, order.col, num_src, order.perm)

    @classmethod
    def with_loops(
        cls,
        src: Tensor,
        dst: Tensor,
        num_src: int,
        num_dst: int,
        *,
        drops_loops: bool = False,
        checks_loops: bool = False,
    ) -> tuple[GraphPlan, bool]:
        """The same with a self-loop on each node that is a source and a destination, after the other edges into it.

        With ``drops_loops`` these take the place of the self-loops among the edges, whose nodes have to exist all the
        same with ``checks_loops``.  ``perm`` numbers the edges that
        are taken, then the added ones.

        Returns:
            The plan, and whether self-loops were left out.
        """
        _check_sizes(src, dst, num_src, num_dst)
        added = min(num_src, num_dst)
        loops: Any = {"added": added, "drops_loops": drops_loops, "checks_loops": checks_loops}
        order = order_edges(src, dst, num_src, num_dst, **loops)
        return cls(order.rowptr, order.col, num_src, order.perm), order.dropped

    @classmethod
    def from_csr(cls, rowptr: Tensor, col: Tensor, num_src: int) -> GraphPlan:
        """Take the pattern of a CSR matrix with ``num_src`` columns; shares no memory with it.

        Raises:
            TypeError: If indices are no integers.
            ValueError: If row pointers do not rise from 0 to the number of columns listed, or a column does not exist.
        """
        check_nodes(col, num_src, "columns", "check the sparse matrix: torch.sparse.check_sparse_tensor_invariants")
        pointers = rowptr.to(torch.int64, copy=True)
        ends = pointers.cummax(0).values.eq(pointers).all() & (pointers[0] == 0) & (pointers[-1] == col.numel())
        if not bool(ends):
            raise ValueError(
                f"Expected row pointers that rise from 0 to {col.numel()} (got {pointers.tolist()[:4]} ...); "
                f"check the sparse matrix: torch.sparse.check_sparse_tensor_invariants"
            )
        return cls(pointers, col.to(torch.int32, copy=True), num_src)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_derived", "_parts")}

    def __repr__(self) -> str:
        return f"GraphPlan(num_src={self.num_src}, num_dst={self.num_dst}, num_edges={self.num_edges})"

    @property
    def device(self) -> torch.device:
        return self.rowptr.device

    @derived
    def degree(self) -> Tensor:
        """``[num_dst]`` float32, number of incoming edges."""
        return (self.rowptr[1:] - self.rowptr[:-1]).to(torch.float32)

    @derived
    def max_degree(self) -> int:
        """Largest number of edges into one node."""
        return int((self.rowptr[1:] - self.rowptr[:-1]).max()) if self.num_dst else 0

    @derived
    def dst(self) -> Tensor:
        """``[num_edges]`` int64, destination of each edge in CSR order."""
        nodes = torch.arange(self.num_dst, device=self.device)
        return torch.repeat_interleave(nodes, self.rowptr[1:] - self.rowptr[:-1], output_size=self.num_edges)

    @derived
    def transpose(self) -> GraphPlan:
        """The plan of the reversed edges; its ``perm`` refers to CSR positions of this plan."""
        return GraphPlan.from_edges(self.dst, self.col.long(), self.num_dst, self.num_src)

    @derived
    def positions(self) -> Tensor:
        """``[num_edges]`` int64, the CSR positions in order."""
        return torch.arange(self.num_edges, device=self.device)

    @derived
    def own_sources(self) -> Tensor:
        """``[num_edges]`` int32, in place of ``col`` where each edge is its own source."""
        return self.positions.to(torch.int32)

    @derived
    def edge_ids(self) -> Tensor:
        """``[num_edges]`` int64, the caller's edge at each CSR position; of a part too, of all the caller's edges."""
        if self.perm is not None:
            return self.perm
        return self.positions + self.first_edge if self.first_edge else self.positions

    @derived
    def in_order(self) -> GraphPlan:
        """The same of edges that the caller has in CSR order, those of a part alone."""
        is_so = self.perm is None and self.first_edge == 0
        return self if is_so else GraphPlan(self.rowptr, self.col, self.num_src)

    def edges(self, start: int, stop: int) -> slice:
        """The CSR positions of the edges into the destinations ``[start, stop)``."""
        if (start, stop) == (0, self.num_dst):
            return slice(0, self.num_edges)
        return slice(int(self.rowptr[start]), int(self.rowptr[stop]))

    @derived
    def _parts(self) -> dict[tuple[int, int], GraphPlan]:
        """Plans of some destinations, so that what is derived from them is kept."""
        return {}

    def rows(self, start: int, stop: int) -> GraphPlan:
        """The plan of the destinations ``[start, stop)`` alone; sources keep their numbers."""
        if (start, stop) == (0, self.num_dst):
            return self
        parts = self._parts if self.device.type == "cpu" and not torch.compiler.is_compiling() else {}
        part = parts.get((start, stop))
        if part is None:
            part = lasting(lambda: self._rows(start, stop))
            if len(parts) < MOST_PARTS:
                parts[start, stop] = part
        return part

    def _rows(self, start: int, stop: int) -> GraphPlan:
        edges = self.edges(start, stop)
        perm = None if self.perm is None else self.perm[edges]
        part = GraphPlan(self.rowptr[start : stop + 1] - edges.start, self.col[edges], self.num_src, perm)
        if perm is None and edges.start + self.first_edge:
            part.first_edge = edges.start + self.first_edge
        inherit_csr((self.rowptr, self.col), (part.rowptr, part.col))
        return part

    def repeated(self, copies: int) -> GraphPlan:
        """The plan of ``copies`` of this graph side by side: nodes and edges of the first, then those of the second...

        Raises:
            ValueError: If there would be too many nodes.
        """
        if copies == 1:
            return self
        # Not while tracing, where it would limit what the program takes; a kernel refuses numbers that wrap around.
        if not self.is_traced and (largest := copies * max(self.num_src, self.num_dst)) > MAX_NODES:
            raise ValueError(f"Expected at most {MAX_NODES:,} nodes, numbered in 32 bits (got {largest:,})")
        copy = torch.arange(copies, device=self.device).view(-1, 1)
        rowptr = self.rowptr.new_zeros(copies * self.num_dst + 1)
        rowptr[1:] = (self.rowptr[1:] + copy * self.num_edges).view(-1)
        col = (self.col + (copy * self.num_src).to(self.col.dtype)).view(-1)
        perm = None if self.perm is None else (self.perm + copy * self.num_edges).view(-1)
        plan = GraphPlan(rowptr, col, copies * self.num_src, perm)
        plan.is_traced = self.is_traced
        return plan

    def sort(self, per_edge: Tensor) -> Tensor:
        """Bring a per-edge tensor ``[E, ...]`` from the caller's order into CSR order."""
        if self.is_traced:
            torch._check(per_edge.size(0) == self.num_edges)
        elif per_edge.size(0) != self.num_edges:
            raise ValueError(f"Expected one value per edge, {self.num_edges} (got {per_edge.size(0)})")
        return per_edge if self.perm is None else per_edge.index_select(0, self.perm)

    def unsort(self, per_edge: Tensor) -> Tensor:
        """Bring a per-edge tensor ``[E, ...]`` from CSR order back into the caller's order."""
        if self.perm is None:
            return per_edge
        return torch.empty_like(per_edge).index_copy_(0, self.perm, per_edge)


def _check_sizes(src: Tensor, dst: Tensor, num_src: int, num_dst: int) -> None:
    if (largest := max(num_src, num_dst)) > MAX_NODES:
        raise ValueError(f"Expected at most {MAX_NODES:,} nodes, numbered in 32 bits (got {largest:,})")
    if src.device != dst.device:
        raise ValueError(f"Expected source and destination nodes on one device (got {src.device} and {dst.device})")


plan_cache = PlanCache()


def graph_plan(edge_index: Tensor, size: tuple[int, int], flow: str = "source_to_target") -> GraphPlan:
    """The plan of a graph, made once for as long as its edge index stays the same.

    Args:
        edge_index: ``[2, E]`` integers.
        size: Numbers of sources and of destinations.
        flow: ``"source_to_target"``, where the first row lists the sources, or ``"target_to_source"``.

    Raises:
        TypeError: If the edge index holds no integers.
        ValueError: If it has another shape, lists a node that does not exist, or there are more than 32 bits number.
    """
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(f"Expected 'edge_index' of shape [2, E] (got {list(edge_index.shape)})")
    src, dst = (0, 1) if flow == "source_to_target" else (1, 0)

    def build() -> GraphPlan:
        plain = edge_index.as_subclass(Tensor)
        return GraphPlan.from_edges(plain[src], plain[dst], size[0], size[1])

    return plan_cache.get((edge_index,), ("plan", tuple(size), flow), build)
