"""The models of the accuracy benchmark: ordinary PyG models that also take sparse features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GATConv, GCNConv, Linear, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.plan import GraphPlan, plan_cache
from qgnn_plugin.kernels.spmm import spmm
from qgnn_plugin.layers.graph import mean_graph
from qgnn_plugin.layers.linear import QuantizedLinear
from qgnn_plugin.layers.sage import QuantizedSAGEConv

__all__ = ["MODELS", "build_model"]


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout that keeps sparse features sparse."""
    if x.layout == torch.strided:
        return F.dropout(x, p, training)
    if not training or p == 0:
        return x
    return torch.sparse_csr_tensor(
        x.crow_indices(), x.col_indices(), F.dropout(x.values(), p), x.shape, check_invariants=False
    )


class SparseInputLinear(Linear):
    """PyG's Linear with a product for sparse features whose backward pass is sparse too (torch's is several times slower)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.layout == torch.strided:
            return super().forward(x)
        crow, col = x.crow_indices(), x.col_indices()
        plan = plan_cache.get(
            (crow, col), ("features", x.size(1)), lambda: GraphPlan(crow.long(), col.to(torch.int32), x.size(1))
        )
        out = spmm(plan, self.weight.t().contiguous(), x.values())
        return out if self.bias is None else out + self.bias


class SparseInputSAGEConv(SAGEConv):
    """SAGEConv that takes sparse features: the mean commutes with ``lin_l``, so that one goes first."""

    def forward(self, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        if not isinstance(x, Tensor) or x.layout == torch.strided:
            return super().forward(x, edge_index, size)
        z = self.lin_l(x) - self.lin_l.bias
        mean = mean_graph(edge_index, (x.size(0), x.size(0)), self.flow).apply(z)
        return mean + self.lin_l.bias + self.lin_r(x)


qgnn.register_layer(SparseInputLinear, QuantizedLinear)
qgnn.register_layer(SparseInputSAGEConv, QuantizedSAGEConv)


class TwoLayer(nn.Module):
    """Two convolutions with dropout before each and an activation between."""

    def __init__(self, first: nn.Module, second: nn.Module, rate: float, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1, self.conv2, self.rate, self.act = first, second, rate, act

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        x = self.act(self.conv1(dropout(x, self.rate, self.training), edge_index))
        return self.conv2(dropout(x, self.rate, self.training), edge_index)


class Propagation(nn.Module):
    """An MLP whose predictions are propagated K times (APPNP)."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, steps: int, teleport: float, rate: float) -> None:
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
    "GraphSAGE": lambda i, o: TwoLayer(SparseInputSAGEConv(i, 64), SparseInputSAGEConv(64, o), 0.5),
    "Propagation": lambda i, o: Propagation(i, 64, o, 10, 0.1, 0.5),
}


def build_model(name: str, in_channels: int, out_channels: int) -> nn.Module:
    """A freshly initialized float model."""
    model = MODELS[name](in_channels, out_channels)
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = SparseInputLinear
    return model
