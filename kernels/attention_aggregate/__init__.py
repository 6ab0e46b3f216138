r"""``attention_aggregate``: GAT and GATv2 over packed messages; nothing of size ``E x H`` or ``E x
F`` is written.

Per head, with logits :math:`e_{ij}` and :math:`m_i = \max_j e_{ij}`, the softmax numerators are
quantized at ``attention_bits`` (:math:`k_{ij}` of :math:`Q_a` levels, see
:func:`..arithmetic.attention_thresholds`) and normalized by their own sum:

.. math::
    y_i = \Big(s \sum_j k_{ij} c_j\Big) \cdot \Big(1 \Big/ \sum_j k_{ij}\Big) + l

GAT: ``e = LeakyReLU(alpha_src[j] + alpha_dst[i] (+ alpha_edge[e]))``.  GATv2: ``e = <att,
    LeakyReLU(x^_j + x_dst[i])>``.
At ``attention_bits = 32`` the numerators are :math:`\exp(e_{ij} - m_i)` and the sums run in
float32, as do those of messages with a range per source row, or per source row and head.

With a multiplier :math:`m_j` per source row, the sums at quantized numerators stay integers:

.. math::
    y_i = \Big(s \sum_j k_{ij} m_j c_j\Big) r_i + l \Big(\sum_j k_{ij} m_j\Big) r_i,
    \qquad r_i = 1 \Big/ \sum_j k_{ij}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..aggregate import check_output_range, destinations, new_output, per_feature, sum_rows
from ..arithmetic import (
    attention_thresholds,
    check_multiplier,
    check_range,
    dequantize_codes,
    finish,
    is_per_row,
    multiplied,
)
from ..backend import implementation, is_direct
from ..checks import check_float, check_plan
from ..indices import check_csr
from ..layout import check_packed, unpack_codes
from ..library import register
from ..plan import GraphPlan

__all__ = ["attention_aggregate", "attention_aggregate_reference"]

FLOAT_BITS = 32


def _logits(
    x: Tensor,
    src: Tensor,
    dst: Tensor,
    heads: int,
    negative_slope: float,
    alpha_src: Tensor | None,
    alpha_dst: Tensor | None,
    alpha_edge: Tensor | None,
    att: Tensor | None,
    x_dst: Tensor | None,
) -> Tensor:
    """``[E, H]``; both forms materialize here, and only here."""
    if att is None:
        assert alpha_src is not None
        assert alpha_dst is not None
        e = alpha_src[src] + alpha_dst[dst]
        if alpha_edge is not None:
            e = e + alpha_edge
        return torch.where(e > 0, e, e * negative_slope)
    assert x_dst is not None
    z = (x[src] + x_dst[dst]).view(src.numel(), heads, x.size(1) // heads)
    return (torch.where(z > 0, z, z * negative_slope) * att).sum(-1)


def _spread(value: Tensor, num_features: int) -> Tensor:
    """A range per row and head as one per row and feature; others as they are."""
    return per_feature(value, num_features) if is_per_row(value) else value


def attention_aggregate_reference(
    words: Tensor,
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    heads: int,
    attention_bits: int,
    negative_slope: float,
    alpha_src: Tensor | None = None,
    alpha_dst: Tensor | None = None,
    alpha_edge: Tensor | None = None,
    att: Tensor | None = None,
    x_dst: Tensor | None = None,
    concat: bool = True,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    codes = unpack_codes(words, num_features, bits)
    src, dst = col.long(), destinations(rowptr, col.numel())
    if multiplier is None:
        x = dequantize_codes(codes, _spread(scale, num_features), _spread(offset, num_features))
    else:
        x = dequantize_codes(codes, *multiplied(scale, offset, multiplier))
    e = _logits(x, src, dst, heads, negative_slope, alpha_src, alpha_dst, alpha_edge, att, x_dst)
    num_dst = rowptr.numel() - 1
    peak = e.new_zeros((num_dst, heads))
    peak.scatter_reduce_(0, dst.unsqueeze(1).expand_as(e), e, "amax", include_self=False)
    e = e - peak[dst]
    if attention_bits == FLOAT_BITS:
        numerator = e.exp()
    else:
        thresholds = attention_thresholds(attention_bits).to(e.device)
        numerator = torch.searchsorted(thresholds, e.contiguous(), right=True).to(torch.float32)
    total = torch.zeros((num_dst, heads), dtype=torch.float64, device=e.device)
    total = total.index_add_(0, dst, numerator.double()).to(torch.float32)
    inverse = per_feature(torch.where(total > 0, 1 / total, 0.0), num_features)
    exact = attention_bits != FLOAT_BITS and not is_per_row(scale) and not is_per_row(offset)
    weight = per_feature(numerator, num_features)
    if exact and multiplier is not None:
        m = multiplier.long().unsqueeze(1)
        y = sum_rows(codes.long() * m, rowptr, col, weight.long()).to(torch.float32)
        mass = sum_rows(m.expand(-1, heads), rowptr, col, numerator.long()).to(torch.float32)
        y = (y * scale) * inverse + offset * (per_feature(mass, num_features) * inverse)
    elif exact:
        # int64: 100,000 neighbours at 8 x 8 bits pass 2^31.
        y = sum_rows(codes.long(), rowptr, col, weight.long()).to(torch.float32)
        y = (y * scale) * inverse + offset
    else:
        y = sum_rows(x, rowptr, col, weight) * inverse
    y = torch.where(inverse > 0, y, 0.0)
    if not concat:
        y = y.view(num_dst, heads, num_features // heads).mean(1)
    return finish(y, bias, relu, out_scale, out_offset, out_bits, out_unit=out_unit)


def _fake(
    words: Tensor,
    rowptr: Tensor,
    num_features: int,
    heads: int,
    concat: bool,
    out_bits: int,
    out_unit: Tensor | None,
) -> Any:
    width = num_features if concat else num_features // heads
    return new_output(words, rowptr.size(0) - 1, width, out_bits, out_unit)


def _check(
    words: Tensor,
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    heads: int,
    attention_bits: int,
    alpha_src: Tensor | None,
    alpha_dst: Tensor | None,
    alpha_edge: Tensor | None,
    att: Tensor | None,
    x_dst: Tensor | None,
    concat: bool,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_offset: Tensor | None,
    out_bits: int,
    multiplier: Tensor | None,
    out_unit: Tensor | None,
) -> None:
    check_packed(words, num_features, bits)
    num_src, num_dst = words.size(0), rowptr.numel() - 1
    check_csr(rowptr, col, num_src)
    if heads < 1 or num_features % heads:
        raise ValueError(f"Expected 'heads' to divide {num_features} features (got {heads})")
    if scale.shape != (num_src, heads) or offset.shape != (num_src, heads):
        check_range(scale, offset, num_src, num_features)
    elif scale.dtype is not torch.float32 or offset.dtype is not torch.float32:
        raise TypeError(f"Expected 'scale' and 'offset' to be float32 (got {scale.dtype}, {offset.dtype})")
    check_multiplier(multiplier, scale, offset, num_src)
    if attention_bits not in (2, 4, 8, FLOAT_BITS):
        raise ValueError(f"Expected 'attention_bits' to be 2, 4, 8 or {FLOAT_BITS} (got {attention_bits})")
    gat = alpha_src is not None and alpha_dst is not None and att is None and x_dst is None
    gatv2 = att is not None and x_dst is not None and alpha_src is None and alpha_dst is None and alpha_edge is None
    if not (gat or gatv2):
        given = {"alpha_src": alpha_src, "alpha_dst": alpha_dst, "alpha_edge": alpha_edge, "att": att, "x_dst": x_dst}
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(
            f"Expected either 'alpha_src' and 'alpha_dst' (GAT) or 'att' and 'x_dst' (GATv2) (got {names})"
        )
    check_float(alpha_src, "alpha_src", (num_src, heads))
    check_float(alpha_dst, "alpha_dst", (num_dst, heads))
    check_float(alpha_edge, "alpha_edge", (col.numel(), heads))
    check_float(att, "att", (heads, num_features // heads))
    check_float(x_dst, "x_dst", (num_dst, num_features))
    width = num_features if concat else num_features // heads
    check_float(bias, "bias", (width,))
    check_output_range(out_scale, out_offset, out_bits, num_dst, width, out_unit)


_check_all = register(attention_aggregate_reference, _fake, _check, rows="out_unit")


def attention_aggregate(
    words: Tensor,
    plan: GraphPlan,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    *,
    heads: int = 1,
    attention_bits: int = FLOAT_BITS,
    negative_slope: float = 0.2,
    alpha_src: Tensor | None = None,
    alpha_dst: Tensor | None = None,
    alpha_edge: Tensor | None = None,
    att: Tensor | None = None,
    x_dst: Tensor | None = None,
    concat: bool = True,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    r"""Attention-weighted mean of packed multi-head messages over the edges of ``plan``.

    Args:
        words: ``[num_src, row_words(F, bits)]`` int32; head ``h`` of ``H`` covers the features ``[h
            C, (h + 1) C)``, ``C = F / H``.
        plan: The graph.
        scale, offset: Range of the codes: one element, ``[F]``, ``[num_src, 1]`` or, a range per row
            and head, ``[num_src, H]``, float32.
        num_features: ``F``.
        bits: Width of the codes: 1, 2, 4 or 8.
        heads: ``H``.
        attention_bits: Width of the softmax numerators: 2, 4, 8, or 32 for float.
        negative_slope: Of the LeakyReLU.
        alpha_src, alpha_dst: ``[num_src, H]`` and ``[num_dst, H]`` float32 terms of the GAT logits.
        alpha_edge: ``[E, H]`` float32 edge term, CSR order.
        att, x_dst: ``[H, C]`` and ``[num_dst, F]`` float32, for GATv2 logits instead.
        concat: Whether heads are concatenated, else averaged (result width ``C``).
        bias: ``[F]`` or ``[C]`` float32.
        relu: Whether to clamp at 0.
        out_scale, out_offset, out_bits: Range and width of packed output.
        multiplier: ``[num_src]`` uint8 of ``0 .. 15``: row ``j`` holds ``m_j (s c_j + l)``.  Not with a range per row.
        out_unit: Unit ``p`` of the row multipliers of packed output, one element, float32: row ``i`` is packed at the
            range ``(s m_i, l m_i)`` of ``out_scale``, ``out_offset``, ``m_i = clamp(ceil(max_f |y_if| / p), 1, 15)``.

    Returns:
        ``[num_dst, F or C]`` float32, or packed words with ``out_bits``; with ``out_unit`` a pair, the words and the
        multipliers of their rows, ``[num_dst]`` uint8.  A row without neighbours
        gives 0 (before the bias).

    Raises:
        TypeError: If an argument has another dtype.
        ValueError: If one has another shape or is on another device, or if terms of the logits are neither those of GAT
            nor those of GATv2.
    """
    check_plan(plan, words, "packed row")
    args = (
        words, plan.rowptr, plan.col, scale, offset, num_features, bits, heads, attention_bits,
        negative_slope, alpha_src, alpha_dst, alpha_edge, att, x_dst, concat, bias, relu,
        out_scale, out_offset, out_bits, multiplier,
    )  # fmt: skip
    on_cpu = words.is_cpu and all(v.is_cpu for v in (*args, out_unit) if isinstance(v, Tensor))
    # What is no tensor where one belongs is left to the schema, which says so.
    ranges = all(v is None or isinstance(v, Tensor) for v in (scale, offset, out_scale, out_offset, out_unit))
    if on_cpu and ranges and is_direct():
        _check_all(*args, out_unit)
        return implementation("attention_aggregate", "cpu")(*args, out_unit)
    if out_unit is None:
        return torch.ops.qgnn.attention_aggregate.default(*args)
    return torch.ops.qgnn.attention_aggregate.rows(*args, out_unit=out_unit)
