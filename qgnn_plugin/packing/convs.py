"""Packed GCNConv, SAGEConv and GINConv."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import OFF
from ..convs.deep import DeepGCNConv
from ..convs.gcn import QuantizedGCNConv
from ..convs.gin import QuantizedGINConv, mean_with_self
from ..convs.sage import SUMS, QuantizedSAGEConv, Sampled, _transforms_first
from ..layers.errors import REFUSALS, name_layer
from ..layers.graph import NormalizedGraph, gcn_graph, graph_size, mean_graph, plain_graph
from ..layers.samples import Pair, Samples
from ..layers.watched import is_hooked, is_watched, mapped_by_call, pair_of, through_pyg, values_mapped, watched_graph
from ..quantizers import QuantizedTensor
from ..smp.deep import DeepLayer
from .base import Activation, LayerSpec, PackedConv, inference, packed_dense, register_packed
from .deferred import DeferredTensor, Producer, added, computed, conclude, is_deferring, plain
from .direct import is_few
from .direct_convs import direct_gcn, direct_gin, direct_sage
from .linear import PackedLinear
from .ranges import PackedRange, PackedTensor

__all__ = ["PackedDeepGCNConv", "PackedGCNConv", "PackedGINConv", "PackedSAGEConv"]


class PackedGCNConv(PackedConv):
    r"""Packed GCNConv: :math:`t_i \sum_j w_{ij} Q(s_j z_j) + b` with ``z`` from the integer product."""

    message_quantizer: PackedRange
    bias: Tensor | None
    lin: Any
    improved: bool
    add_self_loops: bool
    normalize: bool
    flow: str

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        return _refusal(layer, layer.message_quantizer)

    def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        """``[N, in_channels]`` to ``[N, out_channels]``, as :class:`torch_geometric.nn.GCNConv`."""
        few = direct_gcn(self, x, edge_index, edge_weight)
        return self._convolved(x, edge_index, edge_weight) if few is None else few

    @inference
    def _convolved(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> Tensor:
        if isinstance(x, (tuple, list)):
            raise ValueError(f"Expected one feature matrix in '{self._qualified_name}', a GCNConv (got a pair)")
        samples = Samples.of(self, x)
        graph = self.normalized(edge_index, edge_weight, samples.num_nodes, samples.copies)
        if is_watched(self):
            graph = watched_graph(self, graph, samples, edge_index, edge_weight)
        sent, z = self._messages(x, samples, graph)
        if z is None or self._smp is None:
            return samples.shaped(self.deferred(self.aggregation(sent, graph, bias=self.bias)))
        out = self._smooth(z, self.aggregated(sent, graph), graph.apply, graph.plan.num_edges)
        return samples.shaped(out if self.bias is None else out + self.bias)

    def normalized(
        self, edge_index: Any, edge_weight: Tensor | None, num_nodes: int, copies: int = 1
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
            dtype=torch.float32,
            copies=copies,
        )

    def _messages(self, x: Tensor, samples: Samples, graph: NormalizedGraph) -> tuple[Activation, Tensor | None]:
        """What neighbours send, and the transformed features where they were written."""
        lin = self.lin
        if self._smp is None and isinstance(lin, PackedLinear):
            factor = None if graph.source is None else graph.source.view(-1)
            fused = lin.packed_to(lin.quantize(samples.rows(x)), self.message_quantizer, lin.bias, factor)
            if fused is not None:
                return fused, None
        z = samples.rows(lin(x))
        return self.message_quantizer(z if graph.source is None else z * graph.source), z


class PackedDeepGCNConv(DeepLayer, PackedGCNConv):
    """Packed GCNConv in a deep stack: a sum of packed features, then the integer product of their residual sum."""

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        assert spec.deep_place is not None
        assert spec.config.smp is not None
        self._deep_place, self._deep_config = spec.deep_place, spec.config.smp

    @inference
    def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        """``[N, F]`` to ``[N, F]``."""
        x = plain(x)
        initial = self.initial_features(x)
        samples = Samples.of(self, x)
        graph = self.normalized(edge_index, edge_weight, samples.num_nodes, samples.copies)
        if is_watched(self):
            graph = watched_graph(self, graph, samples, edge_index, edge_weight)
        rows = samples.rows(x)
        out = self.aggregated(self.message_quantizer(rows if graph.source is None else rows * graph.source), graph)
        if self._smp is not None:
            out = self._smooth(rows, out, graph.apply, graph.plan.num_edges)
        support = self.with_initial(samples.shaped(out), initial)
        out = self.identity_mapped(support, self.lin(support))
        return out if self.bias is None else out + self.bias


class PackedSAGEConv(PackedConv):
    """Packed SAGEConv: one packed input feeds both linear maps, in the order the converted layer chose."""

    uncalled_maps = ("lin_l",)
    input_quantizer: PackedRange
    message_quantizer: PackedRange
    target_quantizer: PackedRange | None
    lin: Any
    lin_l: PackedLinear
    lin_r: PackedLinear
    aggr: str
    flow: str
    normalize: bool
    project: bool
    root_weight: bool

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        self._maps_first = _transforms_first(layer)
        if "target_quantizer" not in spec.sites:
            self.target_quantizer = None

    def upgrade(self, state: dict[str, Any]) -> None:
        super().upgrade(state)
        state["_maps_first"] = state["transforms_first"]

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        inner = [layer.lin_l, layer.lin_r] if layer.root_weight else [layer.lin_l]
        if layer.explain:
            return "explain mode"
        if layer.is_off and all(lin.is_off for lin in inner):
            return "32 bits"
        if any(lin.weight.dtype != torch.float32 for lin in inner):
            return "its weights are not float32"
        if layer.aggr not in (*SUMS, "max"):
            return f"aggregation {layer.aggr!r}"
        rows = layer.input_quantizer.granularity in ("node", "row") or layer.input_quantizer.is_zero_one
        if layer.aggr == "max" and (rows or layer.input_quantizer.bits == OFF):
            return "a maximum over ranges per node"
        return None

    def forward(self, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        """As :class:`torch_geometric.nn.SAGEConv`; ``x`` may be a pair."""
        few = direct_sage(self, x, edge_index, size)
        return self._convolved(x, edge_index, size) if few is None else few

    @inference
    def _convolved(self, x: Any, edge_index: Any, size: Any) -> Tensor:
        x_src, x_dst = (x, x) if isinstance(x, Tensor) else x
        if self.project and self.lin is not None:
            x_src = self.lin(x_src).relu()
        pair = Pair.of(self, (x_src, x_dst))
        sent = self.input_quantizer(pair.sent)
        graph = Sampled.of(self, edge_index, pair, size)
        graph = graph.watched(self, pair)
        out = self._neighbours(sent, graph, smooth=x_dst is x_src)
        if self.root_weight and pair.own is not None:
            target = sent
            if self.target_quantizer is not None:
                target = self.target_quantizer(pair.own)
            elif pair.own is not pair.sent:
                target = self.input_quantizer(pair.own)
            out = added(out, _mapped(self.lin_r, target))
        if self.normalize:
            out = out.then(partial(F.normalize, p=2.0, dim=-1))
        return pair.samples.shaped(self.deferred(out))

    def _graph(self, sampled: Sampled) -> NormalizedGraph:
        make = mean_graph if self.aggr == "mean" else plain_graph
        return make(sampled.edge_index, sampled.size, self.flow, copies=sampled.samples.copies)

    def _neighbours(self, sent: Activation, sampled: Sampled, smooth: bool) -> Producer:
        """What neighbours bring, transformed."""
        lin, bias, graph = self.lin_l, self.lin_l.bias, self._graph(sampled)
        if sampled.propagate is not None:
            return self._watched_neighbours(sent, sampled, sampled.propagate(sent.dequantize()), smooth)
        if not self._maps_first:
            assert lin.input_quantizer is not None
            if self.aggr == "max" and graph.weight is not None:  # values of a matrix multiply what the maximum is of
                largest = lin.input_quantizer(QuantizedSAGEConv._propagated(self, sent.dequantize(), sampled))
            else:
                options = {"reduce": "max"} if self.aggr == "max" else {}
                largest = lin.input_quantizer.of(self.aggregation(sent, graph, **options))
            return _mapped(lin, largest)
        if self._smp is None or not smooth:
            messages: Activation | None = lin.packed_to(sent, self.message_quantizer)
            if messages is None:
                messages = self.message_quantizer(lin.apply_to(sent, None))
            return self.aggregation(messages, graph, bias=bias)
        z = lin.apply_to(sent, None)
        return self._corrected(z, self.aggregated(self.message_quantizer(z), graph), sampled)

    def _watched_neighbours(self, sent: Activation, sampled: Sampled, out: Tensor, smooth: bool) -> Producer:
        """The same, from what PyG's ``propagate`` has summed up."""
        lin, bias = self.lin_l, self.lin_l.bias
        if not self._maps_first:
            return computed(lin(out)) if is_hooked(lin) else _mapped(lin, lin.quantize(out))
        out = values_mapped(lin, out)
        if self._smp is not None and smooth:
            return self._corrected(lin.apply_to(sent, None), out, sampled)
        return computed(out if bias is None else out + bias)

    def _corrected(self, z: Tensor, out: Tensor, sampled: Sampled) -> Producer:
        """Smoothed, with the bias."""
        bias, graph = self.lin_l.bias, self._graph(sampled)
        smoother = mean_graph(sampled.edge_index, sampled.size, self.flow, copies=sampled.samples.copies)
        out = self._smooth(z, out, smoother.apply, graph.plan.num_edges)
        return computed(out if bias is None else out + bias)


