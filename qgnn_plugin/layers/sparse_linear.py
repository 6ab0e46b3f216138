"""``SparseLinear`` of :class:`torch_geometric.nn.LINKX`: a linear map of the adjacency, sums of rows of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graph.adjacency import NormalizedGraph, gcn_graph
from ..quantizers import QuantizedTensor
from ..quantizers.autocast import full_precision
from .arithmetic import aggregate_sum
from .embedding import table_site
from .products import QuantizedWeights
from .watched import is_watched, own_propagate

__all__ = ["QuantizedSparseLinear", "adjacency_of"]


def adjacency_of(layer: Any, edge_index: Any, edge_weight: Tensor | None) -> NormalizedGraph:
    """The adjacency as an operator on the rows of the weight."""
    return gcn_graph(
        edge_index,
        edge_weight,
        layer.in_channels,
        add_self_loops=False,
        normalize=False,
        flow=layer.flow,
        dtype=torch.float32,
    )


class QuantizedSparseLinear(QuantizedWeights):
    """Quantized ``SparseLinear``.  Site: ``weight``, its rows, with a range each as those of an embedding."""

    in_channels: int
    bias: Tensor | None
    flow: str

    @classmethod
    def attach(cls, layer: Any, sites: Any) -> None:
        layer.weight_quantizer = table_site(sites)

    @full_precision
    def forward(self, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        """As the float layer's: ``[N, out_channels]`` of the edges among ``N = in_channels`` nodes."""
        rows: QuantizedTensor = self._quantized_weight("weight")
        if self.is_off or rows.qmax is None or is_watched(self):
            return self._of_values(rows.dequantize(), edge_index, edge_weight)
        graph = adjacency_of(self, edge_index, edge_weight)
        out = aggregate_sum(rows, graph.plan, graph.weight, exact=not self.training)
        return out if self.bias is None else out + self.bias

    def _of_values(self: Any, values: Tensor, edge_index: Any, edge_weight: Tensor | None) -> Tensor:
        """By PyG's own message passing."""
        out = own_propagate(self)(self, edge_index, weight=values, edge_weight=edge_weight)
        return out if self.bias is None else out + self.bias
