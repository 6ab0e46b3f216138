"""``head_dots`` on Triton: a program has some rows of one head, and walks over the vectors."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import DOT_LANES
from ..triton.launch import UNSPECIALIZED, check_devices, launch

__all__ = ["fold_lanes", "head_dots", "head_dots_kernel"]

ROWS = 64
NUM_WARPS = 4


@triton.jit
def fold_lanes(total, ROWS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[ROWS, LANES]`` added up by halves, the upper half of the lanes to the lower one: ``[ROWS]``."""
    tl.static_assert(LANES == 16)
    total = tl.sum(tl.reshape(total, [ROWS, 2, 8]), 1)
    total = tl.sum(tl.reshape(total, [ROWS, 2, 4]), 1)
    total = tl.sum(tl.reshape(total, [ROWS, 2, 2]), 1)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def head_dots_kernel(  # type: ignore[no-untyped-def]
    x, vectors, out, num_rows,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``out_vnh = <x_nh, a_vh>``: every lane adds up its products in order, then lanes fold."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < num_rows
    row64 = row.to(tl.int64)
    lane = tl.arange(0, LANES)
    of_rows = x + row64[:, None] * (HEADS * WIDTH) + head * WIDTH
    for v in range(VECTORS):
        total = tl.zeros([ROWS, LANES], tl.float32)
        for first in range(0, WIDTH, LANES):
            feature = first + lane
            ok = feature < WIDTH
            a = tl.load(vectors + (v * HEADS + head) * WIDTH + feature, mask=ok, other=0.0)
            y = tl.load(of_rows + feature[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
            total += y * a[None, :]
        target = out + (tl.cast(v, tl.int64) * num_rows + row64) * HEADS + head
        tl.store(target, fold_lanes(total, ROWS, LANES), mask=row_ok)


def head_dots(x: Tensor, vectors: Tensor, heads: int) -> Tensor:
    device = check_devices(x, vectors)
    (rows, features), number = x.shape, vectors.size(0)
    out = x.new_empty((number, rows, heads))
    launch(
        head_dots_kernel, (triton.cdiv(rows, ROWS), heads), device, x.contiguous(), vectors.contiguous(), out, rows,
        HEADS=heads, WIDTH=features // heads, VECTORS=number, ROWS=ROWS, LANES=DOT_LANES, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
