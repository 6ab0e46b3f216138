"""What enters a packed layer from outside is checked there: width, dtype, device, finiteness; errors name the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import CONVS, NODES, OUT, WIDTH, features, graph, quantized
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GATConv, GATv2Conv, GCNConv, GINConv, SAGEConv

import qgnn_plugin as qgnn

TARGETS = 15
EDGES = graph().size(1)
REFUSED = (ValueError, TypeError, RuntimeError)


class Model(nn.Module):
    """A layer under the name ``conv``."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.conv(*args, **kwargs)


def packed(conv: nn.Module, *args: Any, bits: int = 2, **options: Any) -> nn.Module:
    return qgnn.pack_model(quantized(Model(conv), *args, bits=bits, **options))


def _pair_graph() -> Tensor:
    return torch.stack([torch.randint(NODES, (60,)), torch.randint(TARGETS, (60,))])


def _gin() -> GINConv:
    return GINConv(nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, OUT)))


LAYERS: dict[str, Callable[[], nn.Module]] = {**CONVS, "Linear": lambda: nn.Linear(WIDTH, OUT)}
ANY_WIDTH = ("APPNP", "APPNP cached", "LGConv")  # no weight of theirs says how many features there are


def _arguments(name: str, x: Any) -> tuple[Any, ...]:
    return (x,) if name == "Linear" else (x, graph())


WIDTHS = {
    "one less": (NODES, WIDTH - 1),
    "one more": (NODES, WIDTH + 1),
    "the last that fills the words": (NODES, 16),
    "one": (NODES, 1),
    "none": (NODES, 0),
    "transposed": (WIDTH, NODES),
}


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ANY_WIDTH])
def test_features_of_another_width_are_refused(name: str) -> None:
    model = packed(LAYERS[name](), *_arguments(name, features()))
    for shape in WIDTHS.values():
        for x in (torch.randn(shape), torch.rand(shape).to_sparse_csr()):
            with pytest.raises(REFUSED, match="'conv"):
                model(*_arguments(name, x))


@pytest.mark.parametrize("name", LAYERS)
def test_features_of_another_kind_are_refused(name: str) -> None:
    model = packed(LAYERS[name](), *_arguments(name, features()))
    float_model = Model(LAYERS[name]()).eval()
    x = features()
    others = (x.double(), x.half(), x.long(), x.to("meta"), x[0], x[0, 0], x.numpy(), x.tolist(), None, "x")
    for other in others:
        try:
            float_model(*_arguments(name, other))
        except Exception:
            with pytest.raises(REFUSED, match="'conv"):
                model(*_arguments(name, other))
    if name != "Linear":
        with pytest.raises(REFUSED, match="'conv"):
            model(*_arguments(name, x[:5]))


def _pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(NODES, WIDTH), torch.randn(TARGETS, WIDTH)


def _edge_case(make: Callable[..., nn.Module]) -> tuple[nn.Module, tuple[Any, ...]]:
    return make(WIDTH, OUT, edge_dim=3), (features(), graph(False), torch.randn(graph(False).size(1), 3))


# A layer and its arguments; every float among these is an external input.
EXTERNAL: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    **{name: lambda make=make: (make(), (features(), graph())) for name, make in CONVS.items()},
    "Linear": lambda: (nn.Linear(WIDTH, OUT), (features(),)),
    "GCNConv weighted": lambda: (GCNConv(WIDTH, OUT), (features(), graph(), torch.rand(EDGES))),
    "APPNP weighted": lambda: (APPNP(3, 0.1), (features(), graph(), torch.rand(EDGES))),
    "SAGEConv pair": lambda: (SAGEConv(WIDTH, OUT), (_pairs(), _pair_graph())),
    "SAGEConv pair of widths": lambda: (SAGEConv((WIDTH, WIDTH), OUT), (_pairs(), _pair_graph())),
    "SAGEConv pair, projected": lambda: (SAGEConv(WIDTH, OUT, project=True), (_pairs(), _pair_graph())),
    "GINConv pair": lambda: (_gin(), (_pairs(), _pair_graph())),
    "GATConv pair": lambda: (GATConv((WIDTH, WIDTH), OUT, add_self_loops=False), (_pairs(), _pair_graph())),
    "GATv2Conv pair": lambda: (GATv2Conv((WIDTH, WIDTH), OUT, add_self_loops=False), (_pairs(), _pair_graph())),
    "GATConv edges": lambda: _edge_case(GATConv),
    "GATv2Conv edges": lambda: _edge_case(GATv2Conv),
}  # fmt: skip


def _spoiled(arguments: tuple[Any, ...], value: float) -> list[tuple[Any, ...]]:
    """The arguments with one number of one float tensor replaced, for every such tensor in turn."""
    found = []
    for i, argument in enumerate(arguments):
        parts = argument if isinstance(argument, tuple) else (argument,)
        for k, part in enumerate(parts):
            if part.is_floating_point():
                bad = part.clone()
                bad.view(-1)[part.numel() // 2] = value
                new = (*parts[:k], bad, *parts[k + 1 :])
                found.append((*arguments[:i], new if isinstance(argument, tuple) else bad, *arguments[i + 1 :]))
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", EXTERNAL)
def test_every_external_input_must_be_finite(name: str, value: float) -> None:
    layer, arguments = EXTERNAL[name]()
    model = packed(layer, *arguments, bits=8)
    model(*arguments)
    for bad in _spoiled(arguments, value):
        with pytest.raises(ValueError, match=r"finite.*'conv|'conv.*finite"):
            model(*bad)


def test_inputs_of_later_layers_are_checked_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.first(x) + self.second(y * 2)

    x = features()
    model = qgnn.pack_model(quantized(Two(), x, x))
    bad = x.clone()
    bad[3, 4] = float("nan")
    for given in ((bad, x), (x, bad)):
        with pytest.raises(ValueError, match="finite"):
            model(*given)


def test_values_between_packed_layers_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_geometric.nn import GAT, GCN, GraphSAGE

    from qgnn_plugin.packing.layers import ranges

    looked: list[str] = []
    check = ranges.check_finite
    monkeypatch.setattr(ranges, "check_finite", lambda x, where: looked.append(where) or check(x, where))
    for make in (GCN, GAT, GraphSAGE):
        model = packed(make(WIDTH, 8, 3, OUT), features(), graph())
        looked.clear()
        model(features(), graph())
        assert len(looked) == 1


def test_negative_degrees_are_refused() -> None:
    edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
    x, weight = torch.randn(3, WIDTH), torch.tensor([0.5, 1.0, 2.0])
    model = packed(GCNConv(WIDTH, OUT), x, edge_index, weight)
    with pytest.raises(ValueError, match=r"(finite degrees|sum of at least 0).*'conv"):
        model(x, edge_index, torch.tensor([-3.0, 1.0, 1.0]))
