"""Graph plans: the CSR view of a graph that every sparse kernel walks, built once per graph and cached.

A plan orders the edges by destination.  Row ``i`` of the plan lists the sources of node ``i``'s messages,
``col[rowptr[i]:rowptr[i + 1]]``; ``perm`` maps a CSR position to the caller's edge, so that edge weights can follow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

__all__ = ["GraphPlan", "PlanCache", "graph_plan", "plan_cache"]


MAX_NODES = 2**31 - 1


class GraphPlan:
    r"""A graph in CSR form, by destination.

    Args:
        rowptr: ``[num_dst + 1]`` int64, first edge of each destination.
        col: ``[num_edges]`` int32, source node of each edge.
        num_src: Number of source nodes.
        perm: ``[num_edges]`` int64, the caller's edge at each CSR position, or :obj:`None` where they coincide.
    """

    def __init__(self, rowptr: Tensor, col: Tensor, num_src: int, perm: Tensor | None = None) -> None:
        self.rowptr = rowptr
        self.col = col
        self.perm = perm
        self.num_src = int(num_src)
        self.num_dst = rowptr.numel() - 1
        self.num_edges = col.numel()

    @classmethod
    def from_edges(cls, src: Tensor, dst: Tensor, num_src: int, num_dst: int) -> GraphPlan:
        """Sort an edge list (``[E]`` sources, ``[E]`` destinations) by destination; stable, hence deterministic."""
        _check_range(src, num_src, "source")
        _check_range(dst, num_dst, "destination")
        if (largest := max(num_src, num_dst)) > MAX_NODES:
            raise ValueError(f"Expected at most {MAX_NODES:,} nodes, numbered in 32 bits (got {largest:,})")
        if src.device != dst.device:
            raise ValueError(f"Expected source and destination nodes on one device (got {src.device} and {dst.device})")
        counts = torch.bincount(dst, minlength=num_dst)
        rowptr = torch.zeros(num_dst + 1, dtype=torch.int64, device=dst.device)
        torch.cumsum(counts, 0, out=rowptr[1:])
        if dst.numel() and bool((dst[1:] >= dst[:-1]).all()):
            return cls(rowptr, src.to(torch.int32), num_src)
        perm = torch.argsort(dst, stable=True)
        return cls(rowptr, src[perm].to(torch.int32), num_src, perm)

    def __repr__(self) -> str:
        return f"GraphPlan(num_src={self.num_src}, num_dst={self.num_dst}, num_edges={self.num_edges})"

    @property
    def device(self) -> torch.device:
        return self.rowptr.device

    @cached_property
    def degree(self) -> Tensor:
        """``[num_dst]`` float32, number of incoming edges."""
        return (self.rowptr[1:] - self.rowptr[:-1]).to(torch.float32)

    @cached_property
    def max_degree(self) -> int:
        """Largest number of edges into one node."""
        return int((self.rowptr[1:] - self.rowptr[:-1]).max()) if self.num_dst else 0

    @cached_property
    def dst(self) -> Tensor:
        """``[num_edges]`` int64, destination of each edge in CSR order."""
        nodes = torch.arange(self.num_dst, device=self.device)
        return torch.repeat_interleave(nodes, self.rowptr[1:] - self.rowptr[:-1], output_size=self.num_edges)

    @cached_property
    def transpose(self) -> GraphPlan:
        """The plan of the reversed edges; its ``perm`` refers to CSR positions of this plan."""
        return GraphPlan.from_edges(self.dst, self.col.long(), self.num_dst, self.num_src)

    @cached_property
    def positions(self) -> Tensor:
        """``[num_edges]`` int64, the CSR positions in order."""
        return torch.arange(self.num_edges, device=self.device)

    @cached_property
    def own_sources(self) -> Tensor:
        """``[num_edges]`` int32, in place of ``col`` where each edge is its own source."""
        return self.positions.to(torch.int32)

    @cached_property
    def edge_ids(self) -> Tensor:
        """``[num_edges]`` int64, ``perm``, or the positions where they coincide."""
        return self.positions if self.perm is None else self.perm

    def edges(self, start: int, stop: int) -> slice:
        """The CSR positions of the edges into the destinations ``[start, stop)``."""
        return slice(int(self.rowptr[start]), int(self.rowptr[stop]))

    def rows(self, start: int, stop: int) -> GraphPlan:
        """The plan of the destinations ``[start, stop)`` alone; sources keep their numbers."""
        if (start, stop) == (0, self.num_dst):
            return self
        edges = self.edges(start, stop)
        perm = None if self.perm is None else self.perm[edges]
        return GraphPlan(self.rowptr[start : stop + 1] - edges.start, self.col[edges], self.num_src, perm)

    def sort(self, per_edge: Tensor) -> Tensor:
        """Bring a per-edge tensor ``[E, ...]`` from the caller's order into CSR order."""
        if per_edge.size(0) != self.num_edges:
            raise ValueError(f"Expected one value per edge, {self.num_edges} (got {per_edge.size(0)})")
        return per_edge if self.perm is None else per_edge[self.perm]

    def unsort(self, per_edge: Tensor) -> Tensor:
        """Bring a per-edge tensor ``[E, ...]`` from CSR order back into the caller's order."""
        if self.perm is None:
            return per_edge
        return torch.empty_like(per_edge).index_copy_(0, self.perm, per_edge)


