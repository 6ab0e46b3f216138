"""Activations that calibration saw as zeros, or as 0 and one value, and what later data make of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import CONVS, NODES, OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.nn import GraphConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.quantizers import QLRQuantizer, RangeKind

LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: CONVS[name] for name in ("GCNConv", "GATv2Conv", "SAGEConv", "SAGEConv wider", "SAGEConv max")},
    **{name: CONVS[name] for name in ("GINConv", "APPNP", "SGConv", "SGConv wider", "TAGConv", "LGConv")},
    "GATConv": CONVS["GATConv"],
    "GraphConv": lambda: GraphConv(WIDTH, OUT),
}


class Gated(nn.Module):
    """A layer behind something that passes nothing, or a single value, of ordinary data."""

    def __init__(self, layer: nn.Module, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.gate = layer, gate

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.layer(self.gate(x), edge_index)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: (x - 50).relu(),
    "signed zeros": lambda x: x.sign() * (x.abs() - 50).relu(),
    "one value": lambda x: torch.where(x == x[0, 0], 2.0 * (x > 0), (x - 50).relu()),
    "few values": lambda x: (x.abs() > 1.5) * x.abs().amax(1, keepdim=True).round() * (x.abs() > 1e9) + (x - 50).relu(),
}


@pytest.mark.filterwarnings("ignore:Only zeros reached")
@pytest.mark.parametrize(
    ("name", "gate"), [*((name, gate) for name in LAYERS for gate in ("zeros", "one value")),
                       *(("GCNConv", gate) for gate in ("signed zeros", "few values"))]
)  # fmt: skip
def test_later_data_never_raise(name: str, gate: str) -> None:
    edge_index, x = graph(), features().abs()
    later = x.clone()
    later[::3] += 50
    qmodel = qgnn.quantize_model(Gated(LAYERS[name](), GATES[gate]), 8)
    qmodel = qgnn.calibrate(qmodel, (x, edge_index)).eval()
    assert not any(q.is_zero_one for q in qgnn.quantizers(qmodel).values() if q.is_activation)
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        for given in (x, later):
            expected = qmodel(given, edge_index)
            assert bool(expected.isfinite().all())
            torch.testing.assert_close(packed(given, edge_index), expected, rtol=1e-4, atol=1e-4)
    if gate == "zeros":  # zero stays exact, and what comes within the default range is about right
        plain = qgnn.restore_model(qmodel)
        torch.testing.assert_close(qmodel(x, edge_index), plain(x, edge_index), rtol=0.02, atol=0.02)


def test_a_state_that_starts_with_zeros() -> None:
    class Cell(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.keep, self.take = nn.Linear(WIDTH, OUT), layer

        def forward(self, x: Tensor, edge_index: Tensor, state: Tensor) -> Tensor:
            return torch.tanh(self.take(x, edge_index) + self.keep(state))

    x, edge_index = features(), graph()
    qmodel: Any = qgnn.quantize_model(Cell(CONVS["GCNConv"]()), 8)
    with pytest.warns(UserWarning, match=r"Only zeros reached 'keep\.input' while calibrating"):
        qgnn.calibrate(qmodel, (x, edge_index, torch.zeros(NODES, WIDTH))).eval()
    assert qmodel.keep.input_quantizer.range_kind == RangeKind.ZEROS
    state = torch.rand(NODES, WIDTH) * 1.8 - 0.9
    expected = qgnn.restore_model(qmodel)(x, edge_index, state)
    torch.testing.assert_close(qmodel(x, edge_index, state), expected, rtol=0.1, atol=0.05)
    packed = qgnn.pack_model(qmodel)
    assert torch.equal(packed(x, edge_index, state), qmodel(x, edge_index, state))
    loaded = qgnn.quantize_model(Cell(CONVS["GCNConv"]()), 8).eval()
    loaded.load_state_dict(qmodel.state_dict())
    assert torch.equal(loaded(x, edge_index, state), qmodel(x, edge_index, state))


def test_inputs_that_are_zero_one_stay_one_bit_and_refuse_other_data() -> None:
    x, edge_index = (features() > 1).float(), graph()
    for factor in (1.0, torch.rand(NODES, 1) + 0.5):  # also where the model scales its rows
        qmodel = qgnn.quantize_model(Gated(CONVS["GCNConv"](), lambda x: x * factor), 2)  # noqa: B023
        if isinstance(factor, Tensor):
            qmodel.layer = qgnn.quantize_model(nn.Sequential(nn.Linear(64, 8)), 2)
            qmodel.forward = lambda x, edge_index, m=qmodel: m.layer(m.gate(x))  # type: ignore[misc]
            x = (torch.rand(NODES, 64) > 0.6).float()
        qgnn.calibrate(qmodel, [(x, edge_index)], forward=lambda m, batch: m.forward(*batch))
        assert any(q.is_zero_one for q in qgnn.quantizers(qmodel).values())
        with pytest.raises(ValueError, match="zero or one value"):
            qmodel.eval().forward(x + torch.rand_like(x), edge_index)


def test_the_first_batch_of_training() -> None:
    """What depends on a parameter is no input; zeros wait for the first data that say something."""
    layer: Any = qgnn.quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 4).train()
    hidden = layer[0](torch.randn(6, 4))
    binary = (hidden > 0).float() + 0 * hidden
    layer[1](binary)
    assert layer[1].input_quantizer.range_kind == RangeKind.NONNEGATIVE

    quantizer = QLRQuantizer(4).train()
    assert torch.equal(quantizer(torch.zeros(5, 3)).dequantize(), torch.zeros(5, 3))
    assert quantizer.range_kind == RangeKind.ZEROS
    assert torch.equal(quantizer.eval()(torch.full((2, 3), 9.0)).dequantize(), torch.full((2, 3), 7 / 8))
    assert quantizer.range_kind == RangeKind.ZEROS
    x = 5 * torch.randn(50, 3)
    quantizer.train()(x)
    fresh = QLRQuantizer(4).train()
    assert torch.equal(quantizer(x).dequantize(), fresh(x).dequantize())


@pytest.mark.parametrize("levels", ["affine", "unsigned", "symmetric", "half"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_stay_exact_in_the_default_range(levels: Any, granularity: Any, bits: int) -> None:
    quantizer = QLRQuantizer(bits, levels=levels, granularity=granularity, channels=6)
    quantizer.set_range(torch.zeros(5, 6))
    assert not quantizer.is_zero_one
    assert quantizer.zero_code is not None
    assert not quantizer.eval()(torch.zeros(5, 6)).dequantize().any()
    low, high = (quantizer(torch.full((5, 6), v)).dequantize().detach() for v in (-9.0, 9.0))
    assert float(high.amin()) >= (0.5 if granularity != "node" else 4)
    assert (float(low.amax()) < 0) == (levels != "unsigned")
    out = quantizer.train()(torch.zeros(5, 6)).dequantize()
    assert all(p.grad is None for p in quantizer.parameters())
    out.sum().backward()
    assert all(p.grad is not None for p in quantizer.parameters())  # each stays in the graph


def test_a_channel_of_zeros_takes_the_step_of_the_others() -> None:
    x = torch.randn(40, 6)
    x[:, 2] = 0
    for given in (x, x.abs()):
        quantizer = QLRQuantizer(8, granularity="channel", channels=6)
        quantizer.set_range(given)
        assert not quantizer.eval()(given).dequantize()[:, 2].any()
        later = given.clone()
        later[:, 2] = 1.0
        torch.testing.assert_close(quantizer(later).dequantize()[:, 2], later[:, 2], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("granularity", ["tensor", "node", "channel", "row"])
@pytest.mark.parametrize("stored", [0, 5])
@pytest.mark.filterwarnings("ignore:Only zeros reached", "ignore:Sparse invariant checks")
def test_sparse_features_of_zeros(stored: int, granularity: Any) -> None:
    def sparse(value: float) -> Tensor:
        rows = torch.arange(stored)
        return torch.sparse_coo_tensor(
            torch.stack([rows, rows]), torch.full((stored,), value), (NODES, WIDTH)
        ).to_sparse_csr()

    config = QuantConfig(bits=4, granularity=granularity)
    qmodel = qgnn.quantize_model(CONVS["GCNConv"](), config=config)
    qgnn.calibrate(qmodel, (sparse(0.0), graph())).eval()
    packed = qgnn.pack_model(qmodel)
    for x in (sparse(0.0), sparse(0.7)):
        assert torch.equal(packed(x, graph()), qmodel(x, graph()))
        assert torch.equal(qmodel(x, graph()), qmodel(x.to_dense(), graph()))


def test_weights_of_zeros_are_packed_and_learn() -> None:
    """As of a last layer that starts at zero, or half of an adapter."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    nn.init.zeros_(model[1].weight)
    x = torch.randn(30, 4)
    qmodel: Any = qgnn.calibrate(qgnn.quantize_model(model, 4), [(x,)]).eval()
    assert torch.equal(qgnn.pack_model(qmodel)(x), qmodel(x))
    torch.testing.assert_close(qmodel(x), model[1].bias.expand(30, 2))
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (qmodel.train()(x) - 1).square().mean().backward()
        optimizer.step()
    assert qmodel[1].weight.any()
    fresh = copy.deepcopy(qmodel[1].weight_quantizer)
    fresh.set_range(qmodel[1].weight.detach())
    qmodel.eval()
    assert torch.equal(qgnn.pack_model(qmodel)(x), qmodel(x))
