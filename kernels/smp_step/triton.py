r"""``smp_step`` on Triton: one step of smoothness-aware propagation.

The neighbours' sum is the kernel of ``aggregate`` on packed messages (a float sum without them),
``U`` and the energy follow in one elementwise pass.  Only where the constraint acts or is measured
does a second sum, ``A~ D``, and the correction follow.  Inner products leave one float64 partial
sum per program, added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aggregate.triton import aggregate
from ..fake_quantize.triton import tile_shape
from ..float_sum.triton import float_sum
from ..quantize_pack.triton import pack_scaled
from ..triton.launch import UNSPECIALIZED, check_devices, check_graph, config_for, launch
from . import step_factors

__all__ = ["correct_kernel", "smp_step", "update_kernel"]


@triton.jit
def _tile(num_rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ok = (row < num_rows)[:, None] & (column < F)[None, :]
    return row, row.to(tl.int64)[:, None] * F + column[None, :], ok


@triton.jit
def _store_product(a, b, partial):
    product = a.to(tl.float64) * b.to(tl.float64)
    index = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + index, tl.sum(tl.sum(product, 1), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def update_kernel(  # type: ignore[no-untyped-def]
    h, x0, neighbours, norm, out, scaled, energy, c0, c1, eta, num_rows,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``U = ((c0 H) + (c1 A~H)) + (eta X0)``, ``n D`` where asked for, and ``<H, H - A~H>``."""
    row, at, ok = _tile(num_rows, F, ROWS, COLUMNS)
    state = tl.load(h + at, mask=ok, other=0.0)
    average = tl.load(neighbours + at, mask=ok, other=0.0)
    u = (c0 * state + c1 * average) + eta * tl.load(x0 + at, mask=ok, other=0.0)
    tl.store(out + at, u, mask=ok)
    if scaled is not None:
        factor = tl.load(norm + row, mask=row < num_rows, other=0.0)[:, None]
        tl.store(scaled + at, (u - state) * factor, mask=ok)
    _store_product(state, state - average, energy)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def correct_kernel(  # type: ignore[no-untyped-def]
    h, u, change, constraint, c2, num_rows,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``H' = U - (c2 (D - A~D))`` in place of ``U``, and ``<D, D - A~D>``; ``change`` is
    ``A~D``.
    """
    _, at, ok = _tile(num_rows, F, ROWS, COLUMNS)
    updated = tl.load(u + at, mask=ok, other=0.0)
    d = updated - tl.load(h + at, mask=ok, other=0.0)
    rough = d - tl.load(change + at, mask=ok, other=0.0)
    tl.store(u + at, updated - c2 * rough, mask=ok)
    _store_product(d, rough, constraint)


def smp_step(
    h: Tensor,
    x0: Tensor,
    rowptr: Tensor,
    col: Tensor,
    norm: Tensor,
    eta: float,
    mu: float,
    multiplier: float,
    measure: bool = False,
    words: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    bits: int = 0,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    device = check_devices(h, x0, rowptr, col, norm, words, scale, offset, out_scale, out_offset)
    check_graph(rowptr, col, h.size(0))
    h, x0, col, norm = h.contiguous(), x0.contiguous(), col.contiguous(), norm.contiguous()
    num_rows, features = h.shape
    if words is None:
        neighbours = float_sum(h, rowptr, col, norm, src_scale=norm)
    else:
        assert scale is not None
        assert offset is not None
        neighbours = aggregate(words, rowptr, col, scale, offset, features, bits, dst_scale=norm)
    rows, columns = tile_shape(features)
    grid = triton.cdiv(num_rows, rows), triton.cdiv(features, columns)
    shape = {"F": features, "ROWS": rows, "COLUMNS": columns}
    num_warps = config_for("elementwise", device, features).num_warps
    c0, c1, c2 = step_factors(eta, mu, multiplier)
    corrects = measure or multiplier != 0
    out = torch.empty_like(h)
    scaled = torch.empty_like(h) if corrects else None
    energy = h.new_empty((grid[0] * grid[1],), dtype=torch.float64)
    launch(
        update_kernel, grid, device, h, x0, neighbours, norm, out, scaled, energy, c0, c1, eta,
        num_rows, num_warps=num_warps, **shape,
    )  # fmt: skip
    constraint = torch.zeros_like(energy)
    if scaled is not None:
        change = float_sum(scaled, rowptr, col, norm)
        launch(
            correct_kernel, grid, device, h, out, change, constraint, c2, num_rows,
            num_warps=num_warps, **shape,
        )  # fmt: skip
    packed = h.new_empty((0, 0), dtype=torch.int32)
    if out_bits:
        assert out_scale is not None
        assert out_offset is not None
        packed = pack_scaled(out, norm, out_scale, out_offset, out_bits)
    return out, packed, torch.stack([constraint.sum(), energy.sum()]).to(torch.float32)
