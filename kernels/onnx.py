"""What the forms of ops in operations that ONNX has share: no bit casts, no views of memory, no branches on data.

The form of an op is the function of its name in its folder's ``onnx.py``, of those of the op's arguments that it needs.
It computes what the reference does, in the same order of float operations; sums over codes are integers, so that they
are exact in any runtime.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import LARGEST_MULTIPLIER, multiplied
from .layout import BYTES_PER_WORD, parts_per_byte, row_bytes, top_code

__all__ = [
    "destinations",
    "finish",
    "into_rows",
    "largest",
    "pack",
    "quantized",
    "spread",
    "sums",
    "unpack",
]

BYTE, WORD = 1 << 8, 1 << 32


def unpack(words: Tensor, num_features: int, bits: int) -> Tensor:
    """Codes ``[N, F]`` int64 of packed words, by divisions in float64, which are exact: exporters divide integers in
    float32.
    """
    unsigned = words.to(torch.float64)
    unsigned = torch.where(unsigned < 0, unsigned + WORD, unsigned)
    row = torch.stack([_digit(unsigned, BYTE**k, BYTE) for k in range(BYTES_PER_WORD)], 2).flatten(1)
    parts = [_digit(row, 1 << (bits * p), 1 << bits) for p in range(parts_per_byte(bits))]
    return torch.cat(parts, 1)[:, :num_features].to(torch.int64)


def _digit(value: Tensor, place: int, base: int) -> Tensor:
    """``value // place % base``; both are powers of two."""
    return torch.floor(value * (1 / place)) - torch.floor(value * (1 / (place * base))) * base


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words ``[N, row_words(F, bits)]`` int32 of codes ``[N, F]``."""
    width, parts = row_bytes(codes.size(1), bits), parts_per_byte(bits)
    lanes = F.pad(codes.to(torch.int64), (0, parts * width - codes.size(1)))
    row = _number([lanes[:, p * width : (p + 1) * width] for p in range(parts)], 1 << bits)
    words = _number([row[:, k::BYTES_PER_WORD] for k in range(BYTES_PER_WORD)], BYTE)
    return torch.where(words >= WORD // 2, words - WORD, words).to(torch.int32)


def _number(digits: list[Tensor], base: int) -> Tensor:
    """What has these digits, the lowest first."""
    total = digits[0]
    for place, digit in enumerate(digits[1:], 1):
        total = total + digit * base**place
    return total


def destinations(rowptr: Tensor, num_edges: int) -> Tensor:
    """``[E]`` int64, the row of each edge: how many rows have ended before it."""
    ended = rowptr.new_zeros(num_edges + 1).scatter_add(0, rowptr[1:], torch.ones_like(rowptr[1:]))
    return ended.cumsum(0)[:-1]


def sums(rows: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None = None) -> Tensor:
    """``sum_j w_ij rows_j`` over the edges of a row."""
    gathered = rows[col.long()]
    return into_rows(gathered if weight is None else gathered * weight, rowptr)


def into_rows(per_edge: Tensor, rowptr: Tensor) -> Tensor:
    """The sum of what the edges of each row have, ``[num_dst, F]`` of ``[E, F]``."""
    index = destinations(rowptr, per_edge.size(0)).unsqueeze(1).expand(-1, per_edge.size(1))
    return per_edge.new_zeros((rowptr.size(0) - 1, per_edge.size(1))).scatter_add(0, index, per_edge)


def largest(per_edge: Tensor, rowptr: Tensor, least: float) -> Tensor:
    """The largest value of each row, ``least``, below all of them, without any."""
    index = destinations(rowptr, per_edge.size(0)).unsqueeze(1).expand(-1, per_edge.size(1))
    start = per_edge.new_full((rowptr.size(0) - 1, per_edge.size(1)), least)
    return start.scatter_reduce(0, index, per_edge, "amax")


def spread(weight: Tensor, num_features: int) -> Tensor:
    """``[E]`` or ``[E, H]`` over the features of their head."""
    if weight.dim() == 1:
        return weight.unsqueeze(1)
    heads = weight.size(1)
    if heads in (1, num_features):
        return weight
    by_head = weight.unsqueeze(2).expand(-1, heads, num_features // heads)
    return by_head.reshape(weight.size(0), num_features)


def quantized(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Codes of ``x``, as floats."""
    return torch.floor((x - offset) * (1 / scale) + 0.5).clamp(0, top_code(bits))


def multipliers(x: Tensor, unit: Tensor) -> Tensor:
    peak = x.abs().amax(1)
    return torch.ceil(peak * (1 / unit.reshape(1))).clamp(1, LARGEST_MULTIPLIER).to(torch.uint8)


def finish(
    y: Tensor,
    bias: Tensor | None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    """The tail of every epilogue (see :func:`.arithmetic.finish`)."""
    y = y if bias is None else y + bias
    y = y if addend is None else y + addend
    y = torch.relu(y) if relu else y
    y = y if row_scale is None else y * row_scale.reshape(-1, 1)
    if out_bits == 0:
        return y
    assert out_scale is not None
    assert out_offset is not None
    if out_unit is None:
        return pack(quantized(y, out_scale, out_offset, out_bits), out_bits)
    factor = multipliers(y, out_unit)
    return pack(quantized(y, *multiplied(out_scale, out_offset, factor), out_bits), out_bits), factor