def _check_range(index: Tensor, size: int, what: str) -> None:
    if index.numel() == 0 or index.device.type != "cpu":
        return
    low, high = torch.aminmax(index)
    if int(low) < 0 or int(high) >= size:
        raise ValueError(
            f"Expected {what} nodes in the interval [0, {size}) (got {int(low)} to {int(high)}); "
            f"check that 'edge_index' belongs to this feature matrix"
        )


class PlanCache:
    """A bounded least-recently-used cache of values derived from tensors.

    Entries are keyed by the identity of the tensors' memory and their version counters, and keep the tensors alive:
    an address cannot be reused while its entry exists, and a tensor changed in place misses.  Inference tensors count
    no versions: theirs are compared by value.
    """

    def __init__(self, capacity: int = 32) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._lock = Lock()

    def get(self, tensors: tuple[Tensor | None, ...], key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """Return the cached value for ``tensors`` and ``key``, building it on a miss."""
        parts = [part for t in tensors if t is not None for part in _parts(t)]
        if not all(_has_memory(part) for part in parts):
            return build()
        present = tuple(None if t is None else (t.layout, tuple(t.shape)) for t in tensors)
        full_key = (*key, present, *(_identity(part) for part in parts))
        with self._lock:
            entry = self._entries.get(full_key)
            if entry is not None:
                self._entries.move_to_end(full_key)
        if entry is not None and entry.is_current(parts):
            return entry.value
        value = build()
        with self._lock:
            self._entries[full_key] = _Entry(tensors, parts, value)
            while len(self._entries) > self.capacity:
                self._entries.popitem(last=False)
        return value

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


class _Entry:
    """A cached value with the tensors it was derived from."""

    def __init__(self, tensors: tuple[Tensor | None, ...], parts: list[Tensor], value: Any) -> None:
        self.value = value
        self._alive = (tensors, parts)
        self._copies = [part.clone() if part.is_inference() else None for part in parts]

    def is_current(self, parts: list[Tensor]) -> bool:
        """Whether the tensors without a version counter still hold the same values."""
        pairs = zip(parts, self._copies, strict=True)
        return all(copy is None or torch.equal(part, copy) for part, copy in pairs)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _has_memory(tensor: Tensor) -> bool:
    """A tensor subclass that wraps another, and a meta tensor, have no address to be told apart by."""
    return tensor.numel() == 0 or tensor.data_ptr() != 0


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that hold ``tensor``."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout == torch.sparse_csc:
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return tensor._indices(), tensor._values()


plan_cache = PlanCache()


def graph_plan(edge_index: Tensor, size: tuple[int, int], flow: str = "source_to_target") -> GraphPlan:
    """The cached plan of a ``[2, E]`` edge index with ``size = (num_src, num_dst)``."""
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(f"Expected 'edge_index' of shape [2, E] (got {list(edge_index.shape)})")
    src, dst = (0, 1) if flow == "source_to_target" else (1, 0)

    def build() -> GraphPlan:
        plain = edge_index.as_subclass(Tensor)
        return GraphPlan.from_edges(plain[src], plain[dst], size[0], size[1])

    return plan_cache.get((edge_index,), ("plan", tuple(size), flow), build)
