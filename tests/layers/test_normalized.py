"""Weights that hooks and parametrizations compute: converted, trained, packed and restored, in every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv, SGConv

import qgnn_plugin as qgnn

Norm = Callable[[nn.Module], nn.Module]


def pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


NORMS: dict[str, Norm] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "pruning": pruned,
}


class Head(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.lin = norm(nn.Linear(WIDTH, OUT))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.lin(x)


def inside(make: Callable[[], Any], *names: str) -> Callable[[Norm], nn.Module]:
    def made(norm: Norm) -> nn.Module:
        layer = make()
        for name in names:
            setattr(layer, name, norm(getattr(layer, name)))
        return layer

    return made


LAYERS: dict[str, Callable[[Norm], nn.Module]] = {
    "Linear": Head,
    "GCNConv": inside(lambda: GCNConv(WIDTH, OUT), "lin"),
    "SAGEConv": inside(lambda: SAGEConv(WIDTH, OUT), "lin_l", "lin_r"),
    "SGConv": inside(lambda: SGConv(WIDTH, OUT, K=2), "lin"),
    "GATConv": inside(lambda: GATConv(WIDTH, OUT, heads=2), "lin"),
    "GINConv": lambda norm: GINConv(nn.Sequential(norm(nn.Linear(WIDTH, 8)), nn.ReLU(), nn.Linear(8, OUT))),
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_computed_weights(name: str, norm: str) -> None:
    x, edge_index = features(), graph()
    model = LAYERS[name](NORMS[norm])
    model.train()(x, edge_index).square().mean().backward()  # keeps a result of its own
    off = qgnn.quantize_model(model, 32).eval()
    expected = model.eval()(x, edge_index)
    assert torch.equal(off(x, edge_index), expected)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), (x, edge_index)).eval()
    assert (qmodel(x, edge_index) - expected).norm() < 0.1 * expected.norm()

    sources = {
        key: p.detach().clone() for key, p in qmodel.named_parameters() if "quantizer" not in key and p.dim() > 1
    }
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        qmodel.train()(x, edge_index).square().mean().backward()
        optimizer.step()
    trained = dict(qmodel.named_parameters())
    assert all(not torch.equal(trained[key], was) for key, was in sources.items() if "att" not in key)

    before = {key: value.clone() for key, value in qmodel.named_buffers()}  # a state dict of PyG's reads weights
    packed = qgnn.pack_model(qmodel)
    assert str(qgnn.summary(qmodel))
    assert all(torch.equal(value, before[key]) for key, value in qmodel.named_buffers())
    assert torch.equal(packed(x, edge_index), qmodel.eval()(x, edge_index))
    left = qgnn.summary(qmodel).coverage.parts  # type: ignore[union-attr]
    assert [part.type for part in left] == ["GATConv"] * (name == "GATConv")  # attention vectors
    restored = qgnn.restore_model(qmodel)
    assert [type(m).__name__ for m in restored.modules()] == [type(m).__name__ for m in model.modules()]
    assert list(restored.state_dict()) == list(model.state_dict())
    restored.train()(x, edge_index).sum().backward()


def test_low_rank_adapters() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down = base.requires_grad_(False), nn.Linear(WIDTH, 2, bias=False)
            self.up = nn.Linear(2, OUT, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    x = features()
    qmodel: Any = qgnn.calibrate(qgnn.quantize_model(Adapted(nn.Linear(WIDTH, OUT)), 8), [(x,)])
    base = qmodel.base.weight.clone()
    optimizer = torch.optim.SGD([p for p in qmodel.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        qmodel.train()(x).square().mean().backward()
        optimizer.step()
    assert qmodel.up.weight.any()
    assert torch.equal(qmodel.base.weight, base)
    qmodel.eval()
    assert torch.equal(qgnn.pack_model(qmodel)(x), qmodel(x))
