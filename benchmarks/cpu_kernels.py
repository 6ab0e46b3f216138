"""``aggregate`` against float32: ``torch.sparse`` CSR and the best kernel of our own tools."""

from __future__ import annotations

from collections.abc import Callable
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

from .timing import interleaved

__all__ = ["BASELINES", "OWN", "aggregate_rows"]

WIDTHS = (2, 4, 8)
BASELINES = ("torch.sparse CSR, int64", "torch.sparse CSR, int32")
OWN = "own float32"
LINE = 16  # floats per cache line


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
    return torch.sparse_csr_tensor(plan.rowptr.to(index), plan.col.to(index), ones, size)


FLOAT_KERNELS = ((64, 16), (128, 8), (256, 4), (256, 8))  # lanes, edges between prefetch and use


def _best_float_kernel(plan: GraphPlan, x: Tensor) -> tuple[int, int]:
    sides: dict[str, Callable[[], Any]] = {
        str(index): lambda shape=shape: float_sum(plan, x, *shape)
        for index, shape in enumerate(FLOAT_KERNELS)
        if x.size(1) % shape[0] == 0
    }
    timings = interleaved(sides, rounds=3)
    return FLOAT_KERNELS[int(min(timings, key=lambda name: min(timings[name].wall)))]


def _moved_bytes(plan: GraphPlan, row: int, result: int) -> int:
    """Bytes that must move: a source row and an index per edge, row pointers, the result."""
    return plan.num_edges * (row + 4) + 8 * plan.num_dst + result


def _sides(plan: GraphPlan, features: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name to the call and the bytes that it must move."""
    codes = torch.randint(0, top_code(max(WIDTHS)) + 1, (plan.num_src, features), dtype=torch.uint8)
    x = codes.to(torch.float32)
    floats = 4 * features * plan.num_dst
    own = _best_float_kernel(plan, x)
    moved = _moved_bytes(plan, 4 * features, floats)
    sides: dict[str, tuple[Callable[[], Any], int]] = {
        name: (partial(torch.matmul, _adjacency(plan, index), x), moved)
        for name, index in zip(BASELINES, (torch.int64, torch.int32), strict=True)
    }
    sides[OWN] = (lambda: float_sum(plan, x, *own), moved)
    scale, offset = torch.tensor([0.5]), torch.tensor([-1.0])
    step = plan.degree.mean().view(1)
    for bits in WIDTHS:
        words = pack_codes(codes & top_code(bits), bits)

        def run(words: Tensor = words, bits: int = bits, **packed: Any) -> Tensor:
            return aggregate(words, plan, scale, offset, features, bits, **packed)

        def packed(run: Callable[..., Tensor] = run, bits: int = bits) -> Tensor:
            return run(out_scale=step, out_offset=offset, out_bits=bits)

        row = row_bytes(features, bits)
        sides[f"INT{bits}"] = (run, _moved_bytes(plan, row, floats))
        sides[f"INT{bits}, packed"] = (packed, _moved_bytes(plan, row, row * plan.num_dst))
    return sides


def _check(plan: GraphPlan, sides: dict[str, tuple[Callable[[], Any], int]]) -> None:
    """No timing of a wrong result: 8-bit codes are the floats' own values."""
    want = sides[BASELINES[0]][0]()
    torch.testing.assert_close(sides[OWN][0](), want)
    affine = want * 0.5 - plan.degree.view(-1, 1)
    torch.testing.assert_close(sides["INT8"][0](), affine)


def aggregate_rows(
    name: str, plan: GraphPlan, features: int, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """One row per side: milliseconds, ratios over both float32 kernels, bytes per second."""
    sides = _sides(plan, features)
    _check(plan, sides)
    timings = interleaved({side: call for side, (call, _) in sides.items()}, rounds)
    baseline = min(BASELINES, key=lambda side: timings[side].median)
    return [
        {
            "graph": name,
            "threads": threads,
            "side": side,
            "ms": 1e3 * timing.median,
            "over torch.sparse": timing.over(timings[baseline]),
            "over own float32": timing.over(timings[OWN]),
            "GB/s": sides[side][1] / timing.median / 1e9,
            "processor ms": 1e3 * float(np.median(timing.processor)),
        }
        for side, timing in timings.items()
    ]
