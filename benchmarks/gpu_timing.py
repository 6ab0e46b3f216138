"""Timings on the device: medians over rotating buffers that together exceed the cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.layout import row_words
from qgnn_plugin.kernels.plan import GraphPlan

__all__ = ["aggregate_rows", "copy_bandwidth", "median_ms", "peak_bytes"]

CACHE_BYTES = 128 << 20  # more than the L2 of any card so far
MAX_COPIES = 8


def median_ms(runs: list[Callable[[], Any]], repeats: int = 20) -> float:
    """Median milliseconds per call, in turn over ``runs``, which differ in their buffers only."""
    for run in runs[:2]:
        run()
    times = []
    turn = cycle(runs)
    for _ in range(repeats):
        run = next(turn)
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Peak device memory of one call beyond what was allocated before it."""
    if not torch.cuda.is_available():
        return None
    run()
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


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second of a device copy, read and written."""
    source = torch.empty(num_bytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2e3 * num_bytes / median_ms([lambda: target.copy_(source)])


def _measured(name: str, runs: list[Callable[[], Any]], repeats: int) -> dict[str, Any]:
    try:
        return {
            "name": name, "ms": median_ms(runs, repeats), "peak_bytes": peak_bytes(runs[0]),
        }  # fmt: skip
    except Exception as problem:  # a baseline that the installed libraries lack
        return {"name": name, "error": f"{type(problem).__name__}: {problem}"}


def _edge_index_sum(plan: GraphPlan, source: Tensor, x: Tensor) -> Tensor:
    """What message passing over an edge list does: gather, then scatter."""
    return x.new_zeros(plan.num_dst, x.size(1)).index_add_(0, plan.dst, x.index_select(0, source))


def _baselines(plan: GraphPlan, features: int, repeats: int) -> Iterator[dict[str, Any]]:
    device, source = plan.device, plan.col.long()
    for name, dtype in (("cuSPARSE fp32", torch.float32), ("cuSPARSE fp16", torch.float16)):
        value = torch.ones(plan.num_edges, dtype=dtype, device=device)
        matrix = torch.sparse_csr_tensor(plan.rowptr, source, value, (plan.num_dst, plan.num_src))
        inputs = copies(lambda dtype=dtype: torch.randn(plan.num_src, features, device=device).to(dtype))
        yield _measured(name, [lambda x=x, a=matrix: a @ x for x in inputs], repeats)
        if dtype == torch.float32:
            runs = [lambda x=x: _edge_index_sum(plan, source, x) for x in inputs]
            needed = plan.num_edges * features * 4
            if device.type == "cpu" or needed < torch.cuda.mem_get_info(device)[0] // 2:
                yield _measured("edge_index fp32", runs, repeats)
        del inputs, matrix, value


def aggregate_rows(plan: GraphPlan, graph: str, features: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Baselines, then ``aggregate`` at 2, 4 and 8 bits with float and packed output."""
    base = {"graph": graph, "nodes": plan.num_dst, "edges": plan.num_edges, "features": features}
    for row in _baselines(plan, features, repeats):
        yield {**base, **row}
    device = plan.device
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    for bits in (2, 4, 8):
        words = row_words(features, bits)
        inputs = copies(
            lambda words=words: torch.randint(0, 2**31 - 1, (plan.num_src, words), dtype=torch.int32, device=device)
        )
        for packed in (False, True):
            out = {"out_scale": one, "out_offset": zero, "out_bits": bits} if packed else {}
            runs = [
                lambda x=x, out=out, bits=bits: aggregate(x, plan, one, zero, features, bits, **out) for x in inputs
            ]
            row = _measured(f"int{bits}{' packed out' if packed else ''}", runs, repeats)
            written = plan.num_dst * (4 * words if packed else 4 * features)
            once = min(plan.num_edges, plan.num_src) * 4 * words
            must = once + written + 4 * plan.num_edges + 20 * plan.num_dst
            gathered = plan.num_edges * 4 * words
            yield {**base, **row, "bytes_once": must, "bytes_gathered": must - once + gathered}
