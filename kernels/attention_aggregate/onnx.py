"""``attention_aggregate`` in operations that ONNX has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arithmetic import attention_thresholds, is_per_row, multiplied
from ..onnx import destinations, finish, into_rows, largest, spread, sums, unpack
from . import FLOAT_BITS


def _logits(
    x: Tensor,
    src: Tensor,
    dst: Tensor,
    heads: int,
    slope: float,
    terms: tuple[Tensor | None, ...],
    att: Tensor | None,
    x_dst: Tensor | None,
) -> Tensor:
    if att is not None:
        assert x_dst is not None
        z = (x[src] + x_dst[dst]).reshape(src.size(0), heads, x.size(1) // heads)
        return (torch.where(z > 0, z, z * slope) * att).sum(-1)
    alpha_src, alpha_dst, alpha_edge = terms
    assert alpha_src is not None
    assert alpha_dst is not None
    e = alpha_src[src] + alpha_dst[dst]
    e = e if alpha_edge is None else e + alpha_edge
    return torch.where(e > 0, e, e * slope)


def numerators(shifted: Tensor, bits: int) -> Tensor:
    """How many thresholds each value reaches, by bisection."""
    if bits == FLOAT_BITS:
        return shifted.exp()
    # Written out: a program that is being decomposed holds no constants of its own.
    table = torch.cat([torch.full((1,), value) for value in attention_thresholds(bits).tolist()])
    found = torch.zeros_like(shifted, dtype=torch.int64)
    for place in reversed(range(bits)):
        step = 1 << place
        found = torch.where(shifted >= table[found + (step - 1)], found + step, found)
    return found.to(torch.float32)


def attention_aggregate(
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
    alpha_src: Tensor | None,
    alpha_dst: Tensor | None,
    alpha_edge: Tensor | None,
    att: Tensor | None,
    x_dst: Tensor | None,
    concat: bool,
    multiplier: Tensor | None,
    **epilogue: Any,
) -> Any:
    codes, per_row = unpack(words, num_features, bits), is_per_row(scale) or is_per_row(offset)
    src, dst = col.long(), destinations(rowptr, col.size(0))
    if multiplier is not None:
        row_scale, row_offset = multiplied(scale, offset, multiplier)
    else:
        row_scale, row_offset = (spread(v, num_features) if is_per_row(v) else v for v in (scale, offset))
    x = codes.to(torch.float32) * row_scale + row_offset
    e = _logits(x, src, dst, heads, negative_slope, (alpha_src, alpha_dst, alpha_edge), att, x_dst)
    numerator = numerators(e - largest(e, rowptr, float("-inf"))[dst], attention_bits)
    total = into_rows(numerator.double(), rowptr).to(torch.float32)
    some = total > 0
    inverse = spread(torch.where(some, 1 / torch.where(some, total, 1.0), 0.0), num_features)
    weight = spread(numerator, num_features)
    if attention_bits == FLOAT_BITS or per_row:
        y = sums(x, rowptr, col, weight) * inverse
    elif multiplier is None:
        y = (sums(codes, rowptr, col, weight.long()).to(torch.float32) * scale) * inverse + offset
    else:
        m = multiplier.to(torch.int64).unsqueeze(1)
        y = sums(codes * m, rowptr, col, weight.long()).to(torch.float32)
        mass = sums(m.expand(-1, heads), rowptr, col, numerator.long()).to(torch.float32)
        y = (y * scale) * inverse + offset * (spread(mass, num_features) * inverse)
    y = torch.where(inverse > 0, y, 0.0)
    if not concat:
        y = y.reshape(-1, heads, num_features // heads).mean(1)
    return finish(y, **epilogue)