def _mapped(lin: PackedLinear, x: Activation) -> Producer:
    """``lin(x)``, as a call where somebody looks at it."""
    if is_hooked(lin):
        return computed(plain(mapped_by_call(lin, x)))
    return lin.product(x, lin.bias) or computed(lin.apply_to(x, lin.bias))


class PackedGINConv(PackedConv):
    """Packed GINConv: sums of packed features, the node's own from the same codes, then the layer's network."""

    message_quantizer: PackedRange
    nn: Any
    eps: Tensor
    flow: str

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        if layer.aggr not in ("add", "sum"):
            return f"aggregation {layer.aggr!r}"
        return _refusal(layer, layer.message_quantizer)

    def forward(self, x: Any, edge_index: Any, size: Any = None) -> Tensor:
        """As :class:`torch_geometric.nn.GINConv`; ``x`` may be a pair."""
        few = direct_gin(self, x, edge_index, size)
        return self._convolved(x, edge_index, size) if few is None else self._through_network(few)

    def _through_network(self, sums: Tensor) -> Tensor:
        try:
            if not torch.is_grad_enabled():
                return self.nn(sums)
            with torch.no_grad():
                return self.nn(sums)
        except REFUSALS as error:
            name_layer(error, self._packed.spec.name)
            raise

    @inference
    def _convolved(self, x: Any, edge_index: Any, size: Any) -> Tensor:
        samples, x_src, x_dst, num_src, num_dst = Pair.of(self, (x, x) if isinstance(x, Tensor) else x)
        sent = self.message_quantizer(x_src)
        if isinstance(sent, QuantizedTensor):
            sent = packed_dense(sent)
        shape = graph_size(self, edge_index, num_src, num_dst, size)
        graph = plain_graph(edge_index, shape, self.flow, copies=samples.copies)
        same, own = x_dst is x_src, None
        if x_dst is not None:
            own = sent if same else self.message_quantizer(x_dst)
        if is_watched(self):
            pair = pair_of(self, samples, sent.dequantize(), None if own is None else own.dequantize())
            out = computed(samples.rows(through_pyg(self, edge_index, size, x=pair)))
        else:
            out = self.aggregation(sent, graph)
        if own is not None:
            share = self._own(own if isinstance(own, PackedTensor) else packed_dense(own))
            out = added(share, out) if out.adds else added(out, share)
        if self._smp is not None and x_dst is not None and same:
            return self.nn(samples.shaped(self._smoothed(sent.dequantize(), out(), graph)))
        few = is_few(out.num_rows * out.num_features)  # of which floats go the short way through linear layers
        return self.nn(samples.shaped(DeferredTensor(out) if is_deferring() and not few else out()))

    def _own(self, x: PackedTensor) -> Producer:
        """The node's own share, ``(1 + eps) x``."""

        def run(start: int, stop: int, **more: Any) -> Tensor:
            return conclude(x.rows(start, stop).dequantize().mul_(1 + self.eps), **more)

        return Producer(x.words.size(0), x.num_features, x.words.device, run, is_fused=False)

    def _smoothed(self, z: Tensor, out: Tensor, graph: NormalizedGraph) -> Tensor:
        mean, mass = mean_with_self(graph, out, 1 + self.eps)
        return self._smooth(z, out / mass, mean, graph.plan.num_edges) * mass


def _refusal(layer: Any, message: Any) -> str | None:
    """What GCNConv and GINConv have in common: they run in floats where messages are not quantized."""
    if layer.explain:
        return "explain mode"
    if message.bits == OFF:
        return "messages in 32 bits"
    return None if message.log_scale.dtype == torch.float32 else "its ranges are not float32"


for _mixin, _packed in {
    QuantizedGCNConv: PackedGCNConv,
    DeepGCNConv: PackedDeepGCNConv,
    QuantizedSAGEConv: PackedSAGEConv,
    QuantizedGINConv: PackedGINConv,
}.items():
    register_packed(_mixin, _packed)
