"""Rows that are integer multiples of one range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.support import NODES, OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, MessagePassing, SAGEConv, TransformerConv

import qgnn_plugin as qgnn
from qgnn_plugin import QLRQuantizer, QuantConfig
from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER
from qgnn_plugin.packing.layers.ranges import PackedTensor
from qgnn_plugin.quantizers import search_range
from qgnn_plugin.quantizers.rows import RowSample, multipliers, search_rows


def uneven(rows: int = 60, columns: int = 12) -> Tensor:
    """Rows whose magnitudes span two orders."""
    return torch.randn(rows, columns) * torch.logspace(-1, 1, rows).unsqueeze(1)


def fitted(x: Tensor, bits: int = 4, **options: Any) -> QLRQuantizer:
    quantizer = QLRQuantizer(bits, granularity="row", **options)
    quantizer.set_range(x)
    return quantizer.eval()


def error(x: Tensor, bits: int, **options: Any) -> float:
    quantizer = QLRQuantizer(bits, **options)
    quantizer.set_range(x)
    return float((quantizer.eval()(x).dequantize() - x).detach().norm() / x.norm())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("levels", ["affine", "half", "symmetric"])
def test_rows_are_nearly_as_accurate_as_a_float_per_node(levels: Any, bits: int) -> None:
    x = uneven()
    row, node, tensor = (error(x, bits, levels=levels, granularity=g) for g in ("row", "node", "tensor"))
    assert row < 1.2 * node
    assert row < 0.9 * tensor


def test_every_row_is_a_whole_multiple_of_one_range() -> None:
    x = uneven()
    quantizer = fitted(x)
    quantized = quantizer(x)
    assert quantized.rows is not None
    multiplier, scale, lower = quantized.rows
    assert quantizer.unit is not None
    expected = (x.abs().amax(1, keepdim=True) / quantizer.unit).ceil().clamp(1, LARGEST_MULTIPLIER)
    assert torch.equal(multiplier, expected)
    assert len(multiplier.unique()) > 5
    assert torch.equal(quantized.scale, scale * multiplier)
    assert torch.equal(quantized.lower, lower * multiplier)
    assert not multiplier.requires_grad
    assert scale.requires_grad


def test_rows_that_calibration_did_not_see() -> None:
    x = uneven()
    quantizer = fitted(x)
    before = quantizer.unit.clone()  # type: ignore[union-attr]
    unseen = torch.cat([torch.zeros(1, 12), 100 * x[-1:], 1e-6 * x[:1]])
    quantized = quantizer(unseen)
    assert quantized.rows is not None
    assert quantized.rows.multiplier.flatten().tolist() == [1, LARGEST_MULTIPLIER, 1]
    assert quantized.dequantize().isfinite().all()
    quantizer.train()(uneven() * 7)
    assert torch.equal(quantizer.unit, before)  # type: ignore[arg-type]


def test_unit_and_range_are_the_best_pair_on_a_grid() -> None:
    """Of all of 12 units with ranges of 400 sizes no pair is much better than what the search finds."""
    x = uneven(200)
    peaks = x.abs().amax(1, keepdim=True)
    unit, scale, lower = search_rows(torch.stack([x.flatten(), peaks.expand_as(x).flatten()]), 3, 1.5)

    def squared(unit: Tensor, scale: Tensor, lower: Tensor) -> Tensor:
        m = multipliers(peaks, unit)
        codes = ((x / m - lower) / scale + 0.5).floor().clamp(0, 3)
        return (m * (codes * scale + lower) - x).square().mean()

    found = squared(unit, scale, lower)
    candidates = []
    for i in range(12):
        other = peaks.amax() / LARGEST_MULTIPLIER / 2 ** (i / 2)
        top = (x / multipliers(peaks, other)).abs().amax() * 2 / 3
        for shrink in torch.linspace(0.02, 1, 400):
            candidates.append(squared(other, shrink * top, -1.5 * shrink * top))
    assert found <= 1.02 * torch.stack(candidates).min()


def test_equal_rows_have_the_range_of_the_tensor() -> None:
    x = torch.randn(50, 12).clamp(-2, 2)
    x[:, 0] = 2
    scale, _ = search_range(x.reshape(1, -1), 15, 7.5)
    quantizer = fitted(x, levels="half")
    m = quantizer(x).rows.multiplier  # type: ignore[union-attr]
    assert len(m.unique()) == 1
    torch.testing.assert_close(quantizer.log_scale.exp() * m[0, 0], scale[0], rtol=0.02, atol=0)


def test_sample_of_pairs_keeps_peaks_with_their_rows() -> None:
    sample = RowSample()
    for _ in range(3):
        x = uneven(4000, 16)
        sample.add(torch.stack([x.flatten(), x.abs().amax(1, keepdim=True).expand_as(x).flatten()]))
    values, peaks = sample.rows()
    assert values.numel() < 70_000
    assert (values.abs() <= peaks).all()
    assert values.abs().max() == peaks.max()


def test_unit_is_saved(tmp_path: Any) -> None:
    quantizer = fitted(uneven())
    other = QLRQuantizer(4, granularity="row")
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.unit, quantizer.unit)  # type: ignore[arg-type]
    assert "unit" not in QLRQuantizer(4).state_dict()
    with pytest.raises((ValueError, RuntimeError), match="granularity='row'"):
        other.load_state_dict(QLRQuantizer(4).state_dict())


def test_heads_of_a_node_share_a_multiplier() -> None:
    x = uneven(NODES, 12).view(NODES, 3, 4)
    quantizer = fitted(x, row_dims=2)
    quantized = quantizer(x)
    assert quantized.scale.shape == (NODES, 1, 1)
    flat = QLRQuantizer(4, granularity="row")
    flat.load_state_dict(quantizer.state_dict())
    assert torch.equal(flat.eval()(x.flatten(1)).codes, quantized.codes.flatten(1))


def test_sites_without_rows_have_one_range() -> None:
    """Largest values, what a model returns, weights and the correction's own site."""
    config = QuantConfig(bits=4, granularity="row", output_bits=8)
    model = nn.ModuleDict({"max": SAGEConv(WIDTH, OUT, aggr="max"), "mean": SAGEConv(WIDTH, OUT)})
    qmodel: Any = qgnn.quantize_model(model, config=config)
    assert qmodel["max"].input_quantizer.granularity == "tensor"
    assert qmodel["mean"].input_quantizer.granularity == "row"
    assert qmodel["mean"].message_quantizer.granularity == "row"
    assert qmodel["mean"].output_quantizer.granularity == "tensor"
    assert qmodel["mean"].lin_l.weight_quantizer.granularity == "channel"


