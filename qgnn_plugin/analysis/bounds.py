r"""What quantized sites do to one layer: measured, and bounded from step sizes (derivations: docs/error_bound.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import ClusterGCNConv, GCN2Conv, GraphConv, MessagePassing, MFConv, SimpleConv

from ..config import OFF
from ..convs.attention import QuantizedGATConv, QuantizedGATv2Conv
from ..convs.deep import DeepConv, DeepGCNConv
from ..convs.gcn import QuantizedGCNConv
from ..convs.gin import QuantizedGINConv
from ..convs.sage import QuantizedSAGEConv
from ..convs.steps import QuantizedPropagation
from ..graph.adjacency import NormalizedGraph, edges_of, gcn_graph, mean_graph, plain_graph
from ..kernels.plan import GraphPlan
from ..kernels.spmm import spmm
from ..layers.base import QuantizedLayer
from ..layers.linear import QuantizedLinear
from ..layers.message_passing import QuantizedMessagePassing
from ..quantizers import QLRQuantizer
from ..smp.constraint import corrected
from ..smp.deep import DeepLayer
from ..smp.descent import StepFactors
from .injection import Passed, bypassed, injection, watched
from .measured_error import MeasuredError, Rerun
from .operators import Correction, OperatorBound, column_norm, operator_bound, operator_of
from .propagation_error import measured_propagation

__all__ = ["measured_error_of", "sites_of"]

AVERAGE = StepFactors(0.0, 1.0, 0.0)  # a convolution as a step of a propagation

# Messages that are the source's state, by a weight of the edge or alone.
SCALED_MESSAGES = tuple(
    conv.message for conv in (MessagePassing, ClusterGCNConv, GCN2Conv, GraphConv, MFConv, SimpleConv)
)


Seen = dict[str, Passed]


def measured_error_of(run: Rerun) -> MeasuredError:
    """Measure and bound the errors of a layer."""
    layer = run.layer
    if all(quantizer.bits == OFF for quantizer in sites_of(layer).values()):
        return MeasuredError(0.0, 0.0, 0.0, 0.0)
    if not isinstance(layer, DeepLayer):
        if isinstance(layer, QuantizedPropagation):
            return measured_propagation(layer, run.call)
        if (found := _collected(run)) is not None:
            return found
    sites = sites_of(layer)
    with watched(*sites.values()) as passed:
        out = run.result()
    with bypassed(*sites.values()):
        exact = run.result()
    seen = dict(zip(sites, passed, strict=True))
    errors = [injection(sites[site], use, None).error for site, uses in seen.items() for use in uses]
    bound, growth = _bound(run, seen)
    carried, norm = float((out - exact).norm()), float(exact.norm())
    return MeasuredError(max(errors, default=0.0), carried, bound, norm, growth=growth)


def sites_of(layer: Any) -> dict[str, QLRQuantizer]:
    """What counts as a layer's quantization: its own sites and, of GCNConv in a deep stack, the input of its map.

    A SAGEConv that maps before it sends has the inputs of its maps as sites of its own; they are not messages.
    """
    sites = dict(layer.own_quantizers())
    if isinstance(layer, QuantizedSAGEConv) and layer.message_quantizer is not None:
        sites = {name: site for name, site in sites.items() if name not in ("input_quantizer", "target_quantizer")}
    lin = getattr(layer, "lin", None) if isinstance(layer, DeepGCNConv) else None
    if isinstance(lin, QuantizedLinear) and lin.input_quantizer is not None:
        sites["lin.input_quantizer"] = lin.input_quantizer
    return sites


def _bound(run: Rerun, seen: Seen) -> tuple[float | str, float | None]:
    """The bound of a layer's result, or why there is none, and the growth of errors of its input where known."""
    layer = run.layer
    if type(layer).quantizes_output:
        return "its result is quantized once more", None
    if not isinstance(run.call.features, Tensor):
        return "its messages go from one set of nodes to another", None
    if run.call.features.dim() != 2:
        return "its features are those of several samples", None
    if isinstance(layer, DeepGCNConv):
        return _deep_gcn(run, seen)
    handler = next((h for mixin, h in _RESULTS.items() if isinstance(layer, mixin)), None)
    bound = _unknown(layer) if handler is None else handler(run, seen)
    if isinstance(layer, DeepConv) and not isinstance(bound, str):
        bound = _deep(run, seen, bound)
    return bound, None


def _unknown(layer: Any) -> str:
    """Why there is no bound of the result of ``layer``."""
    if isinstance(layer, QuantizedGINConv):
        return "a network of its own follows its sum"
    if isinstance(layer, QuantizedPropagation):  # in a deep stack
        return "maps of its own follow its steps"
    if layer._is_smoothing and type(layer).message in SCALED_MESSAGES:
        return "maps of its own follow its corrected aggregate"
    return "what it does with a message is not known"


def _correction(layer: Any, operator: OperatorBound) -> Correction:
    if layer._smp is None:
        return Correction.of(None, 0.0, 0.0, operator)
    return Correction.of(layer._smp, layer._multiplier_value, layer._smp.eta, operator)


