"""Linear maps of single edges in generated Triton kernels: rows are quantized, multiplied and finished in registers.

Operations and their order are those of ``quantize_pack`` and then ``linear`` (:mod:`..arithmetic`).  A weight is
decoded once per row of the graph; each edge multiplies by it as a vector, in integers.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import LARGEST_MULTIPLIER
from ..triton.epilogue import quantize, row_multipliers

__all__ = ["column_terms", "edge_product", "weight_codes"]

_LARGEST = tl.constexpr(LARGEST_MULTIPLIER)
_FINITE = tl.constexpr(3.4028234663852886e38)


@triton.jit
def weight_codes(
    words, K: tl.constexpr, N: tl.constexpr, KS: tl.constexpr, NS: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr
):
    """The codes of a weight ``[N, K]`` whose rows take ``STEP`` bytes, ``[NS, KS]`` int32; 0 past its ends."""
    k, o = tl.arange(0, KS)[None, :], tl.arange(0, NS)[:, None]
    inside = (k < K) & (o < N)
    word = tl.load(words + o * (STEP // 4) + (k % STEP) // 4, mask=inside, other=0)
    return (word >> (8 * ((k % STEP) % 4) + BITS * (k // STEP))) & ((1 << BITS) - 1)


@triton.jit
def column_terms(codes, scale, lower, K: tl.constexpr, N: tl.constexpr, KS: tl.constexpr, NS: tl.constexpr):
    """What an input of ones would give, ``[NS]``."""
    o = tl.arange(0, NS)
    w_scale, w_lower = tl.load(scale + o, mask=o < N, other=0.0), tl.load(lower + o, mask=o < N, other=0.0)
    return tl.sum(codes, 1).to(tl.float32) * w_scale + (K * 1.0) * w_lower


@triton.jit
def edge_product(
    x, codes, columns, w_scale, w_lower, bias, scale, lower, unit,
    K: tl.constexpr, N: tl.constexpr, KS: tl.constexpr, NS: tl.constexpr, BITS: tl.constexpr,
    HAS_UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``x^ W^T + b`` of one row ``[KS]``, whose numbers past ``K`` do not count: ``[NS]``; NaN where not all of
    ``x`` is finite.
    """
    k, o = tl.arange(0, KS), tl.arange(0, NS)
    size = tl.where(k < K, tl.abs(x), 0.0)
    is_finite = tl.min((size <= _FINITE).to(tl.int32), 0)  # false for NaN
    step, low = tl.load(scale), tl.load(lower)
    if HAS_UNIT:
        times = row_multipliers(tl.max(size, 0), unit, _LARGEST)
        step, low = step * times, low * times
    c = tl.where(k < K, quantize(x, step, low, BITS), 0)
    product, total = tl.sum(codes * c[None, :], 1).to(tl.float32), tl.sum(c, 0).to(tl.float32)
    ws, wl = tl.load(w_scale + o, mask=o < N, other=0.0), tl.load(w_lower + o, mask=o < N, other=0.0)
    y = (product * ws + total * wl) * step + columns * low
    if HAS_BIAS:
        y = y + tl.load(bias + o, mask=o < N, other=0.0)
    return tl.where(is_finite != 0, y, float("nan"))
