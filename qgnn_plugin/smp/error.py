r"""What quantization does to each message-passing layer, measured and bounded (derivation: docs/error_bound.md)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import is_quantized, quantized_layers, unquantized
from ..inputs import model_inputs
from ..kernels.plan import GraphPlan
from ..layers.appnp import QuantizedPropagation
from ..layers.attention import QuantizedGATConv
from ..layers.base import QuantizedLayer
from ..layers.gcn import QuantizedGCNConv
from ..layers.gin import QuantizedGINConv
from ..layers.graph import NormalizedGraph, gcn_graph, mean_graph, plain_graph
from ..layers.message_passing import QuantizedConv
from ..layers.sage import QuantizedSAGEConv
from .constraint import dirichlet_energy
from .deep import DeepLayer
from .injection import Injection, bypassed, injection, watched
from .operators import Correction, OperatorBound, operator_bound, operator_of
from .propagation import Step

__all__ = ["ErrorReport", "LayerError", "StepError", "error_report"]

HEADER = ("layer", "type", "||Q(H) - H||", "carried", "bound", "relative", "energy", "float energy")


@dataclass(frozen=True)
class StepError:
    """Error of a propagation's state: ``||H^_k - H_k||`` and its bound."""

    carried: float
    bound: float | None


@dataclass(frozen=True)
class LayerError:
    """One layer of an :class:`ErrorReport`; norms are Frobenius norms.

    Args:
        name: Qualified name.
        type: Its float class.
        error: ``||Q(H) - H||`` where messages are quantized, of several sites the largest.
        carried: What of it arrives in the layer's result: the distance to the same layer with these sites off.
        bound: What ``carried`` can be at most, :obj:`None` for a layer without a bound (see :func:`error_report`).
        relative: ``carried`` over the norm of the result.
        energy: Dirichlet energy ``tr(H' (I - A~) H)`` of the layer's result in the converted model.
        float_energy: The same in the float model.
        steps: Of a propagation, every state from the first on; the last is the result.
    """

    name: str
    type: str
    error: float
    carried: float
    bound: float | None
    relative: float
    energy: float | None = None
    float_energy: float | None = None
    steps: tuple[StepError, ...] = ()


