"""The compiled part of :mod:`qgnn_plugin.data.sampler`: int64 arrays in, int64 arrays out.

Random numbers are SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). Every expanded node has a stream
of its own, keyed by the batch and the node's position in it, so no result depends on order.
"""

import numpy as np
from numba import njit

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)
_FREE = -1
_MIN_TABLE = 16


@njit(cache=True, nogil=True, inline="always")
def _mix(z):
    z = (z ^ (z >> _S30)) * _MIX1
    z = (z ^ (z >> _S27)) * _MIX2
    return z ^ (z >> _S31)


@njit(cache=True, nogil=True)
def batch_key(seed, epoch, nodes):
    """64-bit key of a batch: its seed nodes in order, under ``seed`` and ``epoch`` (uint64)."""
    key = _mix(_mix(seed + _GAMMA) ^ epoch)
    for node in nodes:
        key = _mix(key + _GAMMA ^ np.uint64(node))
    return key


@njit(cache=True, nogil=True)
def _draw(degree, count, state, out):
    """Writes ``count < degree`` distinct positions below ``degree`` to ``out``, all sets alike."""
    if count * count > degree:  # One pass over the row (Knuth, TAOCP 2, 3.4.2, algorithm S).
        taken = 0
        for position in range(degree):
            state += _GAMMA
            if _mix(state) % np.uint64(degree - position) < np.uint64(count - taken):
                out[taken] = position
                taken += 1
                if taken == count:
                    return
    for taken in range(count):  # Floyd: as many draws as results (Bentley, CACM 30(9), 1987).
        last = degree - count + taken
        state += _GAMMA
        position = np.int64(_mix(state) % np.uint64(last + 1))
        for other in range(taken):
            if out[other] == position:
                position = last
                break
        out[taken] = position


@njit(cache=True, nogil=True)
def _find(table, nodes, node):
    """Slot of ``node`` in an open-addressing table of positions in ``nodes``, or its free slot."""
    mask = np.uint64(len(table) - 1)
    slot = _mix(np.uint64(node) + _GAMMA) & mask
    while table[slot] != _FREE and nodes[table[slot]] != node:
        slot = (slot + np.uint64(1)) & mask
    return slot


@njit(cache=True, nogil=True)
def _build_table(nodes, used, capacity):
    size = _MIN_TABLE
    while size < 2 * capacity:
        size *= 2
    table = np.full(size, _FREE, np.int64)
    for position in range(used):
        slot = _find(table, nodes, nodes[position])
        if table[slot] == _FREE:  # A seed given twice is found at its first position.
            table[slot] = position
    return table


@njit(cache=True, nogil=True)
def _resized(array, used, size):
    out = np.empty(size, np.int64)
    out[:used] = array[:used]
    return out


@njit(cache=True, nogil=True)
def sample(colptr, row, seeds, counts, key):
    """Expands ``seeds`` hop by hop, with the streams of ``key`` (uint64).

    Returns:
        ``nodes`` (global ids, seeds first), then per sampled edge ``source`` and ``target``
        (positions in ``nodes``) and ``slot`` (position in ``row``), then the number of new nodes
        (hops + 1) and of edges (hops).
    """
    hops = len(counts)
    nodes = seeds.copy()
    source, target, slot = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    hop_nodes, hop_edges = np.empty(hops + 1, np.int64), np.empty(hops, np.int64)
    used, edges, begin = len(seeds), 0, 0
    hop_nodes[0] = used
    for hop in range(hops):
        count, end, total = counts[hop], used, 0
        for position in range(begin, end):
            degree = colptr[nodes[position] + 1] - colptr[nodes[position]]
            total += degree if count < 0 else min(degree, count)
        nodes = _resized(nodes, used, used + total)
        source = _resized(source, edges, edges + total)
        target = _resized(target, edges, edges + total)
        slot = _resized(slot, edges, edges + total)
        # Seeds may repeat, so they count in full beside the nodes of the graph.
        table = _build_table(nodes, used, min(used + total, len(seeds) + len(colptr) - 1))
        first = edges
        for position in range(begin, end):
            start = colptr[nodes[position]]
            degree = colptr[nodes[position] + 1] - start
            taken = degree if count < 0 else min(degree, count)
            if taken == degree:
                slot[edges : edges + taken] = np.arange(start, start + taken)
            else:
                state = _mix(key ^ _mix(np.uint64(position) + _GAMMA))
                _draw(degree, taken, state, slot[edges : edges + taken])
                slot[edges : edges + taken] += start
            for edge in range(edges, edges + taken):
                node = row[slot[edge]]
                place = _find(table, nodes, node)
                if table[place] == _FREE:
                    table[place] = used
                    nodes[used] = node
                    used += 1
                source[edge] = table[place]
                target[edge] = position
            edges += taken
        hop_edges[hop], hop_nodes[hop + 1] = edges - first, used - end
        begin = end
    return nodes[:used].copy(), source, target, slot, hop_nodes, hop_edges
