"""The ops of packed models in operations that ONNX has: no bit casts, no views of memory, no branches on data.

Each function has the arguments of its op and computes what the op's reference does, in the same order of float
operations; sums over codes are integers, so that they are exact in any runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.arithmetic import LARGEST_MULTIPLIER, attention_thresholds, is_per_row, multiplied
from ..kernels.head_dots import head_dots_reference
from ..kernels.head_linear import with_multipliers
from ..kernels.layout import parts_per_byte, row_bytes, top_code
from ..kernels.smp_step import step_factors

__all__ = ["STANDARD"]

BYTE, WORD = 1 << 8, 1 << 32
BYTES_PER_WORD = 4
FLOAT_BITS = 32


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
    """The tail of every epilogue (see :func:`qgnn_plugin.kernels.arithmetic.finish`)."""
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


def quantize_pack(x: Tensor, scale: Tensor, offset: Tensor, bits: int, unit: Tensor | None = None) -> Any:
    return finish(x, None, False, scale, offset, bits, out_unit=unit)


def unpack_dequantize(
    words: Tensor, scale: Tensor, offset: Tensor, num_features: int, bits: int, multiplier: Tensor | None = None
) -> Tensor:
    if multiplier is not None:
        scale, offset = multiplied(scale, offset, multiplier)
    return unpack(words, num_features, bits).to(torch.float32) * scale + offset


def aggregate(
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
    codes = unpack(words, num_features, bits)
    degree = (rowptr[1:] - rowptr[:-1]).unsqueeze(1)
    per_row = is_per_row(scale) or is_per_row(offset)
    if reduce == "max":
        y = largest(codes[col.long()], rowptr, -1).to(torch.float32) * scale + offset
        y = torch.where(degree > 0, y, 0.0)
    elif edge_weight is None and not per_row:
        if multiplier is None:
            total, mass = sums(codes, rowptr, col), degree
        else:
            m = multiplier.to(torch.int64).unsqueeze(1)
            total, mass = sums(codes * m, rowptr, col), sums(m, rowptr, col)
        y = (total.to(torch.float32) * scale) + (mass.to(torch.float32) * offset)
    else:
        weight = None if edge_weight is None else spread(edge_weight, num_features)
        if multiplier is not None:
            scale, offset = multiplied(scale, offset, multiplier)
        if per_row or multiplier is not None:
            y = sums(codes.to(torch.float32) * scale + offset, rowptr, col, weight)
        else:
            assert weight is not None
            y = (sums(codes.to(torch.float32), rowptr, col, weight) * scale) + (into_rows(weight, rowptr) * offset)
    y = y if dst_scale is None else y * dst_scale.unsqueeze(1)
    return finish(y, bias, relu, out_scale, out_offset, out_bits, out_unit=out_unit)


def linear(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    if multiplier is not None:
        x_scale, x_offset = multiplied(x_scale, x_offset, multiplier)
    x, w = unpack(x_words, in_features, x_bits), unpack(w_words, in_features, w_bits)
    # Products of small integers are exact in float64.
    product = (x.to(torch.float64) @ w.to(torch.float64).t()).to(torch.float32)
    rows, columns = x.sum(1, keepdim=True).to(torch.float32), w.sum(1).to(torch.float32)
    y = (product * w_scale.reshape(1, -1)) + (rows * w_offset.reshape(1, -1))
    column = (columns * w_scale.reshape(-1)) + (float(in_features) * w_offset.reshape(-1))
    y = (y * x_scale) + (column * x_offset)
    return finish(y, bias, relu, out_scale, out_offset, out_bits, row_scale, addend, out_unit)


def head_linear(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    vectors: Tensor,
    heads: int,
    out_scale: Tensor,
    out_offset: Tensor,
    out_bits: int,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    y = linear(
        x_words, w_words, x_scale, x_offset, w_scale, w_offset, in_features, x_bits, w_bits, bias, multiplier=multiplier
    )
    packed = finish(y, None, False, out_scale, out_offset, out_bits, out_unit=out_unit)
    return *with_multipliers(packed), head_dots_reference(y, vectors, heads)


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
    return finish(y, bias, relu, out_scale, out_offset, out_bits, out_unit=out_unit)


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
    factor = norm.unsqueeze(1)
    if words is None:
        near = sums(h * factor, rowptr, col) * factor
    else:
        assert scale is not None
        assert offset is not None
        degree = (rowptr[1:] - rowptr[:-1]).to(torch.float32).unsqueeze(1)
        total = sums(unpack(words, h.size(1), bits), rowptr, col).to(torch.float32)
        near = ((total * scale) + (degree * offset)) * factor
    c0, c1, c2 = step_factors(eta, mu, multiplier)
    u = ((c0 * h) + (c1 * near)) + (eta * x0)
    energy = (h.double() * (h - near).double()).sum()
    constraint, out = torch.zeros_like(energy), u
    if measure or multiplier != 0:
        d = u - h
        rough = d - sums(d * factor, rowptr, col) * factor
        out = u - (c2 * rough)
        constraint = (d.double() * rough.double()).sum()
    packed = h.new_zeros((0, 0), dtype=torch.int32)
    if out_bits:
        packed = finish(out * factor, None, False, out_scale, out_offset, out_bits)
    return out, packed, torch.stack([constraint, energy]).to(torch.float32)


def float_sum(
    x: Tensor,
    rowptr: Tensor,
    col: Tensor,
    dst_scale: Tensor | None = None,
    src_scale: Tensor | None = None,
    weight: Tensor | None = None,
    edge: Tensor | None = None,
) -> Tensor:
    if weight is not None:
        weight = spread(weight if edge is None else weight[edge], x.size(1))
    out = sums(x if src_scale is None else x * src_scale.unsqueeze(1), rowptr, col, weight)
    return out if dst_scale is None else out * dst_scale.unsqueeze(1)


def segment_largest(values: Tensor, rowptr: Tensor, fill: float = 0.0) -> Tensor:
    some = (rowptr[1:] > rowptr[:-1]).unsqueeze(1)
    return torch.where(some, largest(values, rowptr, float("-inf")), fill)


def inverse_root(degree: Tensor) -> Tensor:
    return torch.where(degree == 0, 0.0, 1 / torch.sqrt(degree))


def amax(x: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    """The largest of all values: exporters know that of some dimensions alone."""
    return NotImplemented if len(dim) or keepdim else torch.max(x.reshape(-1), 0).values


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "quantize_pack": quantize_pack,
    "unpack_dequantize": unpack_dequantize,
    "aggregate": aggregate,
    "linear": linear,
    "head_dots": head_dots_reference,
    "head_linear": head_linear,
    "attention_aggregate": attention_aggregate,
    "smp_step": smp_step,
    "float_sum": float_sum,
    "segment_largest": segment_largest,
    "inverse_root": inverse_root,
}

# By overload, as `ExportedProgram.run_decompositions` takes them.
STANDARD: dict[Any, Callable[..., Any]] = {
    getattr(getattr(torch.ops.qgnn, name), overload): function
    for name, function in _FUNCTIONS.items()
    for overload in getattr(torch.ops.qgnn, name).overloads()
} | {torch.ops.aten.amax.default: amax}
