"""Time of the device, not of Python: calls are captured in a CUDA graph and the graph is replayed.

A row has ``ms`` per call (median over replays), its ``spread`` over them, ``host_us``, what one eager call costs the
host (it includes waiting where the call synchronizes), and ``eager_ms``, calls one after the other without a graph.
Buffers rotate, so that they do not stay in the cache between calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qgnn_plugin.kernels.triton.replay import graph_of, replayed_ms

from .record import Row

__all__ = ["copies", "copy_bandwidth", "peak_bytes", "timed"]

CACHE_BYTES = 128 << 20  # more than the L2 of any card so far
MAX_COPIES = 8
CALLS = 20  # in a graph
REPEATS = 7
BUDGET_MS = 250.0  # of one graph, and of what is done eagerly: slow calls are captured fewer times

Runs = list[Callable[[], Any]]


def timed(runs: Runs, graphed: bool = True, peak: bool = True) -> Row:
    """The figures of one call, in turn over ``runs``, which differ in their buffers only.

    A capture that fails is told in ``capture_error``; ``ms`` is then the eager time.  Whoever calls this several times
    in a process looks at that first: the device may be lost.
    """
    if not torch.cuda.is_available():
        return _timed_on_host(runs)
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    once = _eager(runs, 1)[0]
    calls = max(1, min(CALLS, int(BUDGET_MS / max(once, 1e-3))))
    eager = [_eager(runs, calls) for _ in range(3)]
    row: Row = {
        "eager_ms": statistics.median(ms for ms, _ in eager),
        "host_us": statistics.median(us for _, us in eager), "calls": calls,
    }  # fmt: skip
    row["ms"] = row["eager_ms"]
    if peak:
        row["peak_bytes"] = peak_bytes(runs[0])
    if not graphed:
        return {**row, "graphed": False}
    try:
        graph = graph_of(runs, calls)
        times = [replayed_ms(graph) / calls for _ in range(REPEATS)]
    except Exception as problem:
        return {**row, "graphed": False, "capture_error": f"{type(problem).__name__}: {problem}"[:300]}
    times.sort()
    return {**row, "graphed": True, "ms": statistics.median(times), "spread": (times[-1] - times[0]) / times[0]}


def _eager(runs: Runs, calls: int) -> tuple[float, float]:
    """Milliseconds of the device and microseconds of the host per call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    begin = time.perf_counter()
    for i in range(calls):
        runs[i % len(runs)]()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls, 1e6 * host / calls


def _timed_on_host(runs: Runs) -> Row:
    """Without a device: that everything runs is all such times show."""
    begin = time.perf_counter()
    runs[0]()
    seconds = time.perf_counter() - begin
    return {"ms": 1e3 * seconds, "eager_ms": 1e3 * seconds, "host_us": 1e6 * seconds, "calls": 1, "graphed": False}


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Peak device memory of one call beyond what was allocated before it."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def copies(make: Callable[[], Tensor]) -> list[Tensor]:
    """Enough fresh tensors that they do not stay in the cache between calls."""
    first = make()
    size = max(1, first.numel() * first.element_size())
    return [first, *(make() for _ in range(min(MAX_COPIES, CACHE_BYTES // size)))]


def copy_bandwidth(device: torch.device, num_bytes: int) -> Row:
    """``bytes_per_second`` of a device copy, read and written, with its time."""
    source = torch.empty(num_bytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    row = timed([lambda: target.copy_(source)], peak=False)
    return {**row, "bytes_per_second": 2e3 * num_bytes / row["ms"]}
