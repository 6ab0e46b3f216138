"""GINConv: sum integer codes of the node features, then the layer's own (converted) network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import GINConv

from ..graph.adjacency import NormalizedGraph, graph_size, plain_graph
from ..graph.samples import Pair
from ..layers.arithmetic import own_copy
from ..layers.base import SiteFactory
from ..layers.errors import REFUSALS, name_layer
from ..layers.registry import register_layer
from ..layers.watched import is_watched, pair_of, through_pyg
from ..packing.direct.convs import direct_gin
from ..packing.layers.base import register_packed
from ..packing.layers.conv import packed_dense
from ..packing.layers.few_rows import is_few
from ..packing.layers.guard import inference
from ..packing.lazy.calls import is_deferring
from ..packing.lazy.deferred import DeferredTensor
from ..quantizers import QuantizedTensor
from ..smp.constraint import Operator, attach_constraint
from .base import Codes, Convolution, Frozen, Result, Trainable, trainable
from .gcn import refusal

__all__ = ["GIN", "PackedGINConv", "QuantizedGINConv", "mean_with_self"]


def mean_with_self(graph: NormalizedGraph, out: Tensor, own: Tensor | float) -> tuple[Operator, Tensor]:
    """The mean over neighbours and ``own`` times the node itself, and the total weights ``[N, 1]`` it divides by."""
    mass = graph.apply(torch.ones_like(out[:, :1])) + own
    mass = torch.where(mass > 0, mass, torch.ones_like(mass))
    return lambda v: (graph.apply(v) + own * v) / mass, mass


class GIN(Convolution):
    r""":math:`h\big((1 + \epsilon) x^_i + \sum_j x^_j\big)`: a node's own features are read from the same codes."""

    message_quantizer: Any
    nn: Any
    eps: Tensor

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.message_quantizer = sites.features("message") if sites.entrance.is_open else sites.message("message")
        attach_constraint(layer, sites.config.smp, sites.device)

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        return refusal(layer) if layer.aggr in ("add", "sum") else f"aggregation {layer.aggr!r}"

    def forward(self: Any, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        """As :class:`torch_geometric.nn.GINConv`; ``x`` may be a pair."""
        samples, x_src, x_dst, num_src, num_dst = Pair.of(self, (x, x) if isinstance(x, Tensor) else x)
        own_weight, same, own = 1 + self.eps, x_dst is x_src, None
        sent = self._rows(self.message_quantizer(own_copy(x_src), codes_kept=own_weight.requires_grad))
        if x_dst is not None:
            own = sent if same else self._rows(self.message_quantizer(own_copy(x_dst)))
        shape, sums = graph_size(self, edge_index, num_src, num_dst, size), self.aggr in ("add", "sum")
        if sums:
            graph = plain_graph(edge_index, shape, self.flow, copies=samples.copies)
        if is_watched(self) or not sums:
            pair = pair_of(self, samples, sent.dequantize(), None if own is None else own.dequantize())
            out = samples.rows(through_pyg(self, edge_index, size, x=pair))
        else:
            out = self._sums(sent, graph)
        if own is not None:
            out = self._plus(self._multiple(own, own_weight), out)
        if sums and same and self._minds_change:
            out = self._smoothed(sent, self._floats(out), graph, own_weight)
        return self.nn(samples.shaped(self._finished(out)))

    def _rows(self, codes: Codes) -> Codes:
        """Codes as a sum and a multiple both take them."""
        return codes

    def _smoothed(self: Any, sent: Codes, out: Tensor, graph: NormalizedGraph, own_weight: Tensor) -> Tensor:
        """Corrected, or measured only.

        A sum grows with the degree; the constraint is on the mean that it is a multiple of.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._is_smoothing):
            mean, mass = mean_with_self(graph, out, own_weight)
            smoothed = self._smooth(sent.dequantize(), out / mass, mean, graph.plan.num_edges, averaged=True)
        return smoothed * mass if self._is_smoothing else out


class QuantizedGINConv(GIN, Trainable):
    """Quantized :class:`torch_geometric.nn.GINConv`."""

    forward = trainable(GIN.forward)

    def _runs_floats(self, x: Any) -> bool:
        return self.is_off or not (x if isinstance(x, Tensor) else x[0]).is_floating_point()


class PackedGINConv(GIN, Frozen):
    """Packed :class:`torch_geometric.nn.GINConv`."""

    _convolved = inference(GIN.forward, direct_gin)

    def forward(self, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        few = direct_gin(self, x, edge_index, size)
        return self._convolved(x, edge_index, size) if few is None else few

    def _through_network(self, sums: Tensor) -> Tensor:
        try:
            if not torch.is_grad_enabled():
                return self.nn(sums)
            with torch.no_grad():
                return self.nn(sums)
        except REFUSALS as error:
            name_layer(error, self._packed.spec.name)
            raise

    def _rows(self, codes: Codes) -> Codes:
        return packed_dense(codes) if isinstance(codes, QuantizedTensor) else codes

    def _finished(self, result: Result) -> Tensor:
        if isinstance(result, Tensor):
            return result
        few = is_few(result.num_rows * result.num_features)  # of which floats go the short way through linear layers
        return DeferredTensor(result) if is_deferring() and not few else result()


register_layer(GINConv, QuantizedGINConv)
register_packed(QuantizedGINConv, PackedGINConv)
