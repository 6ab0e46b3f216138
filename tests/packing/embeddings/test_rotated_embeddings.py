"""Rotated embeddings: digits, lengths, bits where they count, search against float64, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qgnn_plugin import PackedEmbeddings
from qgnn_plugin.packing.embeddings.transform import transform_codes


def low_rank(rows: int = 600, width: int = 32, rank: int = 3, seed: int = 0) -> Tensor:
    """Rows near a space of ``rank`` dimensions, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return factors + 0.01 * torch.randn(rows, width, generator=generator) + 1


def recall(table: PackedEmbeddings, x: Tensor, k: int = 10) -> float:
    """Share of the neighbours found that are true ones, ties counted."""
    exact = x[:100].double() @ x.double().t()
    worst = exact.topk(k).values[:, -1:]
    return float((exact.gather(1, table.topk(x[:100], k)[1]) >= worst - 1e-6).double().mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_as_close_as_a_factor_brings_them(bits: int) -> None:
    x = low_rank()
    table = PackedEmbeddings.from_float(x, bits)
    assert table.transform is not None
    values = table.dequantize()
    along = ((x - values) * values).sum(1) / values.square().sum(1)
    torch.testing.assert_close(along, torch.zeros(len(x)), rtol=0, atol=1e-6)  # what is left is at right angles
    plain = PackedEmbeddings.from_float(x, bits, granularity="node")
    full = PackedEmbeddings.from_float(x, bits, granularity="rotated")
    assert full.words.nbytes + full.scale.nbytes == plain.nbytes
    assert table.nbytes <= 1.25 * plain.nbytes
    assert (values - x).square().mean() < 0.5 * (plain.dequantize() - x).square().mean()


@pytest.mark.parametrize("bits", [2, 4])
def test_finds_more_neighbours_than_a_range_per_row(bits: int) -> None:
    x = torch.nn.functional.normalize(low_rank())
    rotated = PackedEmbeddings.from_float(x, bits)
    plain = PackedEmbeddings.from_float(x, bits, granularity="node")
    assert 1 - recall(rotated, x) < 0.6 * (1 - recall(plain, x))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_digits_are_those_of_the_coordinates(bits: int) -> None:
    x = low_rank(rows=50, width=9)
    codes, factors, transform = transform_codes(x, bits, 32)
    assert codes.shape == (50, transform.num_codes)
    assert transform.num_codes <= 9 + 32 // bits
    assert int(codes.max()) < 2**bits
    assert bool((factors > 0).all())
    # Every digit again, by hand: coordinates to the nearest level of their direction, then base 2^b.
    steps = transform.directions.double().norm(dim=1)
    units = transform.directions.double() / steps[:, None]
    coordinates = (x.double() - transform.center.double()) @ units.t() / steps
    start = 0
    for k, count in enumerate(transform.digits.tolist()):
        level = (coordinates[:, k] + 0.5).floor().clamp(0, 2 ** (bits * count) - 1)
        found = torch.zeros(50, dtype=torch.float64)
        for digit in codes[:, start : start + count].t():
            found = found * 2**bits + digit
        assert (found - level).abs().max() <= 1  # rounding of float32 directions
        start += count


@pytest.mark.parametrize("chunk", [1, 64, 1 << 22])
def test_search_is_that_of_the_dequantized_rows(chunk: int) -> None:
    x = low_rank(rows=70, width=13)
    table, query = PackedEmbeddings.from_float(x, 4, granularity="rotated"), torch.randn(5, 13)
    products = query.double() @ table.dequantize().double().t()
    scores, index = table.topk(query, 6, chunk=chunk)
    torch.testing.assert_close(scores, products.topk(6).values, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores, products.gather(1, index), rtol=1e-4, atol=1e-3)
    single = table.topk(query[0], 6, chunk=chunk)
    assert torch.equal(single[1], index[0])
    packed = table.topk(table[:5], 6, chunk=chunk)
    torch.testing.assert_close(packed[0], table.topk(table.dequantize()[:5], 6)[0])
    other = PackedEmbeddings.from_float(x, 8, granularity="node")
    assert other.topk(table[:3], 2)[1].shape == table.topk(other[:3], 2)[1].shape == (3, 2)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(400, 8) + 2.5,  # one point
        torch.randn(400, 1),
        torch.cat([torch.zeros(3, 8), low_rank(400, 8)]),  # rows of length 0
        torch.randn(400, 1) * torch.ones(1, 8),  # one direction
        low_rank(400, 8) * torch.logspace(-6, 6, 400)[:, None],
    ],
    ids=["point", "column", "zeros", "line", "lengths"],
)
@pytest.mark.parametrize("bits", [2, 8])
def test_degenerate(x: Tensor, bits: int) -> None:
    table = PackedEmbeddings.from_float(x, bits, granularity="rotated")
    values = table.dequantize()
    assert values.shape == x.shape
    assert bool(values.isfinite().all())
    if table.transform is not None:
        # No row is further away than zeros are.
        assert bool(((values - x).norm(dim=1) <= 1.0001 * x.norm(dim=1) + 1e-6 * float(x.abs().max())).all())
    assert table.topk(x[:4], 3)[1].shape == (4, 3)


def test_small_tables_stay_as_they_were() -> None:
    assert PackedEmbeddings.from_float(torch.randn(30, 16), 4).transform is None
    binary = (torch.rand(900, 16) < 0.5).float()
    assert PackedEmbeddings.from_float(binary, 4).bits == 1


def test_file_device_and_rows(tmp_path: Path) -> None:
    table = PackedEmbeddings.from_float(low_rank(), 2)
    table.save(tmp_path / "table.safetensors")
    for mmap in (False, True):
        loaded = PackedEmbeddings.load(tmp_path / "table.safetensors", mmap=mmap)
        assert loaded.dequantize().equal(table.dequantize())
        assert repr(loaded) == repr(table)
        assert "rotated" in repr(table)
    assert (tmp_path / "table.safetensors").stat().st_size < table.nbytes + 2000
    rows = torch.tensor([3, 0, 3])
    assert table[rows].words.equal(table.words[rows])
    torch.testing.assert_close(table[rows].dequantize(), table.dequantize()[rows])
    assert table.to("cpu").dequantize().equal(table.dequantize())


def test_what_does_not_fit_is_refused() -> None:
    table = PackedEmbeddings.from_float(low_rank(), 2)
    assert table.transform is not None
    with pytest.raises(ValueError, match="32 features"):
        table.topk(torch.randn(31), 1)
    with pytest.raises(ValueError, match="transform of 31 features"):
        PackedEmbeddings(table.words, table.scale, table.lower, 31, 2, table.transform)
    with pytest.raises(ValueError, match=r"\[600, 1\]"):
        PackedEmbeddings(table.words, table.scale[:4], table.lower, 32, 2, table.transform)
    with pytest.raises(ValueError, match="finite"):
        PackedEmbeddings.from_float(torch.full((500, 8), float("nan")), 2)
