"""GCNConv: transform, scale by ``d^-1/2``, quantize once per node, sum integer codes, scale by ``d^-1/2``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import GCNConv

from ..config import OFF
from ..graph.adjacency import NormalizedGraph, gcn_graph
from ..graph.samples import Samples
from ..layers.base import SiteFactory
from ..layers.message_passing import SUM
from ..layers.registry import register_layer
from ..layers.watched import is_watched, watched_graph
from ..packing.direct.convs import direct_gcn
from ..packing.layers.base import register_packed
from ..packing.layers.guard import inference
from ..smp.constraint import attach_constraint
from .base import Convolution, Frozen, Mapped, Trainable, trainable

__all__ = ["GCN", "PackedGCNConv", "QuantizedGCNConv", "refusal"]


class GCN(Convolution):
    r""":math:`t_i \sum_j w_{ij} Q(s_j z_j) + b` with ``z = W x``."""

    message_quantizer: Any
    lin: Any
    bias: Tensor | None

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.message_quantizer = sites.message("message", layer.out_channels)
        attach_constraint(layer, sites.config.smp, sites.device)

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        return refusal(layer)

    def forward(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        """``[N, in_channels]`` to ``[N, out_channels]``, as :class:`torch_geometric.nn.GCNConv`."""
        if isinstance(x, (tuple, list)):
            raise ValueError(f"Expected one feature matrix in '{self._qualified_name}', a GCNConv (got a pair)")
        samples = Samples.of(self, x)
        graph = self._graph(edge_index, edge_weight, samples)
        mapped = Mapped(self.lin, x, samples)
        return samples.shaped(self._convolved_with(graph, self.message_quantizer, mapped, self.bias))

    def _graph(self: Any, edge_index: Any, edge_weight: Tensor | None, samples: Samples) -> NormalizedGraph:
        """The operator of this layer; for several samples as many copies of the graph, side by side."""
        graph = self.normalized(edge_index, edge_weight, samples.num_nodes, samples.copies)
        return watched_graph(self, graph, samples, edge_index, edge_weight) if is_watched(self) else graph

    def normalized(
        self: Any, edge_index: Any, edge_weight: Tensor | None, num_nodes: int, copies: int = 1
    ) -> NormalizedGraph:
        """The operator, by kernels, of ``copies`` of a graph with ``num_nodes`` nodes."""
        return gcn_graph(
            edge_index,
            edge_weight,
            num_nodes,
            improved=self.improved,
            add_self_loops=self.add_self_loops,
            normalize=self.normalize,
            flow=self.flow,
            dtype=self._precision(self.lin),
            copies=copies,
        )


def refusal(layer: Any) -> str | None:
    """Why a convolution with a site ``message`` is not packed: in floats where messages are not quantized."""
    if layer.explain:
        return "explain mode"
    if layer.message_quantizer.bits == OFF:
        return "messages in 32 bits"
    return None if layer.message_quantizer.log_scale.dtype == torch.float32 else "its ranges are not float32"


class QuantizedGCNConv(GCN, Trainable):
    """Quantized :class:`torch_geometric.nn.GCNConv`."""

    aggregations = SUM
    forward = trainable(GCN.forward)

    def _runs_floats(self, x: Any) -> bool:
        return self.is_off or isinstance(x, (tuple, list))


class PackedGCNConv(GCN, Frozen):
    """Packed :class:`torch_geometric.nn.GCNConv`."""

    _convolved = inference(GCN.forward, direct_gcn)

    def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        few = direct_gcn(self, x, edge_index, edge_weight)
        return self._convolved(x, edge_index, edge_weight) if few is None else few


register_layer(GCNConv, QuantizedGCNConv)
register_packed(QuantizedGCNConv, PackedGCNConv)
