"""Rewrite the launch configurations on the user's own card::

    python -m qgnn_plugin.kernels.triton.autotune --output configs.json
    export QGNN_TRITON_CONFIGS=configs.json

Times every candidate of each graph kernel on a generated power-law graph and keeps the fastest per
bucket of row width.  Runs only when called.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layout import row_words
from ..plan import GraphPlan
from .launch import TABLE_VERSION, Config, architecture, load_table, override

__all__ = ["candidates", "main", "median_time", "power_law_plan"]

MAX_REGISTERS = 128  # of a thread: four programs of four warps share a processor of 65,536
BUCKETS = (2, 4, 8, 16, 32, 1 << 20)  # words per row; the last takes the rest
FIELDS = ("num_warps", "words_per_thread", "tile_words", "unroll", "segment", "max_registers")


def power_law_plan(num_nodes: int, num_edges: int, device: torch.device | str) -> GraphPlan:
    """A seeded graph whose in-degrees follow Zipf's law with exponent 0.6; sources are uniform."""
    place = torch.device(device)
    generator = torch.Generator(place).manual_seed(0)
    weight = torch.arange(1, num_nodes + 1, dtype=torch.float64, device=place).pow(-0.6)
    ends = torch.cumsum(weight / weight.sum(), 0)
    draws = torch.rand(num_edges, dtype=torch.float64, generator=generator, device=place)
    rank = torch.searchsorted(ends, draws).clamp(max=num_nodes - 1)
    target = torch.randperm(num_nodes, generator=generator, device=place)[rank]
    source = torch.randint(num_nodes, (num_edges,), generator=generator, device=place)
    return GraphPlan.from_edges(source, target, num_nodes, num_nodes)


def candidates(words: int) -> Iterator[Config]:
    """Configurations worth timing for rows of ``words`` words."""
    widths = [w for w in (4, 8, 16, 32) if w <= max(4, 2 * words)]
    for warps, held, width, unroll, segment in itertools.product((2, 4, 8), (1, 2, 4), widths, (2, 4), (128, 256)):
        if held <= min(words, width):
            yield Config(
                num_warps=warps, words_per_thread=held, tile_words=width, unroll=unroll,
                segment=segment, max_registers=MAX_REGISTERS,
            )  # fmt: skip


def median_time(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median milliseconds of ``run``, by device events where there are any."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _runs(plan: GraphPlan, words: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    from .aggregate import aggregate

    bits, device = 2, plan.device
    features = words * 32 // bits
    rows = torch.randint(-(2**31), 2**31 - 1, (plan.num_src, words), device=device)
    packed = rows.to(torch.int32)
    scale, offset = torch.ones(1, device=device), torch.zeros(1, device=device)
    weight = torch.rand(plan.num_edges, device=device)
    args = (packed, plan.rowptr, plan.col, scale, offset, features, bits)
    assert row_words(features, bits) == words
    yield "aggregate_sum", lambda: aggregate(*args)
    yield "aggregate_max", lambda: aggregate(*args, reduce="max")
    yield "aggregate_weighted", lambda: aggregate(*args, edge_weight=weight)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="table to write")
    parser.add_argument("--nodes", type=int, default=170_000)
    parser.add_argument("--edges", type=int, default=2_000_000)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("Expected a GPU to time the kernels on (got none)", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    plan = power_law_plan(options.nodes, options.edges, device)
    tables = {name: dict(entries) for name, entries in load_table().items()}
    own: dict[str, list[dict[str, int]]] = {}
    assert set(FIELDS) <= {field.name for field in fields(Config)}
    for bucket in BUCKETS:
        words = min(bucket, 64)
        for name, run in _runs(plan, words):
            timed = []
            for config in candidates(words):
                with override(**{name: config}):
                    timed.append((median_time(run), config))
            best_time, best = min(timed, key=lambda pair: pair[0])
            chosen = {k: v for k, v in asdict(best).items() if k in FIELDS}
            own.setdefault(name, []).append({"max_words": bucket, **chosen})
            print(f"{name:20} {words:3} words: {best_time:.3f} ms {chosen}", flush=True)
    tables[architecture(device)] = {**tables.get(architecture(device), {}), **own}
    document = {"version": TABLE_VERSION, "architectures": tables}
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
