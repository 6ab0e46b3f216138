"""``aggregate`` against float32: ``torch.sparse`` CSR, DGL, and the best kernel of our own tools."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.cpu import jit
from qgnn_plugin.kernels.cpu.memory import empty
from qgnn_plugin.kernels.cpu.parallel import row_chunks, run_chunks
from qgnn_plugin.kernels.cpu.simd import (
    atomic_add,
    peek,
    prefetch,
    vcast,
    vlanes,
    vload,
    vstream,
)
from qgnn_plugin.kernels.layout import pack_codes, row_bytes, top_code
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.quantize_pack import quantize_pack

from .cpu_graphs import graphs
from .cpu_report import Target, number, per_threads, table
from .dgl_paths import dgl_absence, dgl_graph, dgl_sum, dgl_version
from .peers import OVER_PEERS, peer_line
from .timing import copy_bandwidth, interleaved, set_threads

__all__ = ["BASELINES", "OWN", "aggregate_rows", "markdown", "measure", "settings", "targets"]

WIDTHS = (2, 4, 8)
SCALE, OFFSET = 0.5, -1.0  # of the codes
BASELINES = ("torch.sparse CSR, int64", "torch.sparse CSR, int32")
DGL = "DGL"
OWN = "own float32"
LINE = 16  # floats per cache line
FEATURES = 256
LONG_EDGES = 5_000_000  # above, the slow sides take part in fewer rounds
OVER_SPARSE, OVER_OWN = "over torch.sparse", "over own float32"
TARGETS = (  # side, column, least by bits
    ("INT{}", OVER_SPARSE, {2: 15.0, 4: 10.0}),
    ("INT{}", OVER_OWN, {2: 4.0, 4: 3.0}),
    ("INT{}, packed", OVER_SPARSE, {2: 20.0, 4: 12.0}),
)

NOTES = """\
Medians over interleaved rounds; a ratio is the median of the rounds' own ratios.  `torch.sparse` is the faster of its
CSR products with int64 and int32 indices, `DGL` its `copy_u_sum` (libxsmm) on a sorted graph with int32 indices, where
it is installed, `best peer` the fastest of these, and `own float32` the fastest of our vector kernels with prefetching
and streaming stores.  `packed` has packed output, otherwise it is float32.  `GB/s` are the bytes that a side must move
over its time, `of copy` that over the copy bandwidth: rows that stay in a cache are counted as often as they are read,
so it can pass 1.
"""


@cache
def _float_kernel(lanes: int, ahead: int) -> Any:
    """Float sums with a tile of a row in registers, software prefetch and streaming stores."""

    @jit.kernel
    def kernel(x, width, rowptr, col, out, bounds, counter):  # type: ignore[no-untyped-def]
        zero = vcast(vlanes("i32", lanes), "f32")
        final = col.size - 1
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            for tile in range(0, width, lanes):
                for i in range(bounds[chunk], bounds[chunk + 1]):
                    acc = zero
                    for e in range(peek(rowptr, i), peek(rowptr, i + 1)):
                        later = np.int64(peek(col, min(e + ahead, final))) * width + tile
                        for line in range(0, lanes, LINE):
                            prefetch(x, later + line)
                        acc = acc + vload(x, np.int64(peek(col, e)) * width + tile, lanes)
                    vstream(out, i * width + tile, acc)

    return kernel


def float_sum(plan: GraphPlan, x: Tensor, lanes: int, ahead: int) -> Tensor:
    """``[num_dst, F]`` float32; ``lanes`` must divide ``F``."""
    out = empty((plan.num_dst, x.size(1)), torch.float32)
    rowptr = plan.rowptr.numpy()
    args = (x.view(-1).numpy(), x.size(1), rowptr, plan.col.numpy(), out.view(-1).numpy())
    run_chunks(_float_kernel(lanes, ahead), row_chunks(rowptr), *args)
    return out


@cache
def _adjacency(plan: GraphPlan, index: torch.dtype) -> Tensor:
    ones = torch.ones(plan.num_edges)
    size = (plan.num_dst, plan.num_src)
    return torch.sparse_csr_tensor(plan.rowptr.to(index), plan.col.to(index), ones, size, check_invariants=False)


FLOAT_KERNELS = ((64, 16), (128, 8), (256, 4), (256, 8))  # lanes, edges between prefetch and use


def _best_float_kernel(plan: GraphPlan, x: Tensor) -> tuple[int, int]:
    sides: dict[str, Callable[[], Any]] = {
        str(index): lambda shape=shape: float_sum(plan, x, *shape)
        for index, shape in enumerate(FLOAT_KERNELS)
        if x.size(1) % shape[0] == 0
    }
    timings = interleaved(sides, rounds=2)
    return FLOAT_KERNELS[int(min(timings, key=lambda name: min(timings[name].wall.values())))]


def _moved_bytes(plan: GraphPlan, row: int, result: int) -> int:
    """Bytes that must move: a source row and an index per edge, row pointers, the result."""
    return plan.num_edges * (row + 4) + 8 * plan.num_dst + result


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Source codes ``[num_src, F]`` uint8, the same as floats, and the range of packed output."""

    codes: Tensor
    x: Tensor
    step: Tensor
    offset: Tensor

    @classmethod
    def random(cls, plan: GraphPlan, features: int) -> _Inputs:
        codes = torch.randint(0, top_code(max(WIDTHS)) + 1, (plan.num_src, features), dtype=torch.uint8)
        return cls(codes, codes.to(torch.float32), plan.degree.mean().view(1), torch.tensor([OFFSET]))