def _norm(graph: NormalizedGraph) -> OperatorBound:
    return operator_bound(graph.plan, operator_of(graph))


# Bounds of a layer's result ###########################################################################################


def _gcn(run: Rerun, seen: Seen) -> float:
    graph = run.layer.normalized(run.call.edge_index, run.call.edge_weight, run.call.features.size(0))
    sent, operator = injection(run.layer.message_quantizer, seen["message_quantizer"][0], graph.source), _norm(graph)
    return _correction(run.layer, operator).norm * operator.norm * sent.bound


def _sage(run: Rerun, seen: Seen) -> float | str:
    layer, size = run.layer, (run.call.features.size(0),) * 2
    if layer.message_quantizer is None:
        return "it maps after aggregating"
    if layer.normalize:
        return "the rows of its result are normalized"
    mean = mean_graph(run.call.edge_index, size, layer.flow, torch.float64)
    graph = mean if layer.aggr == "mean" else plain_graph(run.call.edge_index, size, layer.flow)
    sent = injection(layer.message_quantizer, seen["message_quantizer"][0], None)
    return _correction(layer, _norm(mean)).norm * _norm(graph).norm * sent.bound


def _gat(run: Rerun, seen: Seen) -> float:
    """Logits come from unquantized values: the attention is the same with and without quantized messages."""
    return _attention_bound(run, seen, *_attention(run))


def _gatv2(run: Rerun, seen: Seen) -> float:
    """Logits come from quantized values: what another attention does to exact messages comes on top."""
    layer = run.layer
    plan, attention = _attention(run)
    with bypassed(layer.message_quantizer, layer.target_quantizer):
        exact_plan, exact = _attention(run)
    z = seen["message_quantizer"][0][0]

    def attended(plan: GraphPlan, weight: Tensor) -> Tensor:
        operator = partial(spmm, plan, weight=weight)
        if layer._smp is None:
            return operator(z)
        return z + corrected(operator(z) - z, operator, layer._smp, layer._smoothing_force)

    moved = float((attended(plan, attention) - attended(exact_plan, exact)).norm())
    return _attention_bound(run, seen, plan, attention) + moved


def _attention(run: Rerun) -> tuple[GraphPlan, Tensor]:
    """The graph of an attention layer and its weights ``[E, H]``."""
    out, (edges, attention) = run(return_attention_weights=True)
    edges = edges_of(edges, None, run.layer.flow)
    plan = GraphPlan.from_edges(edges.src, edges.dst, out.size(0), out.size(0))
    return plan, plan.sort(attention)


def _attention_bound(run: Rerun, seen: Seen, plan: GraphPlan, attention: Tensor) -> float:
    heads = [operator_bound(plan, attention[:, head]) for head in range(attention.size(1))]
    largest = max(_correction(run.layer, head).norm * head.norm for head in heads)
    return largest * injection(run.layer.message_quantizer, seen["message_quantizer"][0], None).bound


_RESULTS: dict[type[QuantizedLayer], Callable[[Rerun, Seen], float | str]] = {
    QuantizedGCNConv: _gcn,
    QuantizedSAGEConv: _sage,
    QuantizedGATConv: _gat,
    QuantizedGATv2Conv: _gatv2,
}


# Deep stacks ##########################################################################################################


def _deep_gcn(run: Rerun, seen: Seen) -> tuple[float, float]:
    r"""``M ((1 - a) C P Q(x) + a H0)`` with ``M = (1 - b) I + b W``; the input of ``W`` is quantized once more."""
    layer = run.layer
    graph = layer.normalized(run.call.edge_index, run.call.edge_weight, run.call.features.size(0))
    operator, keep = _norm(graph), 1 - layer.initial_residual
    strength = layer.identity_strength
    weight = layer.lin.weight
    if isinstance(layer.lin, QuantizedLinear):
        weight = layer.lin.weight_quantizer(weight).dequantize()
    mapped = (1 - strength) * torch.eye(*weight.shape, dtype=weight.dtype, device=weight.device) + strength * weight
    blend = float(torch.linalg.matrix_norm(mapped, 2))
    bound = blend * keep * _gcn(run, seen)
    for use in seen.get("lin.input_quantizer", ()):
        of_input = injection(layer.lin.input_quantizer, use, None)
        bound += strength * float(torch.linalg.matrix_norm(weight, 2)) * of_input.bound
    return bound, blend * keep * _correction(layer, operator).contraction(AVERAGE, operator)


def _deep(run: Rerun, seen: Seen, bound: float) -> float:
    """``(1 - b) ((1 - a) P Q(x) + a H0) + b C(...)`` around a convolution ``C`` whose own error has ``bound``."""
    layer, x = run.layer, run.call.features
    graph = gcn_graph(run.call.edge_index, None, x.size(0), flow=layer.flow, dtype=x.dtype)
    support = sum(injection(layer.support_quantizer, use, graph.source).bound for use in seen["support_quantizer"])
    strength = layer.identity_strength
    return strength * bound + (1 - strength) * (1 - layer.initial_residual) * _norm(graph).norm * support


