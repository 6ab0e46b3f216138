"""SAGEConv: one quantized input feeds both linear maps; the cheaper order of transform and aggregation is chosen."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..quantizers import QLRQuantizer, QuantizedTensor
from ..quantizers.autocast import full_precision
from ..smp.constraint import attach_constraint
from .arithmetic import aggregate_sum
from .base import SiteFactory
from .graph import NormalizedGraph, is_sparse, mean_graph, num_targets, plain_graph
from .linear import QuantizedLinear
from .message_passing import QuantizedConv

__all__ = ["QuantizedSAGEConv"]


class QuantizedSAGEConv(QuantizedConv):
    r"""Quantized :class:`torch_geometric.nn.SAGEConv`.

    A mean or a sum commutes with ``lin_l``: where that does not widen the messages, the layer transforms first and
    sends quantized ``W_l x``, as GCNConv does.  Otherwise it sends the quantized features and quantizes their sum.
    """

    units = ("lin_l", "lin_r")
    input_quantizer: QLRQuantizer
    message_quantizer: QLRQuantizer | None

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        shared = isinstance(layer.in_channels, int) and not layer.project
        layer.input_quantizer = sites.features("input", layer.in_channels if shared else None)
        first = _transforms_first(layer)
        layer.message_quantizer = sites.message("message", layer.out_channels) if first else None
        layer.target_quantizer = None if shared else sites.make("activation", "target")
        inner = [("lin_l", not first), ("lin_r", False)] if layer.root_weight else [("lin_l", not first)]
        for child, own_input in inner:
            from .registry import convert_layer  # the registry names this class

            convert_layer(getattr(layer, child), QuantizedLinear, sites.within(child), own_input=own_input)
        attach_constraint(layer, sites.config.smp, sites.device)

    @property
    def follows_autocast(self: Any) -> bool:
        inner = (getattr(self, unit, None) for unit in self.units)
        return self.is_off and all(lin is None or lin.is_off for lin in inner)

    @full_precision
    def forward(self: Any, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        if self.is_off and self.lin_l.is_off and (not self.root_weight or self.lin_r.is_off):
            return super().forward(x, edge_index, size)  # type: ignore[misc]
        self.refuse_explain()
        x_src, x_dst = (x, x) if isinstance(x, Tensor) else x
        same = x_dst is x_src
        if self.project and hasattr(self, "lin"):
            x_src = self.lin(x_src).relu()
            same = False
        sent = self.input_quantizer(x_src, codes_kept=_transforms_first(self) or self.root_weight)
        graph_size = (x_src.size(0), num_targets(edge_index, x_src, x_dst, size))
        if _transforms_first(self):
            out = self._transform_first(sent, edge_index, graph_size, smooth=same)
        else:
            out = self.lin_l(self._aggregate(sent, edge_index, graph_size))
        if self.root_weight and x_dst is not None:
            target = self.input_quantizer if self.target_quantizer is None else self.target_quantizer
            out = out + self.lin_r(sent if same and self.target_quantizer is None else target(x_dst))
        return F.normalize(out, p=2.0, dim=-1) if self.normalize else out

    def _graph(self: Any, edge_index: Any, size: tuple[int, int]) -> NormalizedGraph:
        if self.aggr == "mean":
            return mean_graph(edge_index, size, self.flow, self.lin_l.weight.dtype)
        return plain_graph(edge_index, size, self.flow)

    def _transform_first(
        self: Any, sent: QuantizedTensor, edge_index: Any, size: tuple[int, int], smooth: bool
    ) -> Tensor:
        z = self.lin_l.apply_to(sent, None)
        graph = self._graph(edge_index, size)
        out = aggregate_sum(self.message_quantizer(z), graph.plan, graph.weight, exact=not self.training)
        if graph.target is not None:
            out = out * graph.target
        if smooth and self.smp is not None and (self.training or self.is_smoothing):
            smoother = mean_graph(edge_index, size, self.flow, z.dtype)
            out = self.smooth(z, out, smoother.apply, graph.plan.num_edges, averaged=self.aggr == "mean")
        return out if self.lin_l.bias is None else out + self.lin_l.bias

    def _aggregate(self: Any, sent: QuantizedTensor, edge_index: Any, size: tuple[int, int]) -> Tensor:
        if self.aggr in ("mean", "add", "sum"):
            graph = self._graph(edge_index, size)
            out = aggregate_sum(sent, graph.plan, graph.weight, exact=not self.training)
            return out if graph.target is None else out * graph.target
        values = sent.dequantize()
        return self.float_propagate(edge_index, None if is_sparse(edge_index) else size, x=(values, None))


def _transforms_first(layer: Any) -> bool:
    """Whether sending ``W_l x`` is exact and no wider than sending ``x``."""
    return layer.aggr in ("mean", "add", "sum") and layer.out_channels <= layer.lin_l.weight.size(1)
