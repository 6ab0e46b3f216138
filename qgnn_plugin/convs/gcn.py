"""GCNConv: transform, scale by ``d^-1/2``, quantize once per node, sum integer codes, scale by ``d^-1/2``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch_geometric.nn import GCNConv

from ..layers import compressed
from ..layers.arithmetic import aggregate_sum
from ..layers.base import SiteFactory
from ..layers.errors import names_layer
from ..layers.graph import NormalizedGraph, gcn_graph
from ..layers.message_passing import QuantizedConv, require_sum
from ..layers.registry import register_layer
from ..layers.samples import Samples
from ..layers.watched import is_watched, watched_graph
from ..quantizers import QLRQuantizer
from ..quantizers.autocast import full_precision
from ..smp.constraint import attach_constraint

__all__ = ["QuantizedGCNConv", "propagate_codes"]


def propagate_codes(z: Tensor, graph: NormalizedGraph, quantizer: QLRQuantizer) -> Tensor:
    r""":math:`t_i \sum_j w_{ij} Q(s_j z_j)`: the source factor goes in before quantization, the target factor after."""
    messages = quantizer(z if graph.source is None else compressed.row_scaled(z, graph.source))
    if graph.propagate is not None:
        return graph.propagated(messages.dequantize())
    out = aggregate_sum(messages, graph.plan, graph.weight, exact=not quantizer.training)
    return out if graph.target is None else out * graph.target


class QuantizedGCNConv(QuantizedConv):
    """Quantized :class:`torch_geometric.nn.GCNConv`."""

    message_quantizer: QLRQuantizer

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        require_sum(layer, sites)
        layer.message_quantizer = sites.message("message", layer.out_channels)
        attach_constraint(layer, sites.config.smp, sites.device)

    @names_layer
    @full_precision
    def forward(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        if self.is_off or isinstance(x, (tuple, list)):
            return super().forward(x, edge_index, edge_weight)  # type: ignore[misc]
        samples = Samples.of(self, x)
        graph = self.normalized(edge_index, edge_weight, samples.num_nodes, samples.copies)
        if is_watched(self):
            graph = watched_graph(self, graph, samples, edge_index, edge_weight)
        z = samples.rows(self.lin(x))
        out = propagate_codes(z, graph, self.message_quantizer)
        out = self._smooth(z, out, graph.apply, graph.plan.num_edges, averaged=True)
        return samples.shaped(out if self.bias is None else out + self.bias)

    def normalized(
        self: Any, edge_index: Any, edge_weight: Tensor | None, num_nodes: int, copies: int = 1
    ) -> NormalizedGraph:
        """The operator of this layer; for ``copies`` of the graph side by side."""
        return gcn_graph(
            edge_index,
            edge_weight,
            num_nodes,
            improved=self.improved,
            add_self_loops=self.add_self_loops,
            normalize=self.normalize,
            flow=self.flow,
            dtype=self.lin.weight.dtype,
            copies=copies,
        )


register_layer(GCNConv, QuantizedGCNConv)
