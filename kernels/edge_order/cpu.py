"""Edges sorted by destination in two passes over them: a counting sort, with the checks that kernels rely on."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import carray, njit

from ..cpu import jit
from ..cpu.address import at

__all__ = ["NO_FACTORS", "count_edges", "degree_factors", "few_edges", "few_edges_room", "place_edges"]

LOW_SRC, HIGH_SRC, LOW_DST, HIGH_DST, IS_SORTED, LOOPS, LAST, DEGREE = range(8)  # what is found
NO_FACTORS = -1  # in the place of ``is_root``


@njit(forceinline=True)
def _ints(address, count):
    return carray(at(address, np.int64), (count,))


@jit.kernel
def count_edges(src_at, dst_at, num_edges, num_src, num_dst, drops_loops, checks_loops, rowptr_at, found_at):
    """Count the edges into each node to ``rowptr[node + 1]``, int64 ``[num_dst + 1]``; fill ``found``, int64 ``[8]``.

    ``found`` are the smallest and largest source and destination, whether destinations never fall, the number of
    self-loops left out, and the last destination.  With ``drops_loops`` self-loops are left out, but with
    ``checks_loops`` not of the sources.  Nodes that do not exist are not counted.
    """
    src, dst = _ints(src_at, num_edges), _ints(dst_at, num_edges)
    rowptr, found = _ints(rowptr_at, num_dst + 1), _ints(found_at, 8)
    rowptr[:] = 0
    low_src, high_src, low_dst, high_dst = num_src, np.int64(-1), num_dst, np.int64(-1)
    last, loops, falls = np.int64(0), 0, 0
    for e in range(num_edges):
        s, d = src[e], dst[e]
        if s == d and drops_loops:
            loops += 1
            if checks_loops:
                low_src, high_src = min(low_src, s), max(high_src, s)
            continue
        low_src, high_src = min(low_src, s), max(high_src, s)
        low_dst, high_dst = min(low_dst, d), max(high_dst, d)
        falls |= d < last
        last = d
        if 0 <= d < num_dst:
            rowptr[d + 1] += 1
    found[LOW_SRC], found[HIGH_SRC], found[LOW_DST], found[HIGH_DST] = low_src, high_src, low_dst, high_dst
    found[IS_SORTED], found[LOOPS], found[LAST] = 1 - falls, loops, last


@jit.kernel
def place_edges(src_at, dst_at, num_edges, num_dst, drops_loops, added, rowptr_at, col_at, perm_at, has_perm):
    """Turn the counts in ``rowptr`` into row pointers, and write ``col`` int32 and, with ``has_perm``, ``perm`` int64.

    After its edges each of the first ``added`` nodes gets a self-loop.  ``perm`` numbers the edges that are taken, then
    the added ones.
    """
    src, dst, rowptr = _ints(src_at, num_edges), _ints(dst_at, num_edges), _ints(rowptr_at, num_dst + 1)
    place = np.empty(num_dst, np.int64)
    total = np.int64(0)
    for i in range(num_dst):
        place[i] = total
        total += rowptr[i + 1] + (1 if i < added else 0)
        rowptr[i + 1] = total
    col = carray(at(col_at, np.int32), (total,))
    perm = _ints(perm_at, total if has_perm else 0)
    taken = np.int64(0)
    for e in range(num_edges):
        s, d = src[e], dst[e]
        if drops_loops and s == d:
            continue
        where = place[d]
        place[d] = where + 1
        col[where] = s
        if has_perm:
            perm[where] = taken
        taken += 1
    for i in range(added):
        col[rowptr[i + 1] - 1] = i
        if has_perm:
            perm[rowptr[i + 1] - 1] = taken + i


@jit.kernel
def degree_factors(rowptr_at, num_rows, is_root, out_at):
    """``1 / max(d, 1)`` of the degrees ``d`` of rows or, with ``is_root``, ``d^-1/2`` and 0 of none; float32."""
    rowptr, out = _ints(rowptr_at, num_rows + 1), carray(at(out_at, np.float32), (num_rows,))
    for i in range(num_rows):
        degree = np.float32(rowptr[i + 1] - rowptr[i])
        if is_root:
            out[i] = np.float32(1) / np.sqrt(degree) if degree > 0 else np.float32(0)
        else:
            out[i] = np.float32(1) / max(degree, np.float32(1))


@jit.kernel
def few_edges_room(num_edges, num_nodes):
    """Bytes of a graph that :func:`few_edges` writes, with a self-loop on each node or not."""
    return 8 * (num_nodes + 1) + 4 * num_nodes + 4 * (num_edges + num_nodes)


@jit.kernel
def few_edges(edges_at, num_edges, num_nodes, flips, loops, is_root, out_at):
    """The whole of a small square graph in one call: row pointers, a factor per node, and columns, one after the other.

    ``edges`` is int64 ``[2, E]``: sources and destinations or, with ``flips``, the other way round.  With ``loops``
    each node has one self-loop, whatever there is.  The factors are those of :func:`degree_factors`, for ``is_root`` of
    0 or 1.  Returns the number of edges written; -1, and nothing of use, where there are nodes that do not exist.
    """
    first, second = edges_at, edges_at + 8 * num_edges
    src, dst = (second, first) if flips else (first, second)
    found = np.empty(8, np.int64)
    count_edges(src, dst, num_edges, num_nodes, num_nodes, loops, loops, out_at, np.int64(found.ctypes.data))
    exist = found[LOW_SRC] >= 0 and found[HIGH_SRC] < num_nodes and found[LOW_DST] >= 0 and found[HIGH_DST] < num_nodes
    taken = num_edges - found[LOOPS]
    if not exist:
        return np.int64(-1)
    factor_at = out_at + 8 * (num_nodes + 1)
    nothing = np.int64(0)
    added = num_nodes if loops else nothing
    place_edges(src, dst, num_edges, num_nodes, loops, added, out_at, factor_at + 4 * num_nodes, nothing, nothing)
    if is_root != NO_FACTORS:
        degree_factors(out_at, num_nodes, is_root, factor_at)
    return taken + added
