"""Rewrite the launch configurations on the user's own card::

    python -m qgnn_plugin.kernels.triton.autotune --output configs.json
    export QGNN_TRITON_CONFIGS=configs.json

Times every candidate of each graph kernel on a generated power-law graph, then the fastest one with fewer registers per
thread, and keeps the best per bucket of row width.  Runs only when called.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..layout import row_words
from ..plan import GraphPlan
from .launch import TABLE_VERSION, Config, architecture, load_table, override

__all__ = ["candidates", "main", "median_time", "power_law_plan", "tune", "write_table"]

REGISTER_CAPS = (64, 96, 128, 168)  # of a thread: 8, 5, 4 and 3 programs of four warps share 65,536 registers
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
            yield Config(num_warps=warps, words_per_thread=held, tile_words=width, unroll=unroll, segment=segment)


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


def tune(
    kernel: str, words: int, run: Callable[[], Any], timer: Callable[[Callable[[], Any]], float] = median_time
) -> tuple[float, Config]:
    """The least time of ``run`` and the configuration of ``kernel`` that gave it, for rows of ``words`` words.

    Registers are limited for the fastest candidate only: a limit for each would multiply what is compiled.
    """

    def timed(configs: Iterator[Config]) -> list[tuple[float, Config]]:
        found = []
        for config in configs:
            with override(**{kernel: config}), suppress(OutOfResources):  # too much shared memory, or too many threads
                found.append((timer(run), config))
        return found

    free = min(timed(candidates(words)), key=lambda pair: pair[0])
    return min(free, *timed(replace(free[1], max_registers=cap) for cap in REGISTER_CAPS), key=lambda pair: pair[0])


def write_table(path: Path, architectures: Mapping[str, Any]) -> None:
    """Write a launch table for :func:`.launch.load_table`, whole or not at all."""
    document = {"version": TABLE_VERSION, "architectures": architectures}
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(document, indent=1) + "\n")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


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
    for bucket in BUCKETS:
        words = min(bucket, 64)
        for name, run in _runs(plan, words):
            least, best = tune(name, words, run)
            chosen = {k: v for k, v in asdict(best).items() if k in FIELDS}
            own.setdefault(name, []).append({"max_words": bucket, **chosen})
            print(f"{name:20} {words:3} words: {least:.3f} ms {chosen}", flush=True)
    arch = architecture(device)
    write_table(options.output, {**tables, arch: {**tables.get(arch, {}), **own}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
