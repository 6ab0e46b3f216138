"""Index arrays of graphs, checked once: a kernel that follows a wrong one reads or writes anywhere.

Arrays are scanned when an op first sees them and remembered by identity and version: a plan that is used again costs a
look-up.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["check_csr", "check_degrees", "check_edge_rows", "check_rowptr", "inherit_csr", "remember_csr"]

REMEMBERED = 4096  # graphs, before those that are gone are forgotten


class _Known(NamedTuple):
    """One or two index arrays that were found consistent."""

    first: weakref.ref[Tensor]
    second: weakref.ref[Tensor]
    versions: tuple[int, int]
    largest: int  # index in the second, -1 without any


Memory = dict[tuple[int, int], _Known]
_graphs: Memory = {}  # rowptr with col, or with itself
_edges: Memory = {}  # rows of edges, with themselves
_degrees: Memory = {}  # rowptr with itself; the largest degree


def _version(array: Tensor) -> int:
    return 0 if array.is_inference() else array._version  # an inference tensor counts none


def _recall(memory: Memory, first: Tensor, second: Tensor) -> int | None:
    """The largest index, :obj:`None` where the arrays are new or were changed."""
    known = memory.get((id(first), id(second)))
    if known is None or known[0]() is not first or known[1]() is not second:
        return None
    return known[3] if known[2] == (_version(first), _version(second)) else None


def _remember(memory: Memory, first: Tensor, second: Tensor, largest: int) -> int:
    if len(memory) >= REMEMBERED:
        for key, known in list(memory.items()):
            if known.first() is None or known.second() is None:
                memory.pop(key, None)
        if len(memory) >= REMEMBERED:
            memory.clear()
    versions = _version(first), _version(second)
    memory[id(first), id(second)] = _Known(weakref.ref(first), weakref.ref(second), versions, largest)
    return largest


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing may be read back."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def check_csr(rowptr: Tensor, col: Tensor, num_src: int) -> None:
    """Raise unless ``rowptr`` ``[num_dst + 1]`` int64 and ``col`` ``[E]`` int32 are a graph over ``num_src`` sources.

    That is: ``rowptr`` starts at 0, never falls and ends at ``E``, and ``col`` lies in ``[0, num_src)``.
    """
    largest = _recall(_graphs, rowptr, col)
    if largest is None:
        if is_capturing(rowptr):
            return
        check_rowptr(rowptr, col.numel())
        if col.dtype is not torch.int32 or col.dim() != 1:
            raise TypeError(f"Expected 'col' to be an int32 vector (got {col.dtype}, {list(col.shape)})")
        largest = _remember(_graphs, rowptr, col, _largest(col, "source nodes"))
    if largest >= num_src:
        raise ValueError(
            f"Expected source nodes in [0, {num_src}) (got {largest}); check that the graph belongs to these "
            f"features"
        )


def check_rowptr(rowptr: Tensor, num_edges: int) -> None:
    """Raise unless ``rowptr``, an int64 vector, starts at 0, never falls and ends at ``num_edges``."""
    largest = _recall(_graphs, rowptr, rowptr)
    if largest is None:
        if rowptr.dtype is not torch.int64 or rowptr.dim() != 1 or rowptr.numel() == 0:
            found = f"{rowptr.dtype}, {list(rowptr.shape)}"
            raise TypeError(f"Expected 'rowptr' to be an int64 vector of one element or more (got {found})")
        if is_capturing(rowptr):
            return
        falls = bool((rowptr[1:] < rowptr[:-1]).any())
        first, last = int(rowptr[0]), int(rowptr[-1])
        if falls or first != 0:
            how = "a descent" if falls else f"a start at {first}"
            raise ValueError(f"Expected 'rowptr' to rise from 0 to the number of edges (got {how})")
        largest = _remember(_graphs, rowptr, rowptr, last)
    if largest != num_edges:
        raise ValueError(f"Expected 'rowptr' to end at the number of edges, {num_edges} (got {largest})")


def check_degrees(rowptr: Tensor, num_edges: int, limit: int, what: str) -> None:
    """Raise if a node has more than ``limit`` of the ``num_edges`` edges: ``what`` it sums would overflow."""
    if num_edges <= limit:
        return
    largest = _recall(_degrees, rowptr, rowptr)
    if largest is None:
        if is_capturing(rowptr):
            return
        largest = _remember(_degrees, rowptr, rowptr, int((rowptr[1:] - rowptr[:-1]).max()))
    if largest > limit:
        raise ValueError(f"Expected at most {limit} edges into a node {what} (got {largest})")


def check_edge_rows(edge: Tensor, num_edges: int, num_rows: int) -> None:
    """Raise unless ``edge`` is an int64 vector ``[num_edges]`` of rows in ``[0, num_rows)``."""
    largest = _recall(_edges, edge, edge)
    if largest is None:
        if edge.dtype is not torch.int64 or edge.dim() != 1:
            raise TypeError(f"Expected 'edge' to be an int64 vector (got {edge.dtype}, {list(edge.shape)})")
        if is_capturing(edge):
            return
        largest = _remember(_edges, edge, edge, _largest(edge, "rows of 'weight'"))
    if edge.numel() != num_edges or largest >= num_rows:
        raise ValueError(
            f"Expected 'edge' of {num_edges} rows in [0, {num_rows}) (got {edge.numel()} up to {largest})"
        )


def _largest(index: Tensor, what: str) -> int:
    if index.numel() == 0:
        return -1
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0:
        raise ValueError(f"Expected {what} from 0 on (got {low})")
    return high


def remember_csr(rowptr: Tensor, col: Tensor, largest: int) -> None:
    """Take it that ``rowptr`` and ``col``, made from checked edges, are a graph whose last source is ``largest``."""
    _remember(_graphs, rowptr, col, largest)


def inherit_csr(whole: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor]) -> None:
    """Take it that ``part``, rows of a graph ``whole``, is consistent if ``whole`` was found to be."""
    largest = _recall(_graphs, *whole)
    if largest is not None:
        _remember(_graphs, *part, largest)
        _remember(_graphs, part[0], part[0], part[1].numel())
