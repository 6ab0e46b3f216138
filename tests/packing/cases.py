"""Models and inputs that packing is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from graphs import erdos_renyi
from torch import Tensor, nn
from torch_geometric.nn import (
    APPNP,
    GAT,
    GCN,
    GIN,
    BatchNorm,
    GCNConv,
    GraphConv,
    GraphSAGE,
    Linear,
    SAGEConv,
)

import qgnn_plugin
from qgnn_plugin import QuantConfig

FEATURES, HIDDEN, CLASSES = 20, 12, 7


class Propagation(nn.Module):
    """An MLP, a normalization and K steps of APPNP."""

    def __init__(self, width: int = FEATURES, steps: int = 3) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, HIDDEN), Linear(HIDDEN, CLASSES)
        self.norm, self.prop = BatchNorm(HIDDEN), APPNP(steps, 0.1)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        return self.prop(self.lin2(self.norm(self.lin1(x)).relu()), edge_index)


class Shared(nn.Module):
    """One layer used twice, held in a list and under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = GCNConv(FEATURES, HIDDEN)
        self.again = GCNConv(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList([self.again, self.again])

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        x = self.first(x, edge_index).relu()
        for layer in self.layers:
            x = layer(x, edge_index).relu()
        return x


class Mixed(nn.Module):
    """A layer without a packed form between two that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(FEATURES, HIDDEN), GraphConv(HIDDEN, HIDDEN)
        self.conv3 = SAGEConv(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        x = self.conv1(x, edge_index).relu()
        return self.conv3(self.conv2(x, edge_index).relu(), edge_index)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "gcn": lambda width=FEATURES, depth=2: GCN(width, HIDDEN, depth, CLASSES, norm="batch_norm"),
    "sage": lambda width=FEATURES, depth=2: GraphSAGE(width, HIDDEN, depth, CLASSES),
    "sage_wide": lambda width=FEATURES: GraphSAGE(width, 24, 2, 30, aggr="add"),
    "sage_max": lambda width=FEATURES: GraphSAGE(width, HIDDEN, 2, CLASSES, aggr="max"),
    "gin": lambda width=FEATURES, depth=2: GIN(width, HIDDEN, depth, CLASSES, train_eps=True),
    "appnp": lambda width=FEATURES, depth=2: Propagation(width, depth + 1),
}
ATTENTION: dict[str, Callable[..., nn.Module]] = {
    "gat": lambda width=FEATURES, depth=2: GAT(width, HIDDEN, depth, CLASSES, heads=3),
    "gatv2": lambda width=FEATURES, depth=2: GAT(width, HIDDEN, depth, CLASSES, heads=2, v2=True),
}


def features(kind: str, num_nodes: int, width: int = FEATURES, seed: int = 0) -> Tensor:
    """``"dense"``, ``"binary"``, ``"rows"`` (one value per row), or the latter two as sparse CSR."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return torch.randn(num_nodes, width, generator=generator)
    x = (torch.rand(num_nodes, width, generator=generator) < 0.3).float()
    if "rows" in kind:
        x = x / x.sum(1, keepdim=True).clamp(min=1)
    return x.to_sparse_csr() if kind.startswith("sparse") else x


def quantized(model: nn.Module, x: Tensor, edge_index: Any, **config: Any) -> nn.Module:
    """A converted, calibrated model in eval mode."""
    qmodel = qgnn_plugin.quantize_model(model, config=QuantConfig(**config)).eval()
    return qgnn_plugin.calibrate(qmodel, (x, edge_index), method="ranges")


def packed_pair(
    name: str = "gcn", kind: str = "dense", **config: Any
) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """A calibrated model, its packed form, and their inputs on a small random graph."""
    graph = erdos_renyi(40, 200)
    x = features(kind, graph.num_nodes)
    build = {**MODELS, **ATTENTION, "shared": Shared, "mixed": Mixed}[name]
    qmodel = quantized(build(), x, graph.edge_index, **config)
    return qmodel, qgnn_plugin.pack_model(qmodel), (x, graph.edge_index)