def _sides(plan: GraphPlan, inputs: _Inputs) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name to the call and the bytes that it must move."""
    x, features = inputs.x, inputs.x.size(1)
    floats = 4 * features * plan.num_dst
    own = _best_float_kernel(plan, x)
    moved = _moved_bytes(plan, 4 * features, floats)
    sides: dict[str, tuple[Callable[[], Any], int]] = {
        name: (partial(torch.matmul, _adjacency(plan, index), x), moved)
        for name, index in zip(BASELINES, (torch.int64, torch.int32), strict=True)
    }
    if dgl_absence() is None:
        graph = dgl_graph(torch.stack([plan.col.long(), plan.dst]), plan.num_src)
        sides[DGL] = (partial(dgl_sum, graph, x), moved)
    sides[OWN] = (lambda: float_sum(plan, x, *own), moved)
    scale, offset = torch.tensor([SCALE]), torch.tensor([OFFSET])
    out = {"out_scale": inputs.step, "out_offset": inputs.offset}
    for bits in WIDTHS:
        words = pack_codes(inputs.codes & top_code(bits), bits)
        run = partial(aggregate, words, plan, scale, offset, features, bits)
        row = row_bytes(features, bits)
        sides[f"INT{bits}"] = (run, _moved_bytes(plan, row, floats))
        sides[f"INT{bits}, packed"] = (
            partial(run, **out, out_bits=bits),
            _moved_bytes(plan, row, row * plan.num_dst),
        )
    return sides


def _peers(sides: Mapping[str, Any]) -> list[str]:
    """The float sides, our own kernel last."""
    return [side for side in (*BASELINES, DGL, OWN) if side in sides]


def _check(plan: GraphPlan, sides: dict[str, tuple[Callable[[], Any], int]], inputs: _Inputs) -> None:
    """No timing of a wrong result: integer-valued sums are exact on every side."""
    want = sides[BASELINES[0]][0]()
    for name in _peers(sides)[1:]:
        torch.testing.assert_close(sides[name][0](), want)
    shape = next(shape for shape in FLOAT_KERNELS if inputs.x.size(1) % shape[0] == 0)
    for bits in WIDTHS:
        want = float_sum(plan, (inputs.codes & top_code(bits)).to(torch.float32), *shape)
        out = sides[f"INT{bits}"][0]()
        torch.testing.assert_close(out, want * SCALE + plan.degree.view(-1, 1) * OFFSET)
        packed = quantize_pack(out, inputs.step, inputs.offset, bits)
        assert torch.equal(sides[f"INT{bits}, packed"][0](), packed)


def aggregate_rows(
    name: str, plan: GraphPlan, features: int, threads: Sequence[int], rounds: int, slow_rounds: int
) -> list[dict[str, Any]]:
    """One row per side and thread count: milliseconds, ratios over both float32 kernels, bytes per second."""
    inputs = _Inputs.random(plan, features)
    rows = []
    for count in threads:
        set_threads(count)
        sides = _sides(plan, inputs)
        _check(plan, sides, inputs)
        few = min(slow_rounds if plan.num_edges > LONG_EDGES else rounds, rounds)
        calls = {side: call for side, (call, _) in sides.items()}
        peers = _peers(sides)
        timings = interleaved(calls, rounds, {side: few for side in peers if few < rounds})
        baseline = min(BASELINES, key=lambda side: timings[side].median)
        best = min(peers[:-1], key=lambda side: timings[side].median)
        rows += [
            {
                "graph": name,
                "threads": count,
                "side": side,
                "ms": 1e3 * timing.median,
                OVER_PEERS: timing.over(timings[best]),
                OVER_SPARSE: timing.over(timings[baseline]),
                OVER_OWN: timing.over(timings[OWN]),
                "GB/s": sides[side][1] / timing.median / 1e9,
                "processor ms": 1e3 * timing.processor_median,
                "rounds": len(timing.wall),
            }
            for side, timing in timings.items()
        ]
    return rows


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("nodes", "edges", "csr", "threads", "rounds", "slow_rounds", "features")
    used = {name: getattr(args, name) for name in names}
    used["peers"] = {DGL: dgl_version()}
    used["csr"] = [file.split("=", 1)[0] for file in args.csr]
    return used


def measure(args: argparse.Namespace) -> dict[str, Any]:
    copy, rows = {}, []
    for count in args.threads:
        set_threads(count)
        copy[str(count)] = copy_bandwidth() / 1e9
    torch.manual_seed(0)
    for name, plan in graphs(args.nodes, args.edges, args.csr):
        rows += aggregate_rows(name, plan, args.features, args.threads, args.rounds, args.slow_rounds)
    for row in rows:
        row["of copy"] = row["GB/s"] / copy[str(row["threads"])]
    absent = dgl_absence()
    return {"copy GB/s": copy, "rows": rows, "absent": {} if absent is None else {DGL: absent}}


def markdown(section: Mapping[str, Any]) -> list[str]:
    data = section["data"]
    copy = ", ".join(f"{number(speed)} GB/s on {count} threads" for count, speed in data["copy GB/s"].items())
    ratios = (OVER_PEERS, OVER_SPARSE, OVER_OWN)
    columns = ("graph", "threads", "side", "ms", *ratios, "GB/s", "of copy", "processor ms", "rounds")
    title = f"## `aggregate`, {section['settings']['features']} features"
    peers = peer_line(section["settings"].get("peers", {}), data.get("absent", {}), ["`torch.sparse`"])
    return [title, "", NOTES, *peers, f"Copy bandwidth: {copy}.", "", *table(columns, data["rows"])]


def targets(data: Mapping[str, Any]) -> list[Target]:
    names = dict.fromkeys(row["graph"] for row in data["rows"])
    return [
        Target(
            f"aggregate, {side.format(bits)}, {name}, {column}", least,
            per_threads(data["rows"], column, graph=name, side=side.format(bits)),
        )
        for side, column, aims in TARGETS
        for bits, least in aims.items()
        for name in names
    ]  # fmt: skip
