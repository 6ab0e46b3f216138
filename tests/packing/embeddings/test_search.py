"""The search of packed tables through 16-bit queries finds what float64 products with every row find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qgnn_plugin import PackedEmbeddings
from qgnn_plugin.packing.embeddings import search, topk

ROWS = 6000  # more than are searched by the products with all
FORMS = [(bits, granularity) for bits in (2, 4, 8) for granularity in ("rotated", "node", "tensor")]


def _table(rows: int = ROWS, features: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(40, features, generator=generator)
    of = torch.randint(40, (rows,), generator=generator)
    return (centers[of] + 0.5 * torch.randn(rows, features, generator=generator)).relu()


def _by_all(table: PackedEmbeddings, query: Tensor | PackedEmbeddings, k: int) -> tuple[Tensor, Tensor]:
    return topk._topk_of_all(table, table._packed_query(query), k, 1 << 22)


@pytest.mark.parametrize(("bits", "granularity"), FORMS)
def test_as_by_all_products(bits: int, granularity: str) -> None:
    x = _table()
    table = PackedEmbeddings.from_float(x, bits, granularity=granularity)
    for query in (x[:7] + 0.1, table[:7]):
        scores, index = table.topk(query, 5)
        expected, expected_index = _by_all(table, query, 5)
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
        if granularity != "rotated":  # sums of codes are exact in any order
            assert torch.equal(scores, expected)
            assert torch.equal(index, expected_index)
        assert torch.equal(table.topk(query, 5, chunk=1 << 12)[1], index)


def test_equal_rows_come_in_order() -> None:
    """Each row stands eight times in the table, far from itself."""
    x = _table(ROWS // 8).repeat(8, 1)
    for granularity in ("rotated", "node"):
        table = PackedEmbeddings.from_float(x, 4, granularity=granularity)
        scores, index = table.topk(x[100:103], 8)
        assert torch.equal(scores, scores[:, :1].expand_as(scores))
        assert torch.equal(index[:, 1:] - index[:, :-1], torch.full((3, 7), ROWS // 8))


def test_more_ties_than_candidates() -> None:
    """With a thousand rows at the k-th product, nothing is certain about the candidates: all products are taken."""
    x = _table()
    x[1000:2000] = x[999]
    table = PackedEmbeddings.from_float(x, 8, granularity="node")
    scores, index = table.topk(x[999], 10)
    assert torch.equal(scores, _by_all(table, x[999:1000], 10)[0][0])
    assert torch.equal(index, _by_all(table, x[999:1000], 10)[1][0])


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_far_from_one(factor: float) -> None:
    x = _table() * factor
    table = PackedEmbeddings.from_float(x, 4, granularity="node")
    query = _table(seed=1)[:3]
    assert torch.equal(table.topk(query, 4)[1], _by_all(table, query, 4)[1])


def test_products_are_within_the_bound() -> None:
    """The bound, without which nothing is proven, holds for every product."""
    x = _table()
    for bits, granularity in FORMS:
        table = PackedEmbeddings.from_float(x, bits, granularity=granularity)
        query = table._packed_query(_table(seed=2)[:50] - 0.3)
        rows, planes = topk._search_rows(table), search._Planes(topk._query_weights(table, query))
        index = torch.arange(ROWS).expand(50, -1)
        off = (planes.products(rows, 0, ROWS).double() - topk._candidate_products(table, query, index)).abs().amax(1)
        assert bool((off <= planes.error(rows)).all())


def test_few_queries_take_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way is taken: of ordinary queries none, or next to none, is uncertain."""
    table = PackedEmbeddings.from_float(_table(), 4)
    asked = []
    monkeypatch.setattr(topk, "_topk_of_all", lambda table, query, k, chunk: asked.append(len(query)))
    table.topk(_table(seed=3)[:40], 10)
    assert not asked


def test_many_neighbours_are_not_held_as_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory grows with the neighbours, and not with the codes of these: more than a chunk are never unpacked."""
    table, unpacked = PackedEmbeddings.from_float(_table(), 4, granularity="node"), []
    codes = PackedEmbeddings._codes
    monkeypatch.setattr(
        PackedEmbeddings, "_codes", lambda self, start, stop: unpacked.append(len(self)) or codes(self, start, stop)
    )
    query, chunk = _table(seed=4)[:40], 1 << 13
    for k in (3, 90, 2000):
        assert torch.equal(table.topk(query, k, chunk=chunk)[1], table.topk(query, k)[1])
    unpacked.clear()
    table.topk(query, 90, chunk=chunk)
    assert unpacked
    assert max(unpacked) * table.num_features <= chunk
