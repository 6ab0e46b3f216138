"""PyG's layers with this project's float products, so that two hundred float trainings fit in an hour on one core.

Same parameters, same function, to float rounding (``tests/benchmarks/test_models.py``); features may be sparse.  They
are registered for conversion like the layers they stand for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import APPNP, GATConv, GCNConv, Linear, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin.convs.appnp import QuantizedAPPNP
from qgnn_plugin.convs.attention import QuantizedGATConv
from qgnn_plugin.convs.gcn import QuantizedGCNConv
from qgnn_plugin.convs.sage import QuantizedSAGEConv
from qgnn_plugin.graph.adjacency import gcn_graph, looped_plan, mean_graph
from qgnn_plugin.kernels.plan import GraphPlan, plan_cache
from qgnn_plugin.kernels.spmm import segment_max, segment_sum, spmm
from qgnn_plugin.layers.dropout import dropout as dense_dropout
from qgnn_plugin.layers.linear import QuantizedLinear

__all__ = ["FastAPPNP", "FastGATConv", "FastGCNConv", "FastLinear", "FastSAGEConv", "dropout", "speed_up"]


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout that keeps sparse features sparse."""
    if x.layout == torch.strided:
        return dense_dropout(x, p, training)
    if not training or p == 0:
        return x
    values = dense_dropout(x.values(), p, training)
    return torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape, check_invariants=False)


class FastLinear(Linear):
    """``torch_geometric.nn.Linear``; a product with sparse features has a sparse backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if x.layout == torch.strided:
            return super().forward(x)
        crow, col = x.crow_indices(), x.col_indices()
        plan = plan_cache.get(
            (crow, col), ("features", x.size(1)), lambda: GraphPlan(crow.long(), col.to(torch.int32), x.size(1))
        )
        out = spmm(plan, self.weight.t().contiguous(), x.values())
        return out if self.bias is None else out + self.bias


class FastGCNConv(GCNConv):
    """``GCNConv`` on an unweighted graph."""

    def forward(self, x: Tensor, edge_index: Any, edge_weight: Any = None) -> Tensor:
        return gcn_graph(edge_index, edge_weight, x.size(0)).apply(self.lin(x)) + self.bias


class FastSAGEConv(SAGEConv):
    """``SAGEConv`` with the mean, which commutes with ``lin_l``."""

    def forward(self, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        z = self.lin_l(x)
        mean = mean_graph(edge_index, (x.size(0), x.size(0)), self.flow)
        # lin_l's bias is constant: a mean over neighbours keeps it, a node without any needs it back.
        isolated = (mean.plan.degree == 0).unsqueeze(1) * self.lin_l.bias
        return mean.apply(z) + isolated + self.lin_r(x)


class FastGATConv(GATConv):
    """``GATConv`` without edge features."""

    def forward(self, x: Any, edge_index: Any, *_: Any) -> Tensor:
        z = self.lin(x).view(-1, self.heads, self.out_channels)
        plan = looped_plan(edge_index, (z.size(0), z.size(0)), self.flow)
        logits = (z * self.att_src).sum(-1)[plan.col.long()] + (z * self.att_dst).sum(-1)[plan.dst]
        logits = F.leaky_relu(logits, self.negative_slope)
        numerator = (logits - segment_max(plan, logits)[plan.dst]).exp()
        kept = dense_dropout(numerator, self.dropout, self.training)
        out = spmm(plan, z, kept) / segment_sum(plan, numerator).unsqueeze(-1)
        return (out.flatten(1) if self.concat else out.mean(1)) + self.bias


class FastAPPNP(APPNP):
    """``APPNP`` on an unweighted graph, without dropout of edges."""

    def forward(self, x: Tensor, edge_index: Any, edge_weight: Any = None) -> Tensor:
        graph, out = gcn_graph(edge_index, edge_weight, x.size(0)), x
        for _ in range(self.K):
            out = graph.apply(out) * (1 - self.alpha) + self.alpha * x
        return out


_FAST = {Linear: FastLinear, GCNConv: FastGCNConv, SAGEConv: FastSAGEConv, GATConv: FastGATConv, APPNP: FastAPPNP}

for _fast, _mixin in {
    FastLinear: QuantizedLinear,
    FastGCNConv: QuantizedGCNConv,
    FastSAGEConv: QuantizedSAGEConv,
    FastGATConv: QuantizedGATConv,
    FastAPPNP: QuantizedAPPNP,
}.items():
    qgnn.register_layer(_fast, _mixin)


def speed_up(model: torch.nn.Module) -> torch.nn.Module:
    """Swap PyG's layers in ``model`` for the ones above, in place."""
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
    return model
