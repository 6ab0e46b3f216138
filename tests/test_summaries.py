"""summary: a row per layer, with figures that can be checked by hand."""

import copy
from typing import Any

import pytest
import torch
from core.support import OUT, WIDTH, Plain, features, graph, quantized
from torch import nn
from torch_geometric.nn import APPNP, GAT, GCN, ARMAConv, FiLMConv, GATv2Conv, GCNConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.summaries import LayerReport, model_bytes


def rows(model: nn.Module) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in qgnn.summary(model).layers}  # type: ignore[union-attr,misc]


def test_every_converted_layer_has_a_row() -> None:
    qmodel = quantized(Plain(), features(), graph(), bits=4)
    table = rows(qmodel)
    assert list(table) == [n for n, m in qmodel.named_modules() if isinstance(m, qgnn.QuantizedLayer)]
    assert table["convs.0"].type == "GCNConv"
    assert table["heads.main"].type == "Linear"
    assert table["encoder"].bits == {"input": 4, "weight": 4}
    assert table["convs.0"].bits == {"message": 4}
    assert table["convs.1"].bits == {"argument_quantizers.x": 4}
    text = str(qgnn.summary(qmodel))
    assert repr(qgnn.summary(qmodel)) == text
    covered = str(qgnn.summary(qmodel).coverage)  # type: ignore[union-attr]
    assert text.endswith(covered)
    assert len(text.splitlines()) == len(table) + 3 + len(covered.splitlines())
    for name in table:
        assert name in text


def test_widths_of_every_site() -> None:
    config = QuantConfig(bits=4, input_bits=8, attention_bits=2, message_bits=32, output_bits=8)
    x = (features() > 0.5).float()
    qmodel = quantized(GAT(WIDTH, 8, 2, OUT), x, graph(), config=config)
    table = rows(qmodel)
    assert table["convs.0"].bits == {"message": 32, "attention": 2}
    assert table["convs.1"].bits == {"message": 32, "output": 8, "attention": 2}
    assert table["convs.0.lin"].bits == {"input": 1, "weight": 4}  # 0/1 features
    assert table["convs.1.lin"].bits == {"input": 4, "weight": 4}
    steps = rows(quantized(APPNP(2, 0.1), features(), graph(), bits=4))[""].bits
    assert steps == {"input": 4, "step_quantizers.0": 4, "step_quantizers.1": 4, "gap": 4}


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_bytes_by_hand(bits: int) -> None:
    """Rows of whole words; a step for each range, a lower end where zero does not give it, a unit of multiples."""
    linear = nn.Linear(70, 9)
    qmodel = quantized(linear, torch.randn(5, 70), bits=bits)
    report = qgnn.summary(qmodel)
    assert report.float_bytes == 4 * (70 * 9 + 9)  # type: ignore[union-attr]
    weights = 4 * 70 * 9 if bits == 32 else 4 * 9 * -(-70 * bits // 32) + 4 * 9
    ranges = 0 if bits == 32 else 12
    assert report.packed_bytes == weights + 4 * 9 + ranges  # type: ignore[union-attr]
    assert model_bytes(qmodel) == report.packed_bytes  # type: ignore[union-attr]
    assert model_bytes(linear) == 4 * (70 * 9 + 9)


def test_bytes_of_the_rest_of_the_model_stay() -> None:
    """Norms, unconverted layers and a layer's own buffers are counted as they are; ranges are not float bytes."""
    model = Plain()
    model.convs[1].register_buffer("own", torch.zeros(100))
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    report = qgnn.summary(quantized(model, features(), graph(), bits=8))
    assert report.float_bytes == size  # type: ignore[union-attr]
    assert model_bytes(model) == size
    partly = qgnn.quantize_model(model, 8, include="encoder")
    saved = 4 * WIDTH * 8 - (4 * 8 * 3 + 4 * 8) - 12
    assert qgnn.summary(partly).packed_bytes == size - saved  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [{}, {"granularity": "node"}, {"weight_levels": "affine", "bits": 8}, {"bits": 2}])
