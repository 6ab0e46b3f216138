r"""``smp_step``: one step of smoothness-aware message propagation (docs/smoothness.md).

With ``A~ = diag(n) A diag(n)`` given by the plan (self-loops included) and the factors ``n``,

.. math::
    U = (1 - (1 + \mu) \eta) H + \mu \eta\, \tilde A H + \eta X_0 \qquad D = U - H \qquad
    H' = U - 2 \eta \lambda (D - \tilde A D)

Canonical order: ``U = ((c0 * H) + (c1 * AH)) + (eta * X0)`` and ``H' = U - (c2 * (D - AD))`` with
    ``c0, c1, c2`` rounded to
float32 once.  Neighbours come as packed codes of ``n * H``, ``AH_i = ((sum c) s + deg l) n_i``, or
in float32 without ``words``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..aggregate import check_code_sums, check_output_range, sum_rows
from ..arithmetic import check_range, finish, is_per_row
from ..checks import check_float, check_matrix, check_plan
from ..indices import check_csr
from ..layout import check_packed, row_words, unpack_codes
from ..library import register
from ..plan import GraphPlan

__all__ = ["smp_step", "smp_step_reference"]

ROUNDING = 1e-12  # what float64 leaves of an exact zero


def step_factors(eta: float, mu: float, multiplier: float) -> tuple[float, float, float]:
    """``(c0, c1, c2)`` of the canonical order, before rounding to float32.

    Where only rounding keeps ``c0`` from 0 it is 0, and ``c1`` is ``1 - eta``: a step of APPNP with teleport ``eta``.
    """
    c0 = 1 - (1 + mu) * eta
    if abs(c0) < ROUNDING:
        return 0.0, 1 - eta, 2 * eta * multiplier
    return c0, mu * eta, 2 * eta * multiplier


def smp_step_reference(
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
    factor = norm.unsqueeze(1)
    if words is None:
        neighbours = sum_rows(h * factor, rowptr, col) * factor
    else:
        assert scale is not None
        assert offset is not None
        codes = unpack_codes(words, h.size(1), bits).to(torch.int32)
        degree = (rowptr[1:] - rowptr[:-1]).to(torch.float32).unsqueeze(1)
        neighbours = (
            (sum_rows(codes, rowptr, col).to(torch.float32) * scale) + (degree * offset)
        ) * factor
    c0, c1, c2 = step_factors(eta, mu, multiplier)
    u = ((c0 * h) + (c1 * neighbours)) + (eta * x0)
    energy = (h.double() * (h - neighbours).double()).sum()
    constraint = energy.new_zeros(())
    out = u
    if measure or multiplier != 0:
        d = u - h
        rough = d - sum_rows(d * factor, rowptr, col) * factor
        out = u - (c2 * rough)
        constraint = (d.double() * rough.double()).sum()
    packed = h.new_empty((0, 0), dtype=torch.int32)
    if out_bits:
        packed = finish(out * factor, None, False, out_scale, out_offset, out_bits)
    return out, packed, torch.stack([constraint, energy]).to(torch.float32)


def _fake(h: Tensor, out_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (h.size(0), row_words(h.size(1), out_bits)) if out_bits else (0, 0)
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    return out, h.new_empty(shape, dtype=torch.int32), h.new_empty((2,), dtype=torch.float32)


def _check(
    h: Tensor,
    x0: Tensor,
    rowptr: Tensor,
    col: Tensor,
    norm: Tensor,
    words: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    bits: int,
    out_scale: Tensor | None,
    out_offset: Tensor | None,
    out_bits: int,
) -> None:
    check_matrix(h, "h")
    num_rows, num_features = h.shape
    check_float(x0, "x0", (num_rows, num_features))
    check_float(norm, "norm", (num_rows,))
    check_csr(rowptr, col, num_rows)
    if rowptr.numel() != num_rows + 1:
        raise ValueError(f"Expected a graph of {num_rows} nodes, as rows of 'h' (got {rowptr.numel() - 1})")
    if words is not None:
        if scale is None or offset is None:
            raise ValueError("Expected 'scale' and 'offset' with packed 'words' (got None)")
        check_packed(words, num_features, bits)
        check_code_sums(rowptr, col, bits)
        if words.size(0) != num_rows:
            raise ValueError(f"Expected one packed row per node, {num_rows} (got {words.size(0)})")
        check_range(scale, offset, num_rows, num_features)
        if is_per_row(scale) or is_per_row(offset):
            raise ValueError("Expected one range per tensor or column of 'words' (got one per row)")
    check_output_range(out_scale, out_offset, out_bits, num_rows, num_features)


register(smp_step_reference, _fake, _check)


def smp_step(
    h: Tensor,
    x0: Tensor,
    plan: GraphPlan,
    norm: Tensor,
    *,
    eta: float,
    mu: float,
    multiplier: float = 0.0,
    measure: bool = False,
    words: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    bits: int = 0,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One propagation step.

    Args:
        h: ``[N, F]`` float32, the current state ``H``.
        x0: ``[N, F]`` float32, the input of the propagation.
        plan: The graph with its self-loops, ``N`` sources and destinations.
        norm: ``[N]`` float32, the factors ``n`` (``deg^-1/2``).
        eta, mu, multiplier: Step size, smoothness weight and ``lambda >= 0``.
        measure: Whether to return the constraint even at ``multiplier = 0`` (a second pass over the
            edges).
        words, scale, offset, bits: Packed codes of ``norm * H``, ``[N, row_words(F, bits)]``, with
            one range or one per column.
        out_scale, out_offset, out_bits: Also pack ``norm * H'`` for the next step.

    Returns:
        ``H'`` ``[N, F]`` float32; its packed messages (``[0, 0]`` without ``out_bits``); ``[2]``
        float32 with the constraint ``g = <D, D - A~ D>`` (0 where not measured) and the energy
        ``<H, H - A~ H>``.

    Raises:
        TypeError: If an argument has another dtype.
        ValueError: If one has another shape, or is on another device, or if ``words`` come without a range of their
            columns.
    """
    check_plan(plan, h)
    return torch.ops.qgnn.smp_step(
        h, x0, plan.rowptr, plan.col, norm, eta, mu, multiplier, measure, words, scale, offset,
        bits, out_scale, out_offset, out_bits,
    )  # fmt: skip
