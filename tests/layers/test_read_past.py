"""Weights that code takes past their layers in ways that no source tells: noted while ranges are set."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core.support import NODES, WIDTH, features, graph, relative, through_pickle
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin.packing.model import READ_PAST


class Decoder(nn.Module):
    """Reads a layer that it holds unregistered, or a function that gives it."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held, self.lin = held, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.held() if callable(self.held) else self.held[0]
        return F.linear(self.lin(x), layer.weight)


class Tied(nn.Module):
    def __init__(self, hold: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.table = nn.Embedding(NODES, WIDTH)
        self.decoder = Decoder(hold(self.table))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.table(x.abs().argmax(-1)) + x)


class Delegate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Reader(nn.Module):
    """Runs a layer and reads one of its weights."""

    def __init__(self, layer: nn.Module, run: Callable[[Any, Tensor], Tensor], read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.run, self.read = layer, nn.Linear(WIDTH, WIDTH), run, read

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.head(self.run(self.layer, x)), self.read(self.layer))


def _called(layer: Any, x: Tensor) -> Tensor:
    return layer(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tuple": (lambda: Tied(lambda table: (table,)), "table"),
    "function": (lambda: Tied(lambda table: lambda: table), "table"),
    "delegate": (lambda: Reader(Delegate(), _called, lambda layer: layer.weight), "layer.inner"),
    "getter": (lambda: Reader(nn.Linear(WIDTH, WIDTH), _called, attrgetter("weight")), "layer"),
    "cell": (lambda: Reader(nn.GRUCell(WIDTH, WIDTH), _called, lambda layer: layer.weight_ih[:WIDTH]), "layer"),
    "grid": (
        lambda: Reader(nn.Conv1d(WIDTH, WIDTH, 1), lambda conv, x: conv(x.t()).t(), lambda conv: conv.weight[..., 0]),
        "layer",
    ),
    "graph": (
        lambda: Reader(GCNConv(WIDTH, WIDTH), lambda conv, x: conv(x, graph()), lambda conv: conv.lin.weight),
        "layer.lin",
    ),
    "units": (
        lambda: Reader(SAGEConv(WIDTH, WIDTH), lambda conv, x: conv(x, graph()), lambda conv: conv.lin_l.weight),
        "layer",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_models_return_what_converted_ones_do(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, layer = MODELS[name]
    model, x = make().eval(), features()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), [(x.flip(0),), (x,)]).eval()
    assert type(qmodel.get_submodule(layer)._parameters) is dict
    for one in (qmodel, copy.deepcopy(qmodel), through_pickle(qmodel)) if name == "tuple" else (qmodel,):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            packed = qgnn.pack_model(one)
            with torch.no_grad():
                assert relative(packed(x), qmodel(x)) < 1e-6
        assert READ_PAST in {spec.name: spec.reason for spec in packed._packed_specs}[layer]  # type: ignore[union-attr]
        assert READ_PAST in str(qgnn.summary(packed))
    assert relative(qmodel(x), model(x)) < 0.1
    if name in ("tuple", "cell"):
        qgnn.save_packed(packed, tmp_path / "packed.safetensors")
        with torch.no_grad():
            assert torch.equal(qgnn.load_packed(tmp_path / "packed.safetensors", model)(x), packed(x))
    restored = qgnn.restore_model(qmodel)
    assert torch.equal(restored(x), model(x))
    assert not any("_is_read_past" in vars(module) for module in restored.modules())
