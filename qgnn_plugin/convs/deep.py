r"""Converted convolutions of a deep stack (see :mod:`qgnn_plugin.smp.deep`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..graph.adjacency import gcn_graph
from ..graph.samples import Samples
from ..layers.base import SiteFactory
from ..layers.errors import names_layer
from ..layers.message_passing import QuantizedConv, QuantizedMessagePassing
from ..layers.own_weights import QuantizedOwnConv
from ..layers.registry import register_deep
from ..packing.layers.base import LayerSpec, register_packed
from ..packing.layers.guard import inference
from ..packing.lazy.deferred import materialized
from ..quantizers import QLRQuantizer
from ..quantizers.autocast import full_precision
from ..smp.constraint import attach_constraint
from ..smp.deep import DeepLayer, conv_widths
from .attention import QuantizedGATConv, QuantizedGATv2Conv
from .base import code_sums, scaled, trainable
from .gcn import PackedGCNConv, QuantizedGCNConv
from .gin import QuantizedGINConv
from .hops import QuantizedSGConv, QuantizedSSGConv, QuantizedTAGConv
from .sage import QuantizedSAGEConv

__all__ = ["DeepConv", "DeepGCNConv", "PackedDeepGCNConv"]


class DeepGCN(DeepLayer):
    r"""GCNConv in a deep stack, GCNII's own layer: aggregate the quantized features, then map their residual sum."""

    def forward(self: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        """``[N, F]`` to ``[N, F]``."""
        x = materialized(x)
        initial, samples = self.initial_features(x), Samples.of(self, x)
        graph, rows = self._graph(edge_index, edge_weight, samples), samples.rows(x)
        out = self._corrected(rows, self._averaged(rows, graph, self.message_quantizer), graph, None)
        support = self.with_initial(samples.shaped(out), initial)
        out = self.identity_mapped(support, self.lin(support))
        return out if self.bias is None else out + self.bias


class DeepGCNConv(DeepGCN, QuantizedGCNConv):
    """Quantized GCNConv in a deep stack."""

    forward = trainable(DeepGCN.forward)

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer._deep_place, layer._deep_config = sites.place, sites.config.smp
        # What is sent are the features themselves, often non-negative: levels of messages are not for them.
        if sites.entrance.is_open:
            layer.message_quantizer = sites.features("message", layer.in_channels)
        else:
            layer.message_quantizer = sites.make("message", "message", channels=layer.in_channels)
        attach_constraint(layer, sites.config.smp, sites.device)

    def _runs_floats(self, x: Any) -> bool:
        return False


class PackedDeepGCNConv(DeepGCN, PackedGCNConv):
    """Packed GCNConv in a deep stack: a sum of packed features, then the integer product of their residual sum."""

    forward = inference(DeepGCN.forward)

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        assert spec.deep_place is not None
        assert spec.config.smp is not None
        self._deep_place, self._deep_config = spec.deep_place, spec.config.smp


class DeepConv(DeepLayer, QuantizedConv):
    r"""Any other convolution ``C`` in a deep stack.

    .. math:: H' = (1 - b_l) \big((1 - a) P H + a H_0\big) + b_l\, C\big((1 - a) H + a H_0\big)

    with ``P`` the normalized adjacency of GCN: ``C`` need not be linear, nor say which operator it propagates with.
    """

    support_quantizer: QLRQuantizer

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer._deep_place, layer._deep_config = sites.place, sites.config.smp
        super().attach(layer, sites)
        widths = conv_widths(layer)
        layer.support_quantizer = sites.make("message", "support", channels=widths and widths[0])

    @names_layer
    @full_precision
    def forward(self: Any, x: Tensor, edge_index: Any, *args: Any, **kwargs: Any) -> Any:
        initial = self.initial_features(x)
        mixed = self.with_initial(x, initial)
        out = super().forward(mixed, edge_index, *args, **kwargs)  # type: ignore[misc]
        if self.identity_strength == 1:
            return out
        samples = Samples.of(self, x)
        graph = gcn_graph(edge_index, None, samples.num_nodes, flow=self.flow, dtype=x.dtype, copies=samples.copies)
        sent = self.support_quantizer(scaled(samples.rows(x), graph.source))
        averaged = code_sums(sent, graph, exact=not self.training)
        support = self.with_initial(samples.shaped(averaged), initial)
        if isinstance(out, tuple):  # with attention weights
            return (self.identity_mapped(support, out[0]), *out[1:])
        return self.identity_mapped(support, out)


class DeepSAGEConv(DeepConv, QuantizedSAGEConv):
    """SAGEConv in a deep stack."""


class DeepGINConv(DeepConv, QuantizedGINConv):
    """GINConv in a deep stack."""


class DeepGATConv(DeepConv, QuantizedGATConv):
    """GATConv in a deep stack."""


class DeepGATv2Conv(DeepConv, QuantizedGATv2Conv):
    """GATv2Conv in a deep stack."""


class DeepSGConv(DeepConv, QuantizedSGConv):
    """SGConv in a deep stack."""


class DeepSSGConv(DeepConv, QuantizedSSGConv):
    """SSGConv in a deep stack."""


class DeepTAGConv(DeepConv, QuantizedTAGConv):
    """TAGConv in a deep stack."""


class DeepMessagePassing(DeepConv, QuantizedMessagePassing):
    """Any other ``MessagePassing`` in a deep stack."""


for _mixin, _deep in {
    QuantizedGCNConv: DeepGCNConv,
    QuantizedSAGEConv: DeepSAGEConv,
    QuantizedGINConv: DeepGINConv,
    QuantizedGATConv: DeepGATConv,
    QuantizedGATv2Conv: DeepGATv2Conv,
    QuantizedSGConv: DeepSGConv,
    QuantizedSSGConv: DeepSSGConv,
    QuantizedTAGConv: DeepTAGConv,
    QuantizedMessagePassing: DeepMessagePassing,
    QuantizedOwnConv: DeepMessagePassing,
}.items():
    register_deep(_mixin, _deep)

register_packed(DeepGCNConv, PackedDeepGCNConv)
