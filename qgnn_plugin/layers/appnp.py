"""APPNP: K steps of quantized propagation, a range of its own for every step."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..quantizers import QLRQuantizer
from ..smp.constraint import attach_constraint
from .base import QuantizerDict, SiteFactory
from .gcn import propagate_codes
from .graph import NormalizedGraph, gcn_graph
from .message_passing import QuantizedConv

__all__ = ["QuantizedAPPNP"]


class QuantizedAPPNP(QuantizedConv):
    r"""Quantized :class:`torch_geometric.nn.APPNP`: :math:`x \leftarrow (1 - \alpha) \hat A Q_k(x) + \alpha Q(h)`."""

    input_quantizer: QLRQuantizer
    step_quantizers: QuantizerDict

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.input_quantizer = sites.features("input")
        layer.step_quantizers = QuantizerDict({str(k): sites.message(f"step{k}") for k in range(layer.K)})
        attach_constraint(layer, sites.config.smp, sites.device)

    def forward(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        if self.is_off:
            return super().forward(x, edge_index, edge_weight)  # type: ignore[misc]
        self.refuse_explain()
        graph = gcn_graph(
            edge_index,
            edge_weight,
            x.size(0),
            add_self_loops=self.add_self_loops,
            normalize=self.normalize,
            flow=self.flow,
            dtype=x.dtype,
        )
        h = self.input_quantizer(x).dequantize()
        out = h
        for quantizer in self.step_quantizers.values():
            step = self._dropped(graph)
            out = propagate_codes(out, step, quantizer) * (1 - self.alpha) + h * self.alpha
        return self.smooth(h, out, graph.apply, graph.plan.num_edges)

    def _dropped(self: Any, graph: NormalizedGraph) -> NormalizedGraph:
        """Drop edges in training, as APPNP's ``dropout`` does."""
        if not (self.dropout > 0 and self.training):
            return graph
        weight = graph.weight if graph.weight is not None else graph.plan.degree.new_ones(graph.plan.num_edges)
        return NormalizedGraph(graph.plan, F.dropout(weight, p=self.dropout), graph.source, graph.target)
