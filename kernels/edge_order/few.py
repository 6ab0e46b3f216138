"""Small graphs: plans of few edges by one compiled call, for kernels that take addresses.

A plan (:mod:`..plan`) is half a dozen tensors and an entry of a cache; on a graph of a hundred edges each costs more
than the sort.  These are known by the memory of their edge list and a checksum of it, which each use compares.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checksum import WORD

__all__ = ["MOST_EDGES", "FewEdges", "few_edges"]

MOST_EDGES = 1 << 17  # of more, what is saved here counts for nothing
REMEMBERED = 16  # graphs, before all are forgotten
DTYPES = (torch.int64, torch.int32)

Form = tuple[bool, bool, int]  # whether edges are flipped, whether each node has a self-loop, and the factors


class FewEdges(NamedTuple):
    """A square graph in CSR form by destination, at addresses.

    Args:
        num_src, num_dst: Number of nodes.
        num_edges: Number of edges, with those added.
        rowptr_at: Int64 ``[num_dst + 1]``.
        col_at: Int32 ``[num_edges]``.
        factor_at: Float32 ``[num_dst]``; 0 where there are no factors.
        bounds: The rows as one chunk (:func:`..cpu.parallel.run_chunks`).
        memory: What the addresses are in.
    """

    num_src: int
    num_dst: int
    num_edges: int
    rowptr_at: int
    col_at: int
    factor_at: int
    bounds: Any
    memory: Tensor

    @property
    def rowptr(self) -> Tensor:
        """``[num_dst + 1]`` int64."""
        return self.memory[: 8 * (self.num_dst + 1)].view(torch.int64)

    @property
    def col(self) -> Tensor:
        """``[num_edges]`` int32."""
        start = 8 * (self.num_dst + 1) + 4 * self.num_dst
        return self.memory[start : start + 4 * self.num_edges].view(torch.int32)

    @property
    def arrays(self) -> tuple[Any, Any]:
        """:attr:`rowptr` and :attr:`col` as arrays, in a fraction of the time that tensors take."""
        memory, stop = self.memory.numpy(), 8 * (self.num_dst + 1)
        start = stop + 4 * self.num_dst
        return memory[:stop].view(np.int64), memory[start : start + 4 * self.num_edges].view(np.int32)


_graphs: dict[tuple[Any, ...], tuple[int, FewEdges]] = {}  # checksums and graphs


@cache
def _compiled() -> tuple[Callable[..., int], Any]:
    checksum = importlib.import_module("..checksum.cpu", __package__)
    return checksum.whole_checksum, importlib.import_module(".cpu", __package__)


def few_edges(edge_index: Any, num_nodes: int, form: Form) -> FewEdges | None:
    """The graph of a ``[2, E]`` edge list, which is kept for as long as its memory holds the same.

    To be called where :func:`..backend.is_direct` holds.

    Args:
        edge_index: Sources and destinations; or the other way round, if they are flipped.
        num_nodes: How many nodes there are, 1 or more.
        form: Whether it is flipped; whether each node has one self-loop, in the place of those that there are; and the
            factors: 1 for ``d^-1/2`` of the degrees, 0 for ``1 / max(d, 1)``, -1 for none.

    Returns:
        :obj:`None` for what is no plain list of few edges between these nodes.
    """
    if type(edge_index) is not Tensor or edge_index.layout is not torch.strided or not edge_index.is_cpu:
        return None
    shape, dtype = edge_index.shape, edge_index.dtype
    if dtype not in DTYPES or len(shape) != 2 or shape[0] != 2 or not edge_index.is_contiguous() or edge_index.is_neg():
        return None
    num_edges, address = shape[1], edge_index.data_ptr()
    if num_edges > MOST_EDGES or address % WORD:
        return None
    whole_checksum, counting = _compiled()
    key = (address, num_edges, num_nodes, form, dtype)
    contents = whole_checksum(address, 2 * num_edges * dtype.itemsize)
    known = _graphs.get(key)
    if known is not None and known[0] == contents:
        return known[1]
    flips, loops, factors = form
    edges = edge_index if dtype is torch.int64 else edge_index.long()
    memory = torch.empty(counting.few_edges_room(num_edges, num_nodes), dtype=torch.uint8)
    at = memory.data_ptr()
    found = counting.few_edges(edges.data_ptr(), num_edges, num_nodes, int(flips), int(loops), factors, at)
    if found < 0:
        return None
    factor_at = at + 8 * (num_nodes + 1)
    graph = FewEdges(
        num_nodes, num_nodes, found, at, factor_at + 4 * num_nodes, 0 if factors == counting.NO_FACTORS else factor_at,
        np.array([0, num_nodes]), memory,
    )  # fmt: skip
    if len(_graphs) >= REMEMBERED:
        _graphs.clear()
    _graphs[key] = contents, graph
    return graph
