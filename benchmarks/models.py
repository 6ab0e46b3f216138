"""The models of the accuracy benchmark: ordinary PyG models, with dropout that also takes sparse features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GATConv, GCNConv, Linear, SAGEConv

from .fast_layers import dropout, speed_up

__all__ = ["MODELS", "build_model"]


class TwoLayer(nn.Module):
    """Two convolutions with dropout before each and an activation between."""

    def __init__(
        self, first: nn.Module, second: nn.Module, rate: float, act: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__()
        self.conv1, self.conv2, self.rate, self.act = first, second, rate, act

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        x = self.act(self.conv1(dropout(x, self.rate, self.training), edge_index))
        return self.conv2(dropout(x, self.rate, self.training), edge_index)


class Propagation(nn.Module):
    """An MLP whose predictions are propagated K times (APPNP)."""

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, steps: int, teleport: float, rate: float
    ) -> None:
        super().__init__()
        self.lin1, self.lin2 = Linear(in_channels, hidden), Linear(hidden, out_channels)
        self.prop, self.rate = APPNP(steps, teleport), rate

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        x = self.lin1(dropout(x, self.rate, self.training)).relu()
        return self.prop(self.lin2(dropout(x, self.rate, self.training)), edge_index)


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "GCN-16": lambda i, o: TwoLayer(GCNConv(i, 16), GCNConv(16, o), 0.5),
    "GCN-64": lambda i, o: TwoLayer(GCNConv(i, 64), GCNConv(64, o), 0.5),
    "GAT-8x8": lambda i, o: TwoLayer(
        GATConv(i, 8, heads=8, dropout=0.6), GATConv(64, o, heads=1, dropout=0.6), 0.6, F.elu
    ),
    "GraphSAGE": lambda i, o: TwoLayer(SAGEConv(i, 64), SAGEConv(64, o), 0.5),
    "Propagation": lambda i, o: Propagation(i, 64, o, 10, 0.1, 0.5),
}


def build_model(name: str, in_channels: int, out_channels: int, fast: bool = True) -> nn.Module:
    """A freshly initialized float model; ``fast`` uses the layers of :mod:`.fast_layers`."""
    model = MODELS[name](in_channels, out_channels)
    return speed_up(model) if fast else model
