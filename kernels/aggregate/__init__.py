r"""``aggregate``: dequantize, aggregate over neighbours and requantize in one pass over packed
rows.

Sums run over codes, in integers, and one affine step follows (docs/arithmetic.md):

.. math::
    y_i = \Big(s \sum_{j \in N(i)} c_j + |N(i)|\, l\Big) d_i + b

With a multiplier :math:`m_j` per source row, both sums are of integers again:

.. math::
    y_i = \Big(s \sum_{j \in N(i)} m_j c_j + l \sum_{j \in N(i)} m_j\Big) d_i + b

With edge weights, or a range per source node, the sums run in float32:
:math:`y_i = (s \sum_j w_{ij} c_j + l \sum_j w_{ij})\, d_i + b`, where multipliers join the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER, check_multiplier, check_range, check_unit, finish, is_per_row, multiplied
from ..backend import implementation, is_direct
from ..checks import check_float, check_plan
from ..indices import check_csr, check_degrees
from ..layout import LARGEST_SUM, check_bits, check_packed, row_words, top_code, unpack_codes
from ..library import register
from ..plan import GraphPlan

__all__ = ["REDUCTIONS", "aggregate", "aggregate_reference"]

REDUCTIONS = ("sum", "mean", "max")

MAX_PER_ROW = "Expected one range per tensor or column for reduce='max' (got one per row)"
_REFERENCE_CHUNK = 1 << 24  # elements of the gathered block that the reference holds at a time


def destinations(rowptr: Tensor, num_edges: int) -> Tensor:
    """``[E]`` int64, destination row of each edge in CSR order."""
    rows = torch.arange(rowptr.numel() - 1, device=rowptr.device)
    return torch.repeat_interleave(rows, rowptr[1:] - rowptr[:-1], output_size=num_edges)


def sum_rows(rows: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None = None) -> Tensor:
    """``out[i] = sum of weight[e] * rows[col[e]]`` in the dtype of ``rows`` (int32 or float32);
    ``weight`` ``[E, F]`` or ``[E, 1]``.
    """
    out = rows.new_zeros((rowptr.numel() - 1, rows.size(1)))
    dst = destinations(rowptr, col.numel())
    step = max(1, _REFERENCE_CHUNK // max(1, rows.size(1)))
    for begin in range(0, col.numel(), step):
        edges = slice(begin, begin + step)
        gathered = rows[col[edges].long()]
        if weight is not None:
            gathered = gathered * weight[edges]
        out.index_add_(0, dst[edges], gathered)
    return out


def per_feature(weight: Tensor, num_features: int) -> Tensor:
    """Spread edge weights ``[E]`` or ``[E, H]`` over the features of their head: ``[E, 1]`` or
    ``[E, F]``.
    """
    if weight.dim() == 1:
        return weight.unsqueeze(1)
    return weight.repeat_interleave(num_features // weight.size(1), dim=1)


def _largest(codes: Tensor, rowptr: Tensor, col: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    out = codes.new_zeros((rowptr.numel() - 1, codes.size(1)))
    index = destinations(rowptr, col.numel()).unsqueeze(1).expand(-1, codes.size(1))
    out.scatter_reduce_(0, index, codes[col.long()], "amax", include_self=False)
    has_neighbours = (rowptr[1:] > rowptr[:-1]).unsqueeze(1)
    return torch.where(has_neighbours, out.to(torch.float32) * scale + offset, 0.0)


def aggregate_reference(
    words: Tensor,
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    reduce: str = "sum",
    edge_weight: Tensor | None = None,
    dst_scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    codes = unpack_codes(words, num_features, bits).to(torch.int32)
    degree = (rowptr[1:] - rowptr[:-1]).to(torch.float32).unsqueeze(1)
    per_row = is_per_row(scale) or is_per_row(offset)
    if reduce == "max":
        if per_row:
            raise ValueError(MAX_PER_ROW)
        y = _largest(codes, rowptr, col, scale, offset)
    elif edge_weight is None and multiplier is not None:
        m = multiplier.to(torch.int32).unsqueeze(1)
        total, mass = sum_rows(codes * m, rowptr, col), sum_rows(m, rowptr, col)
        y = (total.to(torch.float32) * scale) + (mass.to(torch.float32) * offset)
    elif edge_weight is None and not per_row:
        y = (sum_rows(codes, rowptr, col).to(torch.float32) * scale) + (degree * offset)
    else:
        weight = None if edge_weight is None else per_feature(edge_weight, num_features)
        if multiplier is not None:
            scale, offset = multiplied(scale, offset, multiplier)
        if per_row or multiplier is not None:
            y = sum_rows(codes.to(torch.float32) * scale + offset, rowptr, col, weight)
        else:
            assert weight is not None
            total = sum_rows(weight.new_ones((words.size(0), weight.size(1))), rowptr, col, weight)
            y = (sum_rows(codes.to(torch.float32), rowptr, col, weight) * scale) + (total * offset)
    if dst_scale is not None:
        y = y * dst_scale.unsqueeze(1)
    return finish(y, bias, relu, out_scale, out_offset, out_bits, out_unit=out_unit)


def _fake(words: Tensor, rowptr: Tensor, num_features: int, out_bits: int, out_unit: Tensor | None) -> Any:
    return new_output(words, rowptr.size(0) - 1, num_features, out_bits, out_unit)


def _check(
    words: Tensor,
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    reduce: str,
    edge_weight: Tensor | None,
    dst_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_offset: Tensor | None,
    out_bits: int,
    multiplier: Tensor | None,
    out_unit: Tensor | None,
) -> None:
    check_packed(words, num_features, bits)
    check_csr(rowptr, col, words.size(0))
    check_code_sums(rowptr, col, bits, multiplier is not None)
    check_range(scale, offset, words.size(0), num_features)
    check_multiplier(multiplier, scale, offset, words.size(0))
    num_dst = rowptr.numel() - 1
    if reduce not in ("sum", "max"):
        raise ValueError(f"Expected 'reduce' to be 'sum' or 'max' (got {reduce!r})")
    if reduce == "max" and multiplier is not None:
        raise ValueError(MAX_PER_ROW)
    if edge_weight is not None:
        _check_weight(edge_weight, col.numel(), num_features, reduce)
    check_float(dst_scale, "dst_scale", (num_dst,))
    check_float(bias, "bias", (num_features,))
    check_output_range(out_scale, out_offset, out_bits, num_dst, num_features, out_unit)


def check_code_sums(rowptr: Tensor, col: Tensor, bits: int, has_multipliers: bool = False) -> None:
    """Raise where a sum of codes (times their rows' multipliers) over neighbours would not fit 31 bits."""
    largest = top_code(bits) * (LARGEST_MULTIPLIER if has_multipliers else 1)
    what = f"at {bits} bits" + (" with row multipliers" if has_multipliers else "")
    check_degrees(rowptr, col.numel(), LARGEST_SUM // largest, what)


def _check_weight(edge_weight: Tensor, num_edges: int, num_features: int, reduce: str) -> None:
    if reduce == "max":
        raise ValueError("Expected no 'edge_weight' with reduce='max' (got one)")
    heads = edge_weight.size(1) if edge_weight.dim() == 2 else 1
    shaped = edge_weight.dim() in (1, 2) and edge_weight.size(0) == num_edges
    if not shaped or heads == 0 or num_features % heads:
        raise ValueError(
            f"Expected 'edge_weight' of shape [{num_edges}] or [{num_edges}, H] with H "
            f"dividing {num_features} (got {list(edge_weight.shape)})"
        )
    if edge_weight.dtype is not torch.float32:
        raise TypeError(f"Expected 'edge_weight' to be float32 (got {edge_weight.dtype})")


register(aggregate_reference, _fake, _check, rows="out_unit")


def new_output(like: Tensor, num_rows: int, num_features: int, out_bits: int, out_unit: Tensor | None = None) -> Any:
    """An uninitialized result: ``[num_rows, num_features]`` float32, or packed words where
    ``out_bits`` is not 0; with ``out_unit`` a pair, the words and their rows' multipliers.
    """
    if out_bits == 0:
        return like.new_empty((num_rows, num_features), dtype=torch.float32)
    words = like.new_empty((num_rows, row_words(num_features, out_bits)), dtype=torch.int32)
    return words if out_unit is None else (words, like.new_empty(num_rows, dtype=torch.uint8))


def check_output_range(
    out_scale: Tensor | None,
    out_offset: Tensor | None,
    out_bits: int,
    rows: int,
    features: int,
    out_unit: Tensor | None = None,
) -> None:
    """Raise unless an output range is given exactly where ``out_bits`` asks for packed output."""
    check_unit(out_unit, out_scale, out_offset, out_bits)
    if out_bits == 0:
        if out_scale is not None or out_offset is not None:
            raise ValueError(
                "Expected no output range for float32 output (got one); pass 'out_bits' to pack"
            )
        return
    check_bits(out_bits, "out_bits")
    if out_scale is None or out_offset is None:
        raise ValueError(
            f"Expected 'out_scale' and 'out_offset' for {out_bits}-bit output (got None)"
        )
    check_range(out_scale, out_offset, rows, features, "out_")


def aggregate(
    words: Tensor,
    plan: GraphPlan,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    *,
    reduce: str = "sum",
    edge_weight: Tensor | None = None,
    dst_scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
    is_checked: bool = False,
    addend: Tensor | None = None,
) -> Any:
    r"""Aggregate packed rows over the edges of ``plan``.

    Args:
        words: ``[num_src, row_words(F, bits)]`` int32.
        plan: The graph.
        scale: Step ``s`` of the codes: one element, ``[F]`` or ``[num_src, 1]``, float32.
        offset: Range start ``l``, shaped likewise.
        num_features: ``F``.
        bits: Width of the codes: 1, 2, 4 or 8.
        reduce: ``"sum"``, ``"mean"`` or ``"max"``; a row without neighbours gives 0.
        edge_weight: ``[E]`` or ``[E, H]`` float32 in CSR order (:meth:`GraphPlan.sort`); head ``h``
            of ``H`` covers the features ``[h F / H, (h + 1) F / H)``.  Not with ``"max"``.
        dst_scale: ``[num_dst]`` float32 factor of each result row.
        bias: ``[F]`` float32.
        relu: Whether to clamp at 0.
        out_scale, out_offset, out_bits: Range and width of packed output (one element, ``[F]`` or
            ``[num_dst, 1]``).
        multiplier: ``[num_src]`` uint8 of ``0 .. 15``: row ``j`` holds ``m_j (s c_j + l)``.  Not with a range per row,
            nor with ``"max"``.
        out_unit: Unit ``p`` of the row multipliers of packed output, one element, float32: row ``i`` is packed at the
            range ``(s m_i, l m_i)`` of ``out_scale``, ``out_offset``, ``m_i = clamp(ceil(max_f |y_if| / p), 1, 15)``.
        is_checked: As that of :func:`~qgnn_plugin.kernels.linear.linear`; the graph and the number of its sources are
            looked at all the same.
        addend: ``[num_dst, F]`` float32, added after the bias; where ``is_checked`` and a kernel of the CPU is run at
            once (:func:`..backend.is_direct`) only.

    Returns:
        ``[num_dst, F]`` float32, or ``[num_dst, row_words(F, out_bits)]`` int32 with ``out_bits``; with ``out_unit`` a
        pair, the words and the multipliers of their rows, ``[num_dst]`` uint8.  Unweighted results are bitwise the
        same on every backend, weighted ones to float32 rounding.

    Raises:
        TypeError: If an argument has another dtype.
        ValueError: If one has another shape, is on another device or does not go with ``reduce``, or if a node has too
            many neighbours for sums of 31 bits.
    """
    check_plan(plan, words, "packed row")
    if reduce not in REDUCTIONS:
        raise ValueError(f"Expected 'reduce' to be one of {REDUCTIONS} (got {reduce!r})")
    if reduce == "mean":
        check_float(dst_scale, "dst_scale", (plan.num_dst,))
        inverse = plan.degree.clamp(min=1).reciprocal()
        dst_scale = inverse if dst_scale is None else inverse * dst_scale
        reduce = "sum"
    args = (
        words, plan.rowptr, plan.col, scale, offset, num_features, bits, reduce, edge_weight,
        dst_scale, bias, relu, out_scale, out_offset, out_bits, multiplier,
    )  # fmt: skip
    if is_checked and words.is_cpu and is_direct():
        check_csr(plan.rowptr, plan.col, plan.num_src)
        check_code_sums(plan.rowptr, plan.col, bits, multiplier is not None)
        return implementation("aggregate", "cpu")(*args, out_unit, addend)
    if addend is not None:
        raise ValueError("Expected no 'addend' past the kernels of the CPU (got one)")
    if out_unit is None:
        return torch.ops.qgnn.aggregate.default(*args)
    return torch.ops.qgnn.aggregate.rows(*args, out_unit=out_unit)
