"""Layers in a small model, and the forms that it takes: converted, packed, and loaded from a file."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graphs import erdos_renyi
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn import GCNConv, MessagePassing

import qgnn_plugin as qgnn

NODES, WIDTH = 30, 8
FORMS = ("converted", "packed", "loaded")


class Doubled(MessagePassing):
    """A layer of the user's own."""

    def __init__(self) -> None:
        super().__init__(aggr="add")
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=self.lin(x))

    def message(self, x_j: Tensor) -> Tensor:
        return 2 * x_j


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(WIDTH, WIDTH),
    "PyG Linear": lambda: pyg.Linear(WIDTH, WIDTH, bias=False),
    "GCNConv": lambda: GCNConv(WIDTH, WIDTH),
    "GATConv": lambda: pyg.GATConv(WIDTH, WIDTH, heads=2, concat=False),
    "GATv2Conv": lambda: pyg.GATv2Conv(WIDTH, WIDTH, heads=2, concat=False, share_weights=True),
    "SAGEConv": lambda: pyg.SAGEConv(WIDTH, WIDTH),
    "SAGEConv max": lambda: pyg.SAGEConv(WIDTH, WIDTH, aggr="max"),
    "SAGEConv project": lambda: pyg.SAGEConv(WIDTH, WIDTH, project=True, root_weight=False),
    "GINConv": lambda: pyg.GINConv(mlp(), train_eps=True),
    "APPNP": lambda: pyg.APPNP(3, 0.1),
    "SGConv": lambda: pyg.SGConv(WIDTH, WIDTH, K=2),
    "SSGConv": lambda: pyg.SSGConv(WIDTH, WIDTH, alpha=0.1, K=2),
    "TAGConv": lambda: pyg.TAGConv(WIDTH, WIDTH, K=2),
    "LGConv": lambda: pyg.LGConv(),
    "SMPropagation": lambda: qgnn.SMPropagation(3),
    "GraphConv": lambda: pyg.GraphConv(WIDTH, WIDTH),
    "TransformerConv": lambda: pyg.TransformerConv(WIDTH, WIDTH),
    "EdgeConv": lambda: pyg.EdgeConv(nn.Sequential(nn.Linear(2 * WIDTH, WIDTH))),
    "MFConv": lambda: pyg.MFConv(WIDTH, WIDTH),
    "Doubled": Doubled,
}


class Model(nn.Module):
    """One layer between two maps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.layer(x, edge_index) if isinstance(self.layer, MessagePassing) else self.layer(x)
        return self.head(x)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(NODES, WIDTH), erdos_renyi(NODES, 4 * NODES).edge_index


def forms_of(model: nn.Module, args: tuple[Any, ...], **options: Any) -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = qgnn.calibrate(qgnn.quantize_model(model, **options), [args], steps=5).eval()
        packed = qgnn.pack_model(converted)
    return {"float": model.eval(), "converted": converted, "packed": packed, "loaded": reloaded(packed, model)}


def reloaded(packed: nn.Module, model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        qgnn.save_packed(packed, Path(folder, "model.safetensors"))
        return qgnn.load_packed(Path(folder, "model.safetensors"), model)


def pairs(first: nn.Module, second: nn.Module) -> list[tuple[Any, Any]]:
    """The modules of a float model, and what they are in another form."""
    theirs = dict(second.named_modules(remove_duplicate=False))
    return [(module, theirs[name]) for name, module in first.named_modules(remove_duplicate=False)]
