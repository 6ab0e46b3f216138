"""Rewrite the launch configurations on the user's own card::

    python -m qgnn_plugin.kernels.triton.autotune --output configs.json
    export QGNN_TRITON_CONFIGS=configs.json

Times the kernels on a generated power-law graph, as replayed CUDA graphs.  Per kernel and bucket of row width, it
starts from the configuration that is in use and changes one setting at a time for as long as that helps.  Runs only
when called.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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

from ..aggregate import aggregate
from ..attention_aggregate import attention_aggregate
from ..backend import use_backend
from ..layout import row_words
from ..linear import Product, linear
from ..linear_pair import linear_pair
from ..plan import GraphPlan
from ..quantize_pack import quantize_pack
from ..spmm import spmm
from .launch import TABLE_VERSION, Config, architecture, config_for, load_table, override
from .replay import median_replay

__all__ = ["SEARCH", "main", "power_law_plan", "tune", "write_table"]

BUCKETS = (2, 4, 8, 16, 32, 1 << 20)  # words per row; the last takes the rest
WIDEST = 64  # words per row that stand for the last bucket
HEADS = 4
OUTPUTS = 256  # of linear
PASSES = 2  # over the settings
GAIN = 0.01  # a setting is changed for at least this share of the time

# What is tried, kernel by kernel. Registers of a thread: 8, 5, 4 and 3 programs of four warps share 65,536.
_EDGES: dict[str, tuple[int, ...]] = {
    "num_warps": (1, 2, 4, 8), "words_per_thread": (1, 2, 4), "unroll": (1, 2, 4), "segment": (128, 256),
    "max_registers": (0, 64, 96, 128, 168),
}  # fmt: skip
_TILED = {**_EDGES, "tile_words": (4, 8, 16, 32, 64)}
_PRODUCT: dict[str, tuple[int, ...]] = {
    "num_warps": (4, 8), "block_m": (32, 64, 128), "block_n": (64, 128, 256), "block_k": (128, 256, 512),
    "num_stages": (1, 2, 3), "max_registers": (0, 128, 168), "programs": (1, 2, 3, 4),
}  # fmt: skip
SEARCH: dict[str, dict[str, tuple[int, ...]]] = {
    **dict.fromkeys(("aggregate_sum", "aggregate_multiplied", "aggregate_max", "aggregate_weighted"), _TILED),
    "float_sum": _TILED,
    **dict.fromkeys(("attention", "attention_v2"), _EDGES),
    **dict.fromkeys(("linear", "linear_rows", "linear_pair"), _PRODUCT),
    "elementwise": {"num_warps": (2, 4, 8), "words_per_thread": (1, 2, 4), "tile_words": (16, 32, 64)},
}  # fmt: skip


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


def tune(
    kernel: str, start: Config, run: Callable[[], Any], timer: Callable[[Callable[[], Any]], float] = median_replay
) -> tuple[float, Config]:
    """The least time of ``run`` and the configuration of ``kernel`` that gave it, found from ``start`` on."""

    def timed(config: Config) -> float:
        with override(**{kernel: config}), suppress(OutOfResources):  # too much shared memory, or too many threads
            return timer(run)
        return math.inf

    least, best = timed(start), start
    for _ in range(PASSES):
        before = best
        for setting, values in SEARCH[kernel].items():
            for value in values:
                if value == getattr(best, setting):
                    continue
                config = replace(best, **{setting: value})
                found = timed(config)
                if found < (1 - GAIN) * least:
                    least, best = found, config
        if best == before:
            break
    if least == math.inf:
        raise RuntimeError(f"Expected a configuration of '{kernel}' that this card can launch (got none)")
    return least, best


def entry(kernel: str, bucket: int, config: Config) -> dict[str, int]:
    """``config`` as an entry of a launch table: what was searched, and what is not as by default."""
    default = Config()
    chosen = {k: v for k, v in asdict(config).items() if k in SEARCH[kernel] or v != getattr(default, k)}
    return {"max_words": bucket, **chosen}


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


def _runs(plan: GraphPlan, words: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kernel of :data:`SEARCH`, on rows of ``words`` words: codes of 2 bits, or floats where it reads those."""
    bits, device, nodes = 2, plan.device, plan.num_src
    features = words * 32 // bits
    assert row_words(features, bits) == words
    packed = _random_words(nodes, words, device)
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    rows = (packed, plan, one, zero, features, bits)
    weight = torch.rand(plan.num_edges, device=device)
    yield "aggregate_sum", lambda: aggregate(*rows)
    multiplier = torch.ones(nodes, dtype=torch.uint8, device=device)
    yield "aggregate_multiplied", lambda: aggregate(*rows, multiplier=multiplier)
    yield "aggregate_max", lambda: aggregate(*rows, reduce="max")
    yield "aggregate_weighted", lambda: aggregate(*rows, edge_weight=weight)
    source, target = torch.randn(2, nodes, HEADS, device=device)
    gat: dict[str, Any] = {"heads": HEADS, "attention_bits": 4, "alpha_src": source, "alpha_dst": target}
    yield "attention", lambda: attention_aggregate(*rows, **gat)
    att, x_dst = torch.randn(HEADS, features // HEADS, device=device), torch.randn(nodes, features, device=device)
    v2: dict[str, Any] = {"heads": HEADS, "attention_bits": 4, "att": att, "x_dst": x_dst}
    yield "attention_v2", lambda: attention_aggregate(*rows, **v2)
    weights = _random_words(OUTPUTS, words, device)
    out: dict[str, Any] = {"out_scale": one, "out_offset": zero, "out_bits": bits}
    yield "linear", lambda: linear(packed, weights, one, zero, one, zero, features, bits, bits, **out)
    to = {**out, "out_unit": one}
    yield "linear_rows", lambda: linear(packed, weights, one, zero, one, zero, features, bits, bits, **to)
    product = Product(packed, weights, one, zero, one, zero, features, bits, bits)
    yield "linear_pair", lambda: linear_pair(product, product, **to)
    yield "elementwise", lambda: quantize_pack(x_dst, one, zero, bits)
    values = x_dst[:, :words].contiguous()
    yield "float_sum", lambda: spmm(plan, values)


def _random_words(rows: int, words: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (rows, words), device=device).to(torch.int32)


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
    with use_backend("triton"):
        for bucket in BUCKETS:
            words = min(bucket, WIDEST)
            for name, run in _runs(plan, words):
                least, best = tune(name, config_for(name, device, words), run)
                own.setdefault(name, []).append(entry(name, bucket, best))
                print(f"{name:20} {words:3} words: {least:.3f} ms {own[name][-1]}", flush=True)
    arch = architecture(device)
    write_table(options.output, {**tables, arch: {**tables.get(arch, {}), **own}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
