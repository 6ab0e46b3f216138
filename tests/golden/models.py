"""The models behind the golden files.  Pickles name these classes: they stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import (
    APPNP,
    GAT,
    GCN,
    GIN,
    GCNConv,
    GraphConv,
    GraphSAGE,
    LGConv,
    Linear,
    SAGEConv,
    SGConv,
    SSGConv,
    TAGConv,
)

from qgnn_plugin import QuantConfig, SMPConfig

NODES, FEATURES, HIDDEN, CLASSES = 24, 6, 8, 3


class Hops(nn.Module):
    """One layer of every kind that propagates several steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.appnp = Linear(FEATURES, HIDDEN), APPNP(2, 0.1)
        self.sg, self.ssg = SGConv(HIDDEN, HIDDEN, K=2), SSGConv(HIDDEN, HIDDEN, alpha=0.1, K=2)
        self.tag, self.lg = TAGConv(HIDDEN, CLASSES, K=1), LGConv()

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        x = self.appnp(self.lin(x), edge_index).relu()
        x = self.ssg(self.sg(x, edge_index).relu(), edge_index).relu()
        return self.lg(self.tag(x, edge_index), edge_index)


class Mixed(nn.Module):
    """A layer without a packed form between two that have one, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(FEATURES, HIDDEN), GraphConv(HIDDEN, HIDDEN)
        self.conv3 = SAGEConv(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList([self.conv3, self.conv3])
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        x = self.conv2(self.conv1(x, edge_index).relu(), edge_index).relu()
        for layer in self.layers:
            x = layer(x, edge_index).relu()
        return self.head(x)


def _gcn() -> nn.Module:
    return GCN(FEATURES, HIDDEN, 2, CLASSES, norm="batch_norm", jk="cat")


Build = Callable[[], nn.Module]
MODELS: dict[str, tuple[Build, QuantConfig]] = {
    "gcn": (_gcn, QuantConfig(bits=2, output_bits=8)),
    "gcn_float_messages": (
        _gcn,
        QuantConfig(bits=4, message_bits=32, overrides={"convs.1*": {"weight_bits": 8, "activation_bits": 8}}),
    ),
    "gcn_smooth": (_gcn, QuantConfig(bits=4, smp=SMPConfig(multiplier=0.3, damping=0.1))),
    "sage": (lambda: GraphSAGE(FEATURES, HIDDEN, 2, CLASSES), QuantConfig(bits=4, granularity="channel")),
    "sage_max": (lambda: GraphSAGE(FEATURES, HIDDEN, 2, CLASSES, aggr="max"), QuantConfig(bits=4, truncation="sbt")),
    "gat": (lambda: GAT(FEATURES, HIDDEN, 2, CLASSES, heads=2), QuantConfig.accurate(4)),
    "gatv2": (lambda: GAT(FEATURES, HIDDEN, 2, CLASSES, heads=2, v2=True), QuantConfig(bits=8, smp=None)),
    "gin": (lambda: GIN(FEATURES, HIDDEN, 2, CLASSES, train_eps=True), QuantConfig(bits=4, message_levels="half")),
    "hops": (Hops, QuantConfig(bits=8)),
    "deep": (
        lambda: GCN(FEATURES, HIDDEN, 4, CLASSES),
        QuantConfig(bits=4, smp=SMPConfig(initial_residual=0.1, identity_map=0.5)),
    ),
    "mixed": (Mixed, QuantConfig(bits=4)),
    "layer": (lambda: GCNConv(FEATURES, CLASSES), QuantConfig(bits=4, weight_levels="affine")),
}
INTEGER = ("gcn", "sage", "sage_max", "gin", "layer")  # sums of integers: the same on every machine


def inputs() -> tuple[Tensor, Tensor]:
    """Features and edges, without a random generator."""
    x = torch.sin(torch.arange(NODES * FEATURES, dtype=torch.float32) * 1.7).view(NODES, FEATURES)
    ring = torch.arange(NODES)
    edges = [torch.stack([ring, (ring * step + step) % NODES]) for step in (1, 5, 7)]
    return x, torch.cat(edges, 1)
