"""Packed models under ``torch.compile(fullgraph=True)``, and what CUDA graph capture asks of them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import APPNP, GATConv, GATv2Conv, GCNConv, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin.packing.layers.ranges import PackedRange

NODES, FEATURES, CLASSES = 40, 24, 8

CONVS = {
    "GCN": GCNConv,
    "SAGE": SAGEConv,
    "GAT": lambda a, b: GATConv(a, b // 4, heads=4),
    "GATv2": lambda a, b: GATv2Conv(a, b // 4, heads=4),
}


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        make = CONVS[name]
        self.first, self.second = make(FEATURES, 32), make(32, CLASSES)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


class Propagation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.propagate = nn.Linear(FEATURES, CLASSES), APPNP(3, 0.1)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.propagate(self.lin(x), edge_index)


def packed(model: nn.Module, bits: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    x, edge_index = torch.randn(NODES, FEATURES), torch.randint(NODES, (2, 200))
    model = qgnn.quantize_model(model, bits=bits)
    qgnn.calibrate(model, (x, edge_index))
    return qgnn.pack_model(model), x, edge_index


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", list(CONVS))
def test_compiles_to_one_graph(name: str, bits: int) -> None:
    model, x, edge_index = packed(Model(name), bits)
    torch._dynamo.reset()
    with qgnn.fixed_graph():
        expected = model(x, edge_index)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, edge_index), expected)
        fresh = torch.randn_like(x)
        assert torch.equal(compiled(fresh, edge_index), model(fresh, edge_index))


def test_a_fixed_graph_is_one_graph() -> None:
    model, x, edge_index = packed(Model("GCN"), 4)
    with qgnn.fixed_graph():
        model(x, edge_index)
        with pytest.raises(ValueError, match="one graph"):
            model(x, edge_index.flip(0))
    model(x, edge_index.flip(0))


class Synchronizing(TorchDispatchMode):
    """Collects the operations that read a tensor back or whose result has a size that depends on data."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "unique", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.split("::")[1]
        if name in self.FORBIDDEN or torch.Tag.dynamic_output_shape in func.tags:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*CONVS, "propagation"])
def test_the_steady_state_neither_synchronizes_nor_sizes_by_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the Triton path, whose launches are the same on a device: what capture in a CUDA graph forbids."""
    pytest.importorskip("triton")
    model, x, edge_index = packed(Propagation() if name == "propagation" else Model(name), 4)
    monkeypatch.setattr(PackedRange, "expect_finite", lambda *_: None)  # it reads values back on the CPU alone
    from qgnn_plugin.kernels.backend import use_backend

    with use_backend("interpret"), torch.no_grad():
        expected = model(x, edge_index)  # builds plans and schedules
        with Synchronizing() as seen:
            actual = model(x, edge_index)
    assert seen.found == []
    assert torch.equal(actual, expected)
