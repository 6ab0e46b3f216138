"""``PackedEmbeddings`` against float64 brute force on the dequantized values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing.cases import packed_pair
from torch import Tensor

import qgnn_plugin
from qgnn_plugin import PackedEmbeddings


def brute_force(query: PackedEmbeddings, table: PackedEmbeddings) -> Tensor:
    """All products ``[M, N]`` of the dequantized values in float64."""

    def values(e: PackedEmbeddings) -> Tensor:
        codes = qgnn_plugin.kernels.layout.unpack_codes(e.words, e.num_features, e.bits)
        return codes.double() * e.scale.double() + e.lower.double()

    return values(query) @ values(table).t()


def test_a_range_per_node_keeps_short_rows_apart() -> None:
    x = torch.randn(50, 16) * torch.logspace(-4, 4, 50).unsqueeze(1) + 0.3
    for bits in (2, 4, 8):
        table = PackedEmbeddings.from_float(x, bits)
        assert table.scale.shape == table.lower.shape == (50, 1)
        error = (table.dequantize() - x).abs()
        span = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        # Half a step inside the range, and the best range costs no more than the whole one does.
        worst = (span / (2**bits - 1) / 2).square() * 16
        assert (error.square().sum(1, keepdim=True) <= worst * 1.01).all()
    # A float query has 8 bits of its own: its products are those of the float row but for half a step.
    table = PackedEmbeddings.from_float(x, 2)
    scores, index = table.topk(x[:7], 5)
    exact = x[:7].double() @ table.dequantize().double().t()
    assert torch.equal(index, exact.topk(5).indices)
    torch.testing.assert_close(scores, exact.gather(1, index), rtol=1e-2, atol=0)
    some = torch.tensor([4, 0, 4])
    assert torch.equal(table[some].dequantize(), table.dequantize()[some])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nodes=st.integers(1, 60),
    width=st.integers(1, 70),
    bits=st.sampled_from([2, 4, 8]),
    queries=st.integers(1, 9),
    chunk=st.sampled_from([1, 64, 1 << 22]),
    granularity=st.sampled_from(["node", "tensor"]),
    data=st.data(),
)
def test_topk(
    nodes: int, width: int, bits: int, queries: int, chunk: int, granularity: str, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, nodes))
    table = PackedEmbeddings.from_float(torch.randn(nodes, width) + 0.5, bits, granularity=granularity)
    query = PackedEmbeddings.from_float(torch.randn(queries, width), bits, granularity=granularity)
    scores, index = table.topk(query, k, chunk=chunk)
    products = brute_force(query, table)
    torch.testing.assert_close(scores, products.gather(1, index), rtol=1e-12, atol=1e-9)
    best = products.sort(1, descending=True).values[:, :k]
    torch.testing.assert_close(scores, best, rtol=1e-12, atol=1e-9)
    again = table.topk(query, k)
    assert torch.equal(scores, again[0])
    assert torch.equal(index, again[1])


def test_ties_take_the_lower_index() -> None:
    table = PackedEmbeddings.from_codes(
        torch.tensor([[1, 2], [3, 0], [1, 2], [3, 0]]), torch.tensor(0.5), torch.tensor(0.0), 2
    )
    for chunk in (1, 4, 1000):
        for k in (1, 2, 3, 4):
            scores, index = table.topk(torch.tensor([1.0, 0.0]), k, chunk=chunk)
            assert index.tolist() == [1, 3, 0, 2][:k]
            assert scores.tolist() == [1.5, 1.5, 0.5, 0.5][:k]


def test_float_queries_are_quantized_to_the_range() -> None:
    x = torch.nn.functional.normalize(torch.randn(30, 16))
    table = PackedEmbeddings.from_float(x, 8, granularity="tensor")
    assert table.scale.numel() == 1
    _, index = table.topk(x[:5], 3)
    assert index[:, 0].tolist() == list(range(5))
    assert torch.equal(table.topk(x[0], 3)[1], index[0])
    assert (table.dequantize() - x).abs().max() <= table.scale
    assert table.nbytes < x.numel() * 4 / 3.5
    assert table.topk(x[:0], 3)[0].shape == (0, 3)


@pytest.mark.parametrize("truncation", [None, "sbt"])
def test_from_model_loses_nothing(truncation: str | None) -> None:
    qmodel, packed, args = packed_pair("gcn", bits=4, output_bits=2, truncation=truncation)
    for model in (packed, qmodel):
        table = PackedEmbeddings.from_model(model, *args)
        assert table.bits == 2
        assert torch.equal(table.dequantize(), packed(*args))


def test_file(tmp_path: Path) -> None:
    table = PackedEmbeddings.from_float(torch.randn(30, 16), 4)
    path = tmp_path / "table.safetensors"
    table.save(path)
    loaded = PackedEmbeddings.load(path)
    assert torch.equal(loaded.dequantize(), table.dequantize())
    assert repr(loaded) == repr(table)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        PackedEmbeddings.load(path)


def test_one_bit_data() -> None:
    binary = (torch.rand(20, 40) < 0.5).float()
    assert PackedEmbeddings.from_float(binary).bits == 1
    assert torch.equal(PackedEmbeddings.from_float(binary).dequantize(), binary)
    rows = binary * torch.rand(20, 1)
    for granularity in ("node", "tensor"):
        table = PackedEmbeddings.from_float(rows, granularity=granularity)
        assert table.bits == 1
        assert torch.equal(table.dequantize(), rows)


def test_errors() -> None:
    table = PackedEmbeddings.from_float(torch.randn(5, 3))
    for k in (0, 6):
        with pytest.raises(ValueError, match="between 1 and 5"):
            table.topk(torch.randn(3), k)
    with pytest.raises(ValueError, match="3 features"):
        table.topk(torch.randn(4), 1)
    with pytest.raises(ValueError, match="finite"):
        table.topk(torch.full((3,), float("nan")), 1)
    with pytest.raises(ValueError, match="'auto', 'rotated', 'node' or 'tensor'"):
        PackedEmbeddings.from_float(torch.randn(3, 3), granularity="channel")
    with pytest.raises(ValueError, match=r"\[5, 1\]"):
        PackedEmbeddings(table.words, table.scale[:4], table.lower, 3, 8)
    with pytest.raises(ValueError, match="float matrix"):
        PackedEmbeddings.from_float(torch.randn(3))
    with pytest.raises(ValueError, match="output_bits"):
        PackedEmbeddings.from_model(packed_pair("gcn", bits=4)[1])
