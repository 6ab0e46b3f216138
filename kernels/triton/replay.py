"""Calls as CUDA graphs: what the device takes for them, without what Python takes to launch them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["graph_of", "median_replay", "replayed_ms"]

WARM_UP = 3


def graph_of(runs: Sequence[Callable[[], Any]], calls: int = 1) -> torch.cuda.CUDAGraph:
    """``calls`` calls, in turn over ``runs``, captured in one CUDA graph.

    What a first call builds (plans, schedules, binaries) exists before the capture: each is run outside of it first.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(WARM_UP):
            runs[i % len(runs)]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            runs[i % len(runs)]()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replayed_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_replay(run: Callable[[], Any], calls: int = 20, repeats: int = 5) -> float:
    """Median milliseconds of one call of ``run`` among ``calls`` of a replayed graph."""
    graph = graph_of([run], calls)
    return statistics.median(replayed_ms(graph) / calls for _ in range(repeats))
