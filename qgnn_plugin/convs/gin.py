"""GINConv: sum integer codes of the node features, then the layer's own (converted) network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import GINConv

from ..layers import compressed
from ..layers.arithmetic import aggregate_sum, own_copy
from ..layers.base import SiteFactory
from ..layers.errors import names_layer
from ..layers.graph import NormalizedGraph, graph_size, plain_graph
from ..layers.message_passing import QuantizedConv
from ..layers.registry import register_layer
from ..layers.samples import Pair
from ..layers.watched import is_watched, pair_of, through_pyg
from ..quantizers import QLRQuantizer, QuantizedTensor
from ..quantizers.autocast import full_precision
from ..smp.constraint import Operator, attach_constraint

__all__ = ["QuantizedGINConv", "mean_with_self"]


def mean_with_self(graph: NormalizedGraph, out: Tensor, own: Tensor | float) -> tuple[Operator, Tensor]:
    """The mean over neighbours and ``own`` times the node itself, and the total weights ``[N, 1]`` it divides by."""
    mass = graph.apply(torch.ones_like(out[:, :1])) + own
    mass = torch.where(mass > 0, mass, torch.ones_like(mass))
    return lambda v: (graph.apply(v) + own * v) / mass, mass


class QuantizedGINConv(QuantizedConv):
    """Quantized :class:`torch_geometric.nn.GINConv`: a node's own features are read from the same codes."""

    message_quantizer: QLRQuantizer

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.message_quantizer = sites.features("message") if sites.first[0] else sites.message("message")
        attach_constraint(layer, sites.config.smp, sites.device)

    @names_layer
    @full_precision
    def forward(self: Any, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        x_src = x if isinstance(x, Tensor) else x[0]
        if self.is_off or not x_src.is_floating_point():
            return super().forward(x, edge_index, size)  # type: ignore[misc]
        samples, x_src, x_dst, num_src, num_dst = Pair.of(self, (x, x) if isinstance(x, Tensor) else x)
        own_weight = 1 + self.eps
        sent = self.message_quantizer(own_copy(x_src), codes_kept=own_weight.requires_grad)
        shape = graph_size(self, edge_index, num_src, num_dst, size)
        sums = self.aggr in ("add", "sum")
        own = None
        if x_dst is not None:
            own = sent if x_dst is x_src else self.message_quantizer(own_copy(x_dst))
        if sums:
            graph = plain_graph(edge_index, shape, self.flow, copies=samples.copies)
        if is_watched(self) or not sums:
            x = pair_of(self, samples, sent.dequantize(), None if own is None else own.dequantize())
            out = samples.rows(through_pyg(self, edge_index, size, x=x))
        else:
            out = aggregate_sum(sent, graph.plan, graph.weight, exact=not self.training)
        if own is not None:
            out = out + _multiple(own, own_weight)
        if sums and x_dst is x_src and self._minds_change:
            # A sum grows with the degree; the constraint is on the mean that it is a multiple of.  Where no correction
            # acts it is measured only.
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._is_smoothing):
                mean, mass = mean_with_self(graph, out, own_weight)
                smoothed = self._smooth(sent.dequantize(), out / mass, mean, graph.plan.num_edges, averaged=True)
            out = smoothed * mass if self._is_smoothing else out
        return self.nn(samples.shaped(out))


def _multiple(x: QuantizedTensor, factor: Tensor) -> Tensor:
    """``t x^`` of a scalar ``t``."""
    return factor * x.dequantize() if x.packed is None else compressed.multiple(x.codes, factor, x.packed)


register_layer(GINConv, QuantizedGINConv)