# Bounds of what neighbours bring, before maps of the layer's own ######################################################


def _collected(run: Rerun) -> MeasuredError | None:
    """Of a layer that maps what it has aggregated, the error of the aggregate; :obj:`None` for others."""
    layer, mixin = run.layer, type(run.layer).mixin
    features = run.call.features
    if not isinstance(features, Tensor) or features.dim() != 2 or layer._is_smoothing:
        return None
    if issubclass(mixin, QuantizedGINConv) and layer.aggr in ("add", "sum"):
        return _gin(run)
    if issubclass(mixin, QuantizedSAGEConv) and layer.message_quantizer is None:
        return _sage_aggregate(run)
    if issubclass(mixin, QuantizedMessagePassing) and type(layer).message in SCALED_MESSAGES:
        return _propagated(run)
    return None


def _gin(run: Rerun) -> MeasuredError:
    layer, nodes = run.layer, run.call.features.size(0)
    graph, own = plain_graph(run.call.edge_index, (nodes, nodes), layer.flow), float(1 + layer.eps)
    with watched(layer.message_quantizer) as (passed,):
        run()
    norm = _norm(graph).norm + abs(own)
    return _of_aggregate(layer.message_quantizer, passed[0], lambda v: graph.apply(v) + own * v, norm)


def _sage_aggregate(run: Rerun) -> MeasuredError | None:
    layer, nodes = run.layer, run.call.features.size(0)
    found = _aggregation(run.call.edge_index, None, nodes, layer)
    if found is None:
        return None
    with watched(layer.input_quantizer) as (passed,):
        run()
    return _of_aggregate(layer.input_quantizer, passed[0], *found)


def _propagated(run: Rerun) -> MeasuredError | None:
    """Of a layer whose one ``propagate`` sends the quantized state, by a weight of the edge or alone."""
    layer, sites = run.layer, [q for _, q in run.layer.own_quantizers()]
    with watched(sites[0]) as (passed,), _propagations(layer) as calls:
        run()
    if len(sites) != 1 or len(passed) != 1 or len(calls) != 1:
        return None
    edge_index, arguments = calls[0]
    if not isinstance(edge_index, Tensor) or not set(arguments) <= {"x", "edge_weight"}:
        return None
    found = _aggregation(edge_index, arguments.get("edge_weight"), run.call.features.size(0), layer)
    return None if found is None else _of_aggregate(sites[0], passed[0], *found)


@contextmanager
def _propagations(layer: Any) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """The graph and the arguments of every call of the layer's own ``propagate``."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    propagate = layer.float_propagate

    def noted(edge_index: Any, **arguments: Any) -> Any:
        calls.append((edge_index, {name: value for name, value in arguments.items() if name != "size"}))
        return propagate(edge_index, **arguments)

    layer.float_propagate = noted
    hook = layer.register_propagate_forward_pre_hook(lambda *_: None)  # it propagates, whatever kernels it has
    try:
        yield calls
    finally:
        hook.remove()
        del layer.float_propagate


def _aggregation(
    edge_index: Any, weight: Tensor | None, nodes: int, layer: Any
) -> tuple[Callable[[Tensor], Tensor], float] | None:
    """A layer's sum, mean or maximum of ``w_ij x_j``, and what it makes of a difference at most."""
    graph = plain_graph(edge_index, (nodes, nodes), layer.flow, weight)
    if layer.aggr == "mean":
        target = (1 / graph.plan.degree.double().clamp_min(1)).view(-1, 1)
        graph = NormalizedGraph(graph.plan, graph.weight, None, target)
    if layer.aggr in ("add", "sum", "mean"):
        return graph.apply, _norm(graph).norm
    if layer.aggr == "max" and (graph.weight is None or weight is not None):
        values = operator_of(graph)
        return partial(_largest, graph.plan, values), column_norm(graph.plan, values)
    return None


def _largest(plan: GraphPlan, values: Tensor, x: Tensor) -> Tensor:
    """``max_j w_ij x_j``, 0 without neighbours."""
    sent = values.unsqueeze(1) * x[plan.col.long()]
    index = plan.dst.unsqueeze(1).expand_as(sent)
    return x.new_zeros(plan.num_dst, x.size(1)).scatter_reduce(0, index, sent, "amax", include_self=False)


def _of_aggregate(
    quantizer: QLRQuantizer, passed: tuple[Tensor, Any], aggregate: Callable[[Tensor], Tensor], norm: float
) -> MeasuredError:
    """The error of ``aggregate`` of quantized values; ``norm`` bounds what it makes of a difference."""
    values, sent = passed
    values = values if values.layout == torch.strided else values.to_dense()
    exact, injected = aggregate(values), injection(quantizer, passed, None)
    carried = float((aggregate(sent.dequantize()) - exact).norm())
    return MeasuredError(injected.error, carried, norm * injected.bound, float(exact.norm()))