@pytest.mark.parametrize(
    "conv", [GCNConv(WIDTH, OUT), GATv2Conv(WIDTH, 4, 2), APPNP(3, 0.1), ARMAConv(WIDTH, OUT), FiLMConv(WIDTH, 3)],
    ids=lambda conv: type(conv).__name__,
)  # fmt: skip
def test_bytes_are_those_of_the_packed_model(conv: nn.Module, settings: dict[str, Any]) -> None:
    qmodel = quantized(conv, features(), graph(), config=QuantConfig(**settings))
    packed = qgnn.packed_bytes(qgnn.pack_model(qmodel))
    report = qgnn.summary(qmodel)
    assert (report.float_bytes, report.packed_bytes) == packed  # type: ignore[union-attr]


class _HalfUsed(nn.Module):
    """A convolution, and layers that its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused, self.attention = GCNConv(WIDTH, OUT), nn.Linear(WIDTH, OUT), nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.conv(x, edge_index)


def test_layers_that_no_data_reach_keep_their_bytes() -> None:
    """Packing leaves them as they are; before any data nobody knows which these are."""
    fresh = qgnn.quantize_model(_HalfUsed(), 4)
    assert rows(fresh)["unused"].packed_bytes < rows(fresh)["unused"].float_bytes / 2
    qmodel = quantized(_HalfUsed(), features(), graph(), bits=4)
    assert rows(qmodel)["unused"].packed_bytes == rows(qmodel)["unused"].float_bytes
    with pytest.warns(UserWarning, match="attention"):
        packed = qgnn.packed_bytes(qgnn.pack_model(qmodel))
    report = qgnn.summary(qmodel)
    assert (report.float_bytes, report.packed_bytes) == packed  # type: ignore[union-attr]


def test_ranges_and_errors() -> None:
    x = features() - 3
    config = QuantConfig(bits=8, granularity="tensor", weight_granularity="tensor")
    layer = quantized(nn.Linear(WIDTH, OUT), x, config=config)
    row = rows(layer)[""]
    low, high = row.ranges["input"]
    assert low == pytest.approx(float(x.min()), rel=0.1)
    assert high == pytest.approx(float(x.max()), rel=0.5)
    low, high = row.ranges["weight"]
    assert low == pytest.approx(-high, rel=1e-5)
    made = layer.weight_quantizer(layer.weight).dequantize()  # type: ignore[operator]
    expected = (made - layer.weight).norm() / layer.weight.norm()  # type: ignore[operator]
    assert row.weight_error == pytest.approx(float(expected))
    assert 0 < row.weight_error < 0.01
    errors = [rows(quantized(nn.Linear(WIDTH, OUT), x, bits=b))[""].weight_error for b in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert qgnn.range_parameters(layer)[0].grad is None


def test_constraint_and_multiplier() -> None:
    qconv = qgnn.quantize_model(GCNConv(WIDTH, OUT), 4)
    qgnn.calibrate(qconv, (features(), graph()))
    assert rows(qconv)[""].constraint is None
    qconv.train()(features(), graph())
    qconv.multiplier.fill_(0.25)
    row = rows(qconv)[""]
    assert row.constraint == qconv.constraint
    assert row.multiplier == 0.25
    without = qgnn.quantize_model(GCNConv(WIDTH, OUT), config=QuantConfig(smp=None))
    assert rows(without)[""].multiplier is None


def test_before_calibration_and_without_changing_anything() -> None:
    qmodel = qgnn.quantize_model(GCN(WIDTH, 8, 2, OUT), 4)
    row = rows(qmodel)["convs.0.lin"]
    assert row.ranges == {}
    assert row.weight_error is None
    qgnn.calibrate(qmodel, (features(), graph())).eval()
    before = copy.deepcopy(qmodel.state_dict())
    qgnn.summary(qmodel)
    assert all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())


def test_plain_models_are_refused() -> None:
    with pytest.raises(ValueError, match="made by quantize_model"):
        qgnn.summary(nn.Linear(2, 2))
