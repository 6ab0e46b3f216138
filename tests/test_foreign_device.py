"""Everything stays on the model's device, whichever that is: no tensor of the CPU slips in."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_device import DEVICE, ForeignTensor, foreign_device, waits
from torch import Tensor, nn
from torch_geometric.nn import (
    APPNP,
    ChebConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GraphConv,
    ResGatedGraphConv,
    SAGEConv,
    SGConv,
    TAGConv,
    TransformerConv,
)

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import use_backend

NODES, EDGES, FEATURES, CLASSES = 40, 200, 24, 8


def _mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))


CONVS: dict[str, Callable[[int, int], nn.Module]] = {
    "GCN": GCNConv,
    "SAGE": SAGEConv,
    "SAGE, max": lambda a, b: SAGEConv(a, b, aggr="max"),
    "GAT": lambda a, b: GATConv(a, b // 4, heads=4),
    "GATv2": lambda a, b: GATv2Conv(a, b // 4, heads=4),
    "GIN": lambda a, b: GINConv(_mlp(a, b)),
    "GraphConv": GraphConv,
    "Transformer": lambda a, b: TransformerConv(a, b // 4, heads=4),
    "SG": SGConv,
    "Cheb": lambda a, b: ChebConv(a, b, 2),
    "TAG": TAGConv,
    "ResGated": ResGatedGraphConv,
}
CONFIGS = {
    "plain": qgnn.QuantConfig(bits=4),
    "smooth": qgnn.QuantConfig(bits=2, smp=qgnn.SMPConfig(alpha=0.5)),
    "accurate": qgnn.QuantConfig.accurate(4),
}


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.norm, self.second = CONVS[name](FEATURES, 32), nn.BatchNorm1d(32), CONVS[name](32, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x, edge_index)).relu(), edge_index)


class Propagation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.propagate = nn.Linear(FEATURES, CLASSES), APPNP(3, 0.1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(self.lin(x), edge_index)


def build(name: str) -> nn.Module:
    return Propagation() if name == "APPNP" else Model(name)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(NODES, FEATURES), torch.randint(NODES, (2, EDGES))


def held(value: Tensor) -> Tensor:
    assert isinstance(value, ForeignTensor)
    return value.held.detach()


def train_once(model: nn.Module, x: Tensor, edge_index: Tensor, y: Tensor, compress: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    model.train()
    with qgnn.compressed_activations() if compress else nullcontext():
        loss = nn.functional.cross_entropy(model(x, edge_index), y)
    loss.backward()
    qgnn.differential_multiplier_step(model)
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("name", [*CONVS, "APPNP"])
@pytest.mark.parametrize("config", CONFIGS)
def test_inference(name: str, config: str) -> None:
    """Converted, calibrated and packed there: the same result as here."""
    model, (x, edge_index) = build(name).eval(), data()

    def packed(model: nn.Module, x: Tensor, edge_index: Tensor) -> Tensor:
        model = qgnn.quantize_model(model, config=CONFIGS[config])
        qgnn.calibrate(model, (x, edge_index), method="ranges")
        return qgnn.pack_model(model)(x, edge_index)

    with torch.no_grad(), use_backend("torch"):
        expected = packed(copy.deepcopy(model), x, edge_index)
        with foreign_device():
            actual = packed(model.to(DEVICE), x.to(DEVICE), edge_index.to(DEVICE))
    torch.testing.assert_close(held(actual), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", [*CONVS, "APPNP"])
@pytest.mark.parametrize("config", CONFIGS)
def test_training(name: str, config: str, compress: bool) -> None:
    """One step there, with the update of the multipliers: the same loss and gradients as here."""
    x, edge_index = data()
    y = torch.randint(CLASSES, (NODES,))
    model = qgnn.quantize_model(build(name), config=CONFIGS[config])
    qgnn.calibrate(model, (x, edge_index), method="ranges")
    with use_backend("torch"):
        expected = train_once(copy.deepcopy(model), x, edge_index, y, compress)
        with foreign_device():
            actual = train_once(model.to(DEVICE), x.to(DEVICE), edge_index.to(DEVICE), y.to(DEVICE), compress)
    assert actual.keys() == expected.keys()
    # A range per node ends at its largest value: rounding decides whether that one is inside, and has its gradient.
    compared = ["loss"] if config == "accurate" else list(actual)
    for key, value in ((key, actual[key]) for key in compared):
        torch.testing.assert_close(
            held(value), expected[key].detach(), rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", [*(name for name in CONVS if name != "Cheb"), "APPNP"])
@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_waits_for_the_device(name: str, config: str) -> None:
    """Training, inference and packed inference on a known graph: the last is what capture in a CUDA graph asks for.

    (``ChebConv`` removes self-loops in every call, in code of PyG's own.)
    """
    model, (x, edge_index) = build(name).eval(), data()
    with use_backend("torch"), foreign_device():
        model = qgnn.quantize_model(model.to(DEVICE), config=CONFIGS[config])
        x, edge_index = x.to(DEVICE), edge_index.to(DEVICE)
        qgnn.calibrate(model, (x, edge_index), method="ranges")
        for ready in (model, qgnn.pack_model(model)):
            with torch.no_grad():
                ready(x, edge_index)
                waits.clear()
                ready(x, edge_index)
                assert waits == []
        model.train()
        for _ in range(2):
            waits.clear()
            model(x, edge_index).square().mean().backward()
        assert waits == []


def test_a_file_goes_to_the_device(tmp_path: Path) -> None:
    model, (x, edge_index) = build("GCN").eval(), data()
    model = qgnn.quantize_model(model, bits=4)
    qgnn.calibrate(model, (x, edge_index), method="ranges")
    packed = qgnn.pack_model(model)
    with torch.no_grad(), use_backend("torch"):
        expected = packed(x, edge_index)
        with foreign_device():
            actual = packed.to(DEVICE)(x.to(DEVICE), edge_index.to(DEVICE))
    torch.testing.assert_close(held(actual), expected)


def test_the_device_is_foreign() -> None:
    """What the tests above rest on."""
    with foreign_device():
        there, here = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3)
        with pytest.raises(RuntimeError, match="one device"):
            there + here
        with pytest.raises(RuntimeError, match="one device"):
            there @ here.t()
        assert held(there + torch.tensor(2.0)).tolist() == [[3.0] * 3] * 2
        assert torch.tensor([1.0], device=DEVICE).device == DEVICE
        assert type(there.cpu()) is Tensor
        there.add_(1)
        waits.clear()
        assert there.sum().item() == 12
        assert there.nonzero().size(0) == 6
        there.to("cpu")
        assert waits == ["a value read back", "aten.nonzero.default", "a copy to the CPU"]
    with pytest.raises(RuntimeError, match="subclass"):
        there.numpy()
