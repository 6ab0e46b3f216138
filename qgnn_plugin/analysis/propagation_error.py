"""How far quantization carries a propagation away: the recursion of docs/error_bound.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..graph.adjacency import NormalizedGraph
from ..graph.samples import Samples
from ..quantizers import QLRQuantizer
from ..smp.descent import Step
from .injection import Injection, Passed, bypassed, injection, watched
from .measured_error import LayerCall, MeasuredError
from .operators import Correction, operator_bound, operator_of

__all__ = ["measured_propagation"]


def measured_propagation(layer: Any, call: LayerCall) -> MeasuredError:
    """Measure and bound the error of every state of a propagation."""
    graph = layer.normalized(call.features, call.edge_index, call.edge_weight)
    x = Samples.of(layer, call.features).rows(call.features)
    steps = list(layer.step_quantizers.values())
    stored = [None if layer.state_quantizers is None or k == 0 else layer.state_quantizers[str(k)]
              for k in range(len(steps))]  # fmt: skip
    sites = (layer.input_quantizer, layer.gap_quantizer, *steps, *stored)
    with watched(*sites) as seen:
        quantized, out = _trajectory(layer, x, graph)
    with bypassed(*sites):
        exact, expected = _trajectory(layer, x, graph)
    of_input = _injected(layer.input_quantizer, seen[0], None)
    messages, states = seen[2 : 2 + len(steps)], seen[2 + len(steps) :]
    sent = [_injected(q, passed, graph.source) for q, passed in zip(steps, messages, strict=True)]
    kept = [_injected(q, passed, None).bound for q, passed in zip(stored, states, strict=True)]
    gaps = [injection(layer.gap_quantizer, use, graph.source).bound for use in seen[1]]
    bounds = _recursion(layer, graph, (quantized, exact), of_input.bound, [s.bound for s in sent], kept, gaps)
    pairs = [(a.found, b.found) for a, b in zip(quantized, exact, strict=True)]
    carried = [float((a - b).norm()) for a, b in [*pairs, (out, expected)]]
    error = max([of_input.error, *(s.error for s in sent)])
    of_states = tuple(zip(carried, bounds, strict=True))
    return MeasuredError(error, carried[-1], bounds[-1], float(expected.norm()), of_states)


def _injected(quantizer: QLRQuantizer | None, passed: Passed, source: Tensor | None) -> Injection:
    return Injection(0.0, 0.0) if quantizer is None else injection(quantizer, passed[0], source)


def _trajectory(layer: Any, x: Tensor, graph: NormalizedGraph) -> tuple[list[Step], Tensor]:
    """Every step, and the last state."""
    steps: list[Step] = []
    return steps, layer.steps(layer.initial_state(x), graph, steps.append)


def _recursion(
    layer: Any,
    graph: NormalizedGraph,
    steps: tuple[list[Step], list[Step]],
    of_input: float,
    sent: list[float],
    kept: list[float],
    gaps: list[float],
) -> list[float]:
    """The bound of every state (docs/error_bound.md); ``steps`` are those with and without quantization."""
    factors, operator = layer.step_factors, operator_bound(graph.plan, operator_of(graph))
    remaining = iter(gaps)
    bounds, error = [], of_input
    for k, (step, exact) in enumerate(zip(*steps, strict=True)):
        force = 0.0 if step.force is None else float(step.force)
        correction = Correction.of(layer._smp, force, 0.0 if layer._smp is None else layer._step_size, operator)
        error = error + kept[k]
        bounds.append(error)
        injected = abs(factors.average) * operator.norm * sent[k] + abs(factors.fidelity) * of_input
        error = correction.contraction(factors, operator) * error + correction.norm * injected
        if step.force is not None:
            used = [next(remaining) for _ in range(layer.gap_messages)]
            error += sum(w * gap for w, gap in zip(correction.gap, used, strict=False))
        if layer._moves_itself:
            error += _moved(layer, graph, step, exact)
    return [*bounds, error]


def _moved(layer: Any, graph: NormalizedGraph, step: Step, exact: Step) -> float:
    """What another multiplier makes of the exact change: ``||(C(lambda^) - C(lambda)) D||``."""
    change = exact.proposed - exact.found
    remaining = [layer.corrected(change, graph.apply, force) for force in (step.force, exact.force)]
    return float((remaining[0] - remaining[1]).norm())
