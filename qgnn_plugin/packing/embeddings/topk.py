"""The nearest rows of a table of embeddings: all products of a small one, few of a large one (see :mod:`.search`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.layout import unpack_codes
from .search import Rows, Weights, candidates, largest, nearest
from .table import PackedTable

__all__ = ["topk"]

MOST_QUERIES = 256  # at a time: with more, too few rows of the table are
SMALL = 4096  # rows of a table whose products are all taken in float64

Query = PackedTable | Tensor  # codes with their range, or float32 rows for a table that is rotated


def topk(table: PackedTable, query: Query, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """See :meth:`.embeddings.PackedEmbeddings.topk`; of queries ``[M, F]``."""
    # Those of a block of the table, or of the candidates, are as many codes as are unpacked at a time.
    queries = max(1, min(MOST_QUERIES, chunk // max(1, table.num_features), chunk // _candidate_codes(table, k)))
    blocks = (query[begin : begin + queries] for begin in range(0, len(query), queries))
    parts = [_block_topk(table, block, k, chunk) for block in blocks] or [_empty(table, k)]
    scores, index = (torch.cat(part) for part in zip(*parts, strict=True))
    return scores, index


def _empty(table: PackedTable, k: int) -> tuple[Tensor, Tensor]:
    device = table.words.device
    scores = torch.zeros((0, k), dtype=torch.float64, device=device)
    return scores, torch.zeros((0, k), dtype=torch.int64, device=device)


def _block_topk(table: PackedTable, query: Query, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    rows = _search_rows(table)
    if len(table) < SMALL or not rows.is_fast or _candidate_codes(table, k) > chunk:
        return _topk_of_all(table, query, k, chunk)
    weights = _query_weights(table, query)
    block = max(1, chunk // (2 * max(1, len(query), table.num_features)))
    scores, index, unsure = nearest(rows, weights, k, block, lambda index: _candidate_products(table, query, index))
    if bool(unsure.any()):
        scores[unsure], index[unsure] = _topk_of_all(table, query[unsure], k, chunk)
    return scores, index


def _candidate_codes(table: PackedTable, k: int) -> int:
    """How many codes the candidates of one query have."""
    return candidates(k) * max(1, table._num_codes)


def _search_rows(table: PackedTable) -> Rows:
    if table.transform is None:
        return Rows(table.words, table.scale, table.lower, None, table.num_features, table.bits)
    one, zero = table.scale.new_ones(()), table.scale.new_zeros(())
    return Rows(table.words, one, zero, table.scale.flatten(), table._num_codes, table.bits)


def _query_weights(table: PackedTable, query: Query) -> Weights:
    if not isinstance(query, Tensor):
        codes = query._codes(0, len(query)).double()
        values = codes * query.scale.double() + query.lower.double()
        return Weights(values, values.new_zeros(len(query)))
    assert table.transform is not None
    query = query.double()
    return Weights(query @ table.transform.basis().t(), query @ table.transform.center.double())


def _candidate_products(table: PackedTable, query: Query, index: Tensor) -> Tensor:
    """Dot products ``[M, c]`` float64 of each query with the rows ``index`` ``[M, c]``, each row's in one order."""
    found = table[index.flatten()]
    codes = found._codes(0, len(found)).double().view(*index.shape, -1)
    ends = (found.scale.double(), found.lower.double())
    scale, lower = (t.view(index.shape) if t.dim() == 2 else t for t in ends)
    if isinstance(query, Tensor):
        weights = _query_weights(table, query)
        return ((codes * weights.of_codes.unsqueeze(1)).sum(-1) + weights.added.unsqueeze(1)) * scale
    asked = query._codes(0, len(query)).double()
    sums = (codes * asked.unsqueeze(1)).sum(-1), asked.sum(1, keepdim=True), codes.sum(-1)
    return _ranged(query, sums, scale, lower)


def _topk_of_all(table: PackedTable, query: Query, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """By the products with every row, in float64."""
    best: tuple[Tensor, Tensor] | None = None
    # A block of products is as large as a block of codes.
    rows = max(1, chunk // max(1, table.num_features, len(query)))
    for begin in range(0, len(table), rows):
        part = table[begin : begin + rows]
        scores = _rotated_products(part, query) if isinstance(query, Tensor) else _products(query, part)
        index = torch.arange(begin, begin + scores.size(1), device=scores.device).expand_as(scores)
        if best is not None:
            scores, index = torch.cat([best[0], scores], 1), torch.cat([best[1], index], 1)
        # Candidates are in ascending order of index among equals: ties are deterministic.
        order = largest(scores, k)
        best = scores.gather(1, order), index.gather(1, order)
    assert best is not None
    return best


def _products(table: PackedTable, other: PackedTable) -> Tensor:
    """Dot products ``[M, N]`` float64 with ``other``: the sums of codes are integers, exact up to ``2^53``."""
    a, c = (unpack_codes(e.words, e.num_features, e.bits).double() for e in (table, other))
    scale, lower = (t.double().reshape(1, -1) for t in (other.scale, other.lower))
    return _ranged(table, (a @ c.t(), a.sum(1, keepdim=True), c.sum(1)), scale, lower)


def _ranged(table: PackedTable, sums: tuple[Tensor, Tensor, Tensor], s_c: Tensor, l_c: Tensor) -> Tensor:
    """Sums of codes, of their products, of one's own ``[M, 1]`` and of others', with the ranges of both."""
    product, own, others = sums
    s_a, l_a = (t.double().reshape(-1, 1) for t in (table.scale, table.lower))
    total = product * (s_a * s_c)
    total += own * (s_a * l_c) + others * (l_a * s_c)
    return total + table.num_features * (l_a * l_c)


def _rotated_products(table: PackedTable, query: Tensor) -> Tensor:
    """Dot products ``[M, N]`` float64 of queries ``[M, F]`` with rotated embeddings."""
    assert table.transform is not None
    query = query.double()
    products = (query @ table.transform.basis().t()) @ table._codes(0, len(table)).double().t()
    return (products + (query @ table.transform.center.double()).unsqueeze(1)) * table.scale.double().t()
