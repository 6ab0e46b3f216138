"""What packed layers make of gathered features: once for each node, in the place of once for each of its edges.

A message that is run by blocks of edges maps what their ends have, ``self.lin(x_j)``.  Where the layer gets a block's
gathered features as they are, or some of their columns, it is applied to the features of all nodes when the first
block is computed, and its results are gathered.  They are those of the block, bit for bit: layers for which that does
not hold for some nodes, as for those that look across rows, are applied to each block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.checksum import checksum
from .deferred import materialized

__all__ = ["OfNodes", "held_for_blocks", "is_held_for_blocks", "mapped_nodes"]

FEWEST_EDGES = 2  # per node
CHECKED, SUBSETS = 16, 4  # nodes that are compared at a time, and how often: no statistic of all nodes is that of each

_of_nodes: ContextVar[OfNodes | None] = ContextVar("qgnn_of_nodes", default=None)


@dataclass(frozen=True)
class _Taken:
    """Features of a block's edges: what they were gathered from, by which numbers, and what tells writes to them."""

    rows: Tensor
    name: str
    nodes: Tensor
    state: int


class OfNodes:
    """One call of message passing, by blocks of edges."""

    def __init__(self) -> None:
        self.whole: dict[str, Callable[[], Tensor]] = {}
        self.taken: dict[int, _Taken] = {}
        self.made: dict[Any, Tensor | None] = {}
        self.values: dict[Any, Tensor] = {}

    @contextmanager
    def block(self) -> Iterator[None]:
        """Have layers look here for what is gathered from now on, until the block is done."""
        token = _of_nodes.set(self)
        try:
            yield
        finally:
            self.taken.clear()
            _of_nodes.reset(token)

    def take(self, name: str, whole: Callable[[], Tensor], rows: Tensor, nodes: Tensor) -> Tensor:
        """Note that ``rows`` are those numbered by ``nodes`` of the features ``whole()``, nodes first."""
        if rows.is_floating_point() and rows.is_contiguous() and rows.numel() and rows.storage_offset() == 0:
            self.whole.setdefault(name, whole)
            taken = _Taken(rows, name, nodes, _state_of(rows))
            self.taken[id(rows)] = taken
            if rows._base is not None:  # which a view of ``rows`` is one of
                self.taken[id(rows._base)] = taken
        return rows

    def held(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives, made once for all blocks."""
        if key not in self.values:
            self.values[key] = compute()
        return self.values[key]

    def mapped(self, key: Any, x: Tensor, compute: Callable[[Tensor], Any], tolerance: float) -> Tensor | None:
        """See :func:`mapped_nodes`."""
        taken = self.taken.get(id(x)) or self.taken.get(id(x._base))
        if taken is None or not _is_of_rows(x, taken.rows) or _state_of(taken.rows) != taken.state:
            return None
        key = (key, taken.name, x.shape[1:], x.stride(), x.storage_offset())
        if key not in self.made:
            self.made[key] = self._of_all(compute, taken.name, x, tolerance)
        out = self.made[key]
        return None if out is None else out.index_select(0, taken.nodes)

    def _of_all(self, compute: Callable[[Tensor], Any], name: str, x: Tensor, tolerance: float) -> Tensor | None:
        """What all nodes have in the place of ``compute(x)``; :obj:`None` where some of them have other results alone.
        """
        whole = self.whole[name]().contiguous()
        self.whole[name] = lambda: whole
        features = whole.as_strided((whole.size(0), *x.shape[1:]), x.stride(), x.storage_offset())
        token = _of_nodes.set(None)
        try:
            out = materialized(compute(features))
            if not isinstance(out, Tensor) or out.dim() == 0 or out.size(0) != whole.size(0):
                return None
            near = tolerance * float(out.abs().max()) if tolerance else 0.0
            chosen = torch.linspace(0, whole.size(0) - 1, CHECKED * SUBSETS, device=whole.device).long()
            for some in chosen.view(CHECKED, SUBSETS).t():
                alone = materialized(compute(features[some]))
                if alone.shape != out[some].shape or not torch.allclose(alone, out[some], rtol=tolerance, atol=near):
                    return None
        finally:
            _of_nodes.reset(token)
        return out


def mapped_nodes(key: Any, x: Any, compute: Callable[[Tensor], Any], tolerance: float = 0.0) -> Tensor | None:
    """What ``compute(x)`` gives, if a message is run by blocks and ``x`` is what it was given; else :obj:`None`.

    Args:
        key: What tells this map from all others in the call of a layer.
        x: What is mapped.
        compute: The map, row by row.
        tolerance: How far results of some rows alone may be off, of the largest: 0 for bit for bit.
    """
    found = _of_nodes.get()
    return found.mapped(key, x, compute, tolerance) if found is not None and isinstance(x, Tensor) else None


def held_for_blocks(key: Any, compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` gives, which is to be read only; made once where a message is run by blocks."""
    found = _of_nodes.get()
    return compute() if found is None else found.held(key, compute)


def is_held_for_blocks(value: Tensor) -> bool:
    """Whether ``value`` is one of :func:`held_for_blocks`, or a view of it, in memory that no other will be in."""
    found = _of_nodes.get()
    memory = value.untyped_storage().data_ptr()
    return found is not None and any(memory == one.untyped_storage().data_ptr() for one in found.values.values())


def _state_of(rows: Tensor) -> int:
    """What tells whether ``rows`` were written to."""
    return checksum(rows) if rows.is_inference() else rows._version


def _is_of_rows(x: Tensor, rows: Tensor) -> bool:
    """Whether ``x`` is ``rows``, or a view of some numbers of each of them."""
    if x is rows:
        return True
    if x.dim() == 0 or x.dtype is not rows.dtype or x.size(0) != rows.size(0) or x.stride(0) != rows.stride(0):
        return False
    last = sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))
    return 0 not in x.shape and x.storage_offset() + last < rows.stride(0)