@dataclass(frozen=True)
class ErrorReport:
    """Per-layer errors of a converted model; prints as a table."""

    layers: list[LayerError]

    def __str__(self) -> str:
        rows = [HEADER, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    __repr__ = __str__


def _cells(layer: LayerError) -> tuple[str, ...]:
    numbers = (layer.error, layer.carried, layer.bound, layer.relative, layer.energy, layer.float_energy)
    return (layer.name or "(model)", layer.type, *("-" if n is None else f"{n:.4g}" for n in numbers))


@torch.no_grad()
def error_report(qmodel: nn.Module, data: Any, *, float_model: nn.Module | None = None) -> ErrorReport:
    r"""Measure every message-passing layer's quantization error on ``data`` and bound it from its step sizes.

    Each layer is looked at by itself, on the input that it has in ``qmodel``: its result with and without quantized
    messages.  All is evaluated in float64, so that what is seen is quantization and not rounding.

    Bounds exist for propagations (APPNP, :class:`~qgnn_plugin.SMPropagation`, and the states of SGConv, SSGConv,
    TAGConv and LGConv; a multiplier that moves within the forward pass excepted), GCNConv, SAGEConv where it transforms
    first, GINConv and GATConv; the operator may be any, directed and weighted ones included.

    Args:
        qmodel: A converted model whose ranges are set; it is left untouched.
        data: A ``Data``, a tuple of arguments or a dict of keywords (:func:`qgnn_plugin.inputs.model_inputs`).
        float_model: What energies are compared with; default the model that ``qmodel`` was converted from, with its
            deep stacks rewritten.

    Raises:
        ValueError: If ``qmodel`` is plain.
    """
    if not is_quantized(qmodel):
        raise ValueError(f"Expected a model made by quantize_model (got a plain {type(qmodel).__name__})")
    model = copy.deepcopy(qmodel).double().eval()
    plain = unquantized(qmodel) if float_model is None else copy.deepcopy(float_model)
    args, kwargs = model_inputs(model, data)
    args, kwargs = _double(args), _double(kwargs)
    calls = _calls(model, args, kwargs)
    energies = _energies(calls)
    names = list(calls)
    reference = _energies(_calls(plain.double().eval(), args, kwargs, names))
    reports = []
    for name, layer in quantized_layers(model).items():
        if name in calls and isinstance(layer, QuantizedConv):
            start = calls[layer.deep_place.stack] if isinstance(layer, DeepLayer) else None
            error = _layer_error(name, layer, calls[name], start)
            fields = {**vars(error), "energy": energies[name], "float_energy": reference.get(name)}
            reports.append(LayerError(**fields))
    return ErrorReport(reports)


# What runs through the model ##########################################################################################


@dataclass(frozen=True)
class _Call:
    """One call of a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def features(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("x")

    @property
    def edge_index(self) -> Any:
        return self.kwargs["edge_index"] if "edge_index" in self.kwargs else self.args[1]


def _calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str] | None = None
) -> dict[str, _Call]:
    """The first call of every converted convolution, or of the layers ``names``."""
    calls: dict[str, _Call] = {}
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if (name in names) if names is not None else isinstance(layer, QuantizedConv):

                def note(layer: Any, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                    calls.setdefault(name, _Call(args, kwargs, out))

                stack.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        model(*args, **kwargs)
    return calls


def _energies(calls: dict[str, _Call]) -> dict[str, float | None]:
    return {name: _energy(call) for name, call in calls.items()}


def _energy(call: _Call) -> float | None:
    x = call.features
    if not (isinstance(x, Tensor) and isinstance(call.out, Tensor) and call.out.size(0) == x.size(0)):
        return None
    graph = gcn_graph(call.edge_index, None, x.size(0), dtype=torch.float64)
    return float(dirichlet_energy(call.out, graph.apply))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_double(item) for item in value)
    return {key: _double(item) for key, item in value.items()} if isinstance(value, dict) else value


# Layers ###############################################################################################################


def _layer_error(name: str, layer: Any, call: _Call, start: _Call | None) -> LayerError:
    """The error of a layer by itself; ``start`` is the call of its deep stack's first layer."""
    kind = type(layer).float_class.__name__
    if layer.is_off:
        return LayerError(name, kind, 0.0, 0.0, 0.0, 0.0)
    if isinstance(layer, QuantizedPropagation):
        return _propagation_error(name, kind, layer, call)
    quantizers = [q for _, q in layer.own_quantizers()]
    handler = _BOUNDS.get(type(layer).mixin)
    found = None if handler is None or type(layer).quantizes_output else handler(layer, call)
    if found is not None:
        error, carried, bound, out = found
        return LayerError(name, kind, error, carried, bound, _ratio(carried, out))

    def run() -> Tensor:
        if start is not None:
            layer.deep_stack.initial = start.features
        return _tensor(layer(*call.args, **call.kwargs))

    with watched(*quantizers) as seen:
        out = run()
    with bypassed(*quantizers):
        exact = run()
    if start is not None:
        layer.deep_stack.initial = None
    errors = [injection(q, p, None).error for q, site in zip(quantizers, seen, strict=True) for p in site]
    carried = float((out - exact).norm())
    return LayerError(name, kind, max(errors, default=0.0), carried, None, _ratio(carried, exact))


def _tensor(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _ratio(carried: float, out: Tensor) -> float:
    return carried / max(float(out.norm()), 1e-300)


def _correction(layer: Any, operator: OperatorBound, eta: float | None = None) -> Correction:
    if layer.smp is None:
        return Correction.of(None, 0.0, 0.0, operator)
    return Correction.of(layer.smp, layer.multiplier_value, layer.smp.eta if eta is None else eta, operator)


Found = tuple[float, float, float, Tensor]


def _one_message(layer: Any, call: _Call, graph: NormalizedGraph, smoother: OperatorBound | None = None) -> Found:
    """A layer ``C P Q(z)`` with ``P`` the operator of ``graph``; the correction ``C`` runs on ``smoother``."""
    quantizer = layer.message_quantizer
    with watched(quantizer) as (passed,):
        out = _tensor(layer(*call.args, **call.kwargs))
    with bypassed(quantizer):
        exact = _tensor(layer(*call.args, **call.kwargs))
    injected = injection(quantizer, passed[0], graph.source)
    operator = operator_bound(graph.plan, operator_of(graph))
    correction = _correction(layer, operator if smoother is None else smoother)
    carried = float((out - exact).norm())
    return injected.error, carried, correction.norm * operator.norm * injected.bound, exact


def _gcn(layer: Any, call: _Call) -> Found | None:
    x = call.args[0]
    if isinstance(x, (tuple, list)):
        return None
    weight = call.args[2] if len(call.args) > 2 else call.kwargs.get("edge_weight")
    graph = gcn_graph(
        call.edge_index,
        weight,
        x.size(0),
        improved=layer.improved,
        add_self_loops=layer.add_self_loops,
        normalize=layer.normalize,
        flow=layer.flow,
        dtype=torch.float64,
    )
    return _one_message(layer, call, graph)


def _sage(layer: Any, call: _Call) -> Found | None:
    x = call.args[0]
    if layer.message_quantizer is None or layer.normalize or not isinstance(x, Tensor):
        return None
    size = (x.size(0), x.size(0))
    mean = mean_graph(call.edge_index, size, layer.flow, torch.float64)
    if layer.aggr == "mean":
        return _one_message(layer, call, mean)
    smoother = operator_bound(mean.plan, operator_of(mean))
    return _one_message(layer, call, plain_graph(call.edge_index, size, layer.flow), smoother)


def _gin(layer: Any, call: _Call) -> Found | None:
    """The sum itself: what follows is a network of the user's."""
    x = call.args[0]
    if not isinstance(x, Tensor) or layer.aggr not in ("add", "sum") or layer.is_smoothing:
        return None
    graph = plain_graph(call.edge_index, (x.size(0), x.size(0)), layer.flow)
    with watched(layer.message_quantizer) as (passed,):
        layer(*call.args, **call.kwargs)
    values, sent = passed[0]
    values = values if values.layout == torch.strided else values.to_dense()
    own = float(1 + layer.eps)
    difference = sent.dequantize() - values
    injected = injection(layer.message_quantizer, passed[0], None)
    operator = operator_bound(graph.plan, operator_of(graph))
    carried = float((graph.apply(difference) + own * difference).norm())
    return injected.error, carried, (operator.norm + abs(own)) * injected.bound, graph.apply(values) + own * values


def _gat(layer: Any, call: _Call) -> Found | None:
    """Logits come from unquantized values: the attention is the same with and without quantized messages."""
    if not isinstance(call.args[0], Tensor):
        return None
    out, (edges, attention) = layer(*call.args, **{**call.kwargs, "return_attention_weights": True})
    src, dst = edges if layer.flow == "source_to_target" else edges.flip(0)
    plan = GraphPlan.from_edges(src, dst, out.size(0), out.size(0))
    heads = [operator_bound(plan, plan.sort(attention[:, head])) for head in range(attention.size(1))]
    with watched(layer.message_quantizer) as (passed,):
        out = _tensor(layer(*call.args, **call.kwargs))
    with bypassed(layer.message_quantizer):
        exact = _tensor(layer(*call.args, **call.kwargs))
    injected = injection(layer.message_quantizer, passed[0], None)
    largest = max(_correction(layer, head).norm * head.norm for head in heads)
    return injected.error, float((out - exact).norm()), largest * injected.bound, exact


_BOUNDS: dict[type[QuantizedLayer], Callable[[Any, _Call], Found | None]] = {
    QuantizedGCNConv: _gcn,
    QuantizedSAGEConv: _sage,
    QuantizedGINConv: _gin,
    QuantizedGATConv: _gat,
}


# Propagation ##########################################################################################################


def _propagation_error(name: str, kind: str, layer: Any, call: _Call) -> LayerError:
    x = call.args[0]
    weight = call.args[2] if len(call.args) > 2 else call.kwargs.get("edge_weight")
    graph = layer.normalized(x, call.edge_index, weight)
    steps = [layer.step_quantizers[str(k)] for k in range(layer.K)]
    stored = [None, *(layer.state_quantizers[str(k)] if layer.state_quantizers is not None else None
                      for k in range(1, layer.K))]  # fmt: skip
    with watched(layer.input_quantizer, layer.gap_quantizer, *steps, *stored) as seen:
        states = _trajectory(layer, x, graph)
    with bypassed(layer.input_quantizer, layer.gap_quantizer, *steps, *stored):
        exact = _trajectory(layer, x, graph)
    entered = Injection(0.0, 0.0)
    if layer.input_quantizer is not None:
        entered = injection(layer.input_quantizer, seen[0][0], None)
    sent = [injection(q, p[0], graph.source) for q, p in zip(steps, seen[2 : 2 + layer.K], strict=True)]
    kept = [None if q is None else injection(q, p[0], None) for q, p in zip(stored, seen[2 + layer.K :], strict=True)]
    gaps = [injection(layer.gap_quantizer, p, graph.source).bound for p in seen[1]]
    carried = [float((a - b).norm()) for a, b in zip(states, exact, strict=True)]
    bounds: list[float] | list[None] = [None] * len(carried)
    if not layer.moves_itself:
        states_bound = [0.0 if injected is None else injected.bound for injected in kept]
        bounds = _propagated(layer, graph, entered.bound, [s.bound for s in sent], states_bound, gaps)
    errors = tuple(StepError(c, b) for c, b in zip(carried, bounds, strict=True))
    largest = max([entered.error, *(s.error for s in sent)])
    return LayerError(name, kind, largest, carried[-1], bounds[-1], _ratio(carried[-1], exact[-1]), steps=errors)


def _trajectory(layer: Any, x: Tensor, graph: NormalizedGraph) -> list[Tensor]:
    """The state that every step finds, and the result."""
    steps: list[Step] = []
    last = layer.steps(layer.entered(x), graph, steps.append)
    return [*(step.found for step in steps), last]


def _propagated(
    layer: Any, graph: NormalizedGraph, entered: float, sent: list[float], kept: list[float], gaps: list[float]
) -> list[float]:
    """The recursion of docs/error_bound.md."""
    descent, operator = layer.descent, operator_bound(graph.plan, operator_of(graph))
    correction = _correction(layer, operator, layer.step_size)
    factor = correction.contraction(descent, operator)
    sweeps = len(correction.gap)
    bounds, error = [], entered
    for k in range(layer.K):
        error = error + kept[k]
        bounds.append(error)
        injected = abs(descent.average) * operator.norm * sent[k] + abs(descent.fidelity) * entered
        of_gaps = sum(w * gaps[k * sweeps + t] for t, w in enumerate(correction.gap))
        error = factor * error + correction.norm * injected + of_gaps
    return [*bounds, error]