@pytest.mark.parametrize("aggr", ["max", "min"])
def test_a_layer_that_picks_values_has_one_range(aggr: str) -> None:
    """Codes of different multiples of a range do not compare as the values do."""

    class Pick(MessagePassing):
        def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
            return self.propagate(edge_index, score=x)

        def message(self, score_j: torch.Tensor) -> torch.Tensor:
            return score_j

    qconv = qgnn.quantize_model(Pick(aggr=aggr), bits=2)
    x, edge_index = torch.randn(40, 16), torch.randint(40, (2, 300))
    out = qgnn.calibrate(qconv, (x, edge_index)).eval()(x, edge_index)
    assert out.unique().numel() <= 2**2 + 1  # and zero, of a node without neighbours
    assert torch.equal(qgnn.pack_model(qconv)(x, edge_index), out)


def test_one_bit_features_stay_in_one_bit() -> None:
    x = (torch.rand(30, 200) < 0.1).float()
    quantizer = fitted(x)
    assert quantizer.is_zero_one
    assert quantizer(x).rows is None
    assert torch.equal(quantizer(x).dequantize(), x)


@pytest.mark.parametrize("build", [GCNConv, SAGEConv, GATConv, TransformerConv], ids=lambda c: c.__name__)
def test_layers_train_and_compile_as_one_graph(build: Any) -> None:
    conv = build(WIDTH, OUT, heads=2) if build in (GATConv, TransformerConv) else build(WIDTH, OUT)
    qconv = qgnn.quantize_model(conv, config=QuantConfig(bits=4, granularity="row"))
    args = features(), graph()
    qgnn.calibrate(qconv, args)
    out = qconv.train()(*args)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in qconv.parameters())
    qconv.eval()
    with torch.no_grad():
        expected = qconv(*args)
        compiled = torch.compile(qconv, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*args), expected, rtol=1e-5, atol=1e-5)


def test_packed_rows_hold_a_byte_each() -> None:
    x, edges = features(), graph()
    qmodel: Any = qgnn.quantize_model(GCNConv(WIDTH, OUT), config=QuantConfig(bits=2, granularity="row"))
    qgnn.calibrate(qmodel, (x, edges))
    packed: Any = qgnn.pack_model(qmodel)
    sent = packed.message_quantizer(x[:, :OUT].contiguous())
    assert isinstance(sent, PackedTensor)
    assert sent.multiplier is not None
    assert sent.multiplier.dtype == torch.uint8
    assert sent.multiplier.shape == (NODES,)
    expected = qmodel.eval().message_quantizer(x[:, :OUT])
    assert torch.equal(sent.dequantize(), expected.dequantize().detach())
    assert torch.equal(sent.rows(3, 9).dequantize(), sent.dequantize()[3:9])
    picked = torch.tensor([5, 0, 5])
    assert torch.equal(sent.take(picked).dequantize(), sent.dequantize()[picked])
