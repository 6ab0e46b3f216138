r"""The largest products of queries with the rows of a packed table: found among 16-bit queries, taken exactly.

A product of a query with a row of codes ``c`` and its range is :math:`s_n (w c_n + b) + l_n`, ``w`` the weight that the
query gives each code.  In 16 bits, two planes of 8, such weights go through the integer product of
:mod:`qgnn_plugin.kernels.linear`, all rows of the table in one pass over their packed bits.  What that is off by is
bounded: half a step of the weights for every unit of every code, and the roundings of float32.  Rows whose products lie
within twice the bound of the ``k``-th best are the only ones that can be among the ``k`` best; the products of these
are computed as those of a small table are, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.layout import pack_codes, top_code
from ...kernels.linear import linear

__all__ = ["Rows", "Weights", "candidates", "largest", "nearest"]

PLANE = 256  # values of a plane
CACHED = 1 << 16  # products of planes at a time
SPARE = 32  # candidates of a query beyond twice its neighbours
# Roundings of a float32 product, in units of the largest that it could be: a dozen operations, and as many again.
ROUNDINGS = 24 * 2.0**-24


@dataclass(frozen=True)
class Rows:
    """A table: packed codes ``[N, row_words(C, bits)]``, the range of each row or of all, and perhaps factors."""

    words: Tensor
    scale: Tensor  # float32 [N, 1] or one element
    lower: Tensor
    factor: Tensor | None  # float32 [N]
    num_codes: int
    bits: int

    @property
    def is_fast(self) -> bool:
        """Whether integer products are made of its rows: on the CPU, and none can overflow."""
        return self.words.is_cpu and self.num_codes * top_code(self.bits) * (PLANE - 1) < 2**31

    def __len__(self) -> int:
        return self.words.size(0)


@dataclass(frozen=True)
class Weights:
    """Queries: the weight ``[M, C]`` of each value of a row and what is added to their sum, ``[M]``, both float64."""

    of_codes: Tensor
    added: Tensor


def candidates(k: int) -> int:
    """Of how many rows a query's products are computed exactly, at most, to find the ``k`` largest."""
    return 2 * k + SPARE


def nearest(
    rows: Rows, weights: Weights, k: int, block: int, exact: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` largest products of each query.

    Args:
        rows: The table, on the CPU.
        weights: Of the ``M`` queries.
        k: At most ``N``.
        block: Rows of the table that are looked at at a time.
        exact: Of candidates of each query, ``[M, c]`` int64, their products ``[M, c]`` float64.

    Returns:
        Products ``[M, k]`` float64, descending, equal ones in ascending order of index; the indices ``[M, k]``; and
        ``[M]`` bool: queries so close to more rows than are looked at (or so large) that theirs are not certain.
    """
    planes = _Planes(weights)
    error = planes.error(rows)
    count = min(len(rows), candidates(k))
    found, index = _candidates(rows, planes, count, block)
    kth = found[:, k - 1].double()
    unsure = ~(error.isfinite() & found.isfinite().all(1))
    if count < len(rows):
        unsure |= found[:, -1].double() >= kth - 2 * error
    # Ascending indices make ties deterministic.
    index = index.sort(1).values
    products = exact(index)
    order = largest(products, k)
    return products.gather(1, order), index.gather(1, order), unsure


def _candidates(rows: Rows, planes: _Planes, count: int, block: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest approximate products of each query ``[M, count]``, descending, and their indices."""
    best: tuple[Tensor, Tensor] | None = None
    for begin in range(0, len(rows), block):
        scores = planes.products(rows, begin, min(begin + block, len(rows)))
        value, index = scores.topk(min(count, scores.size(1)), dim=1)
        index += begin
        if best is not None:
            value, index = torch.cat([best[0], value], 1), torch.cat([best[1], index], 1)
            value, kept = value.topk(min(count, value.size(1)), dim=1)
            index = index.gather(1, kept)
        best = value, index
    assert best is not None
    return best


class _Planes:
    """Weights in 16 bits, as two times as many rows of 8."""

    def __init__(self, weights: Weights) -> None:
        w = weights.of_codes
        low, high = w.amin(1), w.amax(1)
        self.step = ((high - low) / (PLANE**2 - 1)).clamp_min(torch.finfo(torch.float32).tiny)
        codes = ((w - low.unsqueeze(1)) / self.step.unsqueeze(1)).round().clamp(0, PLANE**2 - 1).long()
        both = torch.cat([codes // PLANE, codes % PLANE]).to(torch.uint8)
        self.words = pack_codes(both, 8)
        zero = torch.zeros_like(low)
        self.scale = torch.cat([PLANE * self.step, self.step]).float()
        self.lower = torch.cat([low, zero]).float()
        self.added = torch.cat([weights.added, zero]).float()
        self.largest = torch.maximum(low.abs(), high.abs())
        self.most_added = weights.added.abs()

    def error(self, rows: Rows) -> Tensor:
        """How far products can be off, ``[M]`` float64."""
        scale, lower = float(rows.scale.abs().max()), float(rows.lower.abs().max())
        units = rows.num_codes * (scale * top_code(rows.bits) + lower)
        # The upper plane alone reaches twice the largest weight.
        error = self.step / 2 * units + ROUNDINGS * (4 * self.largest * units + self.most_added)
        return error if rows.factor is None else error * float(rows.factor.abs().max())

    def products(self, rows: Rows, begin: int, end: int) -> Tensor:
        """Approximate ones with some rows, ``[M, end - begin]`` float32."""
        queries = self.step.numel()
        out = torch.empty((queries, end - begin))
        size = max(64, CACHED // (2 * queries))
        for start in range(begin, end, size):
            stop = min(start + size, end)
            parts = self._parts(rows, start, stop)
            torch.add(parts[:, :queries].t(), parts[:, queries:].t(), out=out[:, start - begin : stop - begin])
        return out

    def _parts(self, rows: Rows, begin: int, end: int) -> Tensor:
        """``[end - begin, 2 M]``: of the upper plane of each query, and of the lower one."""
        scale, lower = (t[begin:end] if t.numel() > 1 else t.reshape(1) for t in (rows.scale, rows.lower))
        parts: Tensor = linear(
            rows.words[begin:end], self.words, scale, lower, self.scale, self.lower, rows.num_codes, rows.bits, 8,
            bias=self.added, row_scale=None if rows.factor is None else rows.factor[begin:end],
        )  # fmt: skip
        return parts


def largest(scores: Tensor, k: int) -> Tensor:
    """Positions ``[M, k]`` of the ``k`` largest of each row ``[M, n]``, descending; among equals the first.

    As a stable sort of whole rows would have it, at the cost of a few passes; all ``n`` where there are fewer.
    """
    k = min(k, scores.size(1))
    threshold = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > threshold, scores == threshold
    kept = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    position = kept.nonzero()[:, 1].view(-1, k)
    order = scores.gather(1, position).sort(dim=1, descending=True, stable=True).indices
    return position.gather(1, order)
