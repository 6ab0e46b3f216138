r"""What quantization does to each message-passing layer, measured and bounded (derivation: docs/error_bound.md)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data.data import BaseData

from ..conversion.convert import unquantized
from ..conversion.converted import expect_converted, quantized_layers
from ..conversion.copying import copy_model
from ..graph.adjacency import gcn_graph
from ..inputs import Forward, run_model
from ..layers.message_passing import QuantizedConv
from ..smp.constraint import dirichlet_energy
from ..smp.deep import DeepLayer
from ..tables import table
from .bounds import measured_error_of
from .measured_error import LayerCall, MeasuredError, Rerun
from .stack_error import stack_errors

__all__ = ["ErrorReport", "LayerError", "StepError", "error_report"]

HEADER = ("layer", "type", "||Q(H) - H||", "carried", "bound", "relative", "energy", "float energy")
STACK_HEADER = ("stack carried", "stack bound")


@dataclass(frozen=True)
class StepError:
    """Error of a state: ``||H^_k - H_k||`` and its bound."""

    carried: float
    bound: float


@dataclass(frozen=True)
class LayerError:
    """One layer of an :class:`ErrorReport`; norms are Frobenius norms.

    Args:
        name: Qualified name.
        type: Its float class.
        error: ``||Q(H) - H||`` where messages are quantized, of several sites the largest.
        carried: What of it arrives in the layer's result: the distance to the same layer with these sites off.
        bound: What ``carried`` can be at most, :obj:`None` for a layer without a bound.
        relative: ``carried`` over the norm of the result.
        energy: Dirichlet energy ``tr(H' (I - A~) H)`` of the layer's result in the converted model.
        float_energy: The same in the float model.
        steps: Of a propagation, every state from the first on; the last is the result.
        reason: Why there is no bound.
        stack: In a deep stack, the error that its layers up to this one carry together; :obj:`None` outside of one, or
            where they have no bound together.
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
    reason: str | None = None
    stack: StepError | None = None


@dataclass(frozen=True)
class ErrorReport:
    """Per-layer errors of a converted model; prints as a table."""

    layers: list[LayerError]

    def __str__(self) -> str:
        stacked = any(layer.stack is not None for layer in self.layers)
        header = HEADER + STACK_HEADER * stacked
        lines = table(header, (_cells(layer, stacked) for layer in self.layers))
        unbounded = [f"no bound for {layer.name or '(model)'}: {layer.reason}" for layer in self.layers if layer.reason]
        return "\n".join([lines, *unbounded])

    __repr__ = __str__


def _cells(layer: LayerError, stacked: bool) -> tuple[str, ...]:
    numbers = [layer.error, layer.carried, layer.bound, layer.relative, layer.energy, layer.float_energy]
    if stacked:
        numbers += [None, None] if layer.stack is None else [layer.stack.carried, layer.stack.bound]
    return (layer.name or "(model)", layer.type, *("-" if n is None else f"{n:.4g}" for n in numbers))


@torch.no_grad()
def error_report(
    qmodel: nn.Module, data: Any, *, float_model: nn.Module | None = None, forward: Forward | None = None
) -> ErrorReport:
    r"""Measure every message-passing layer's quantization error on ``data`` and bound it from its step sizes.

    Each layer is looked at by itself, on the input that it has in ``qmodel``: its result with and without quantized
    messages.  Where a layer maps what it has aggregated (GINConv, SAGEConv that aggregates first, SGConv, SSGConv,
    TAGConv, generic layers) it is the aggregate that is looked at; in a deep stack of GCNConv the input of the map
    counts as well, and errors are followed from layer to layer (``stack``).  All is evaluated in float64, so that what
    is seen is quantization and not rounding.

    Bounds exist for every propagation, GCNConv, SAGEConv, GINConv, GATConv, GATv2Conv (given its attention), and
    generic layers whose message is the source's state, scaled or not; the operator may be any, directed and weighted
    ones included.  The report says of every other layer why it has none.

    Args:
        qmodel: A converted model whose ranges are set; it is left untouched.
        data: A ``Data``, a tuple of arguments or a dict of keywords (:func:`qgnn_plugin.inputs.model_inputs`).
        float_model: What energies are compared with; default the model that ``qmodel`` was converted from, with its
            deep stacks rewritten.
        forward: ``forward(model, batch)`` runs a model on ``data``, as in :func:`qgnn_plugin.calibrate`.

    Raises:
        ValueError: If ``qmodel`` is plain or packed.
        TypeError: If ``data`` do not fit ``qmodel``.
    """
    expect_converted(qmodel)
    if float_model is not None and not isinstance(float_model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module as 'float_model' (got {type(float_model).__name__})")
    model = copy_model(qmodel).double().eval()
    plain = unquantized(qmodel) if float_model is None else copy_model(float_model)
    batch = _double(data)
    calls = _calls(model, batch, forward)
    energies = _energies(calls)
    names = list(calls)
    reference = _energies(_calls(plain.double().eval(), batch, forward, names))
    layers = {n: m for n, m in quantized_layers(model).items() if n in calls and isinstance(m, QuantizedConv)}
    runs = {name: _run_of(layer, calls, name) for name, layer in layers.items()}
    measured = {name: measured_error_of(run) for name, run in runs.items()}
    stacks = _stacks(runs, measured)
    return ErrorReport(
        [
            _report(name, layer, measured[name], stacks.get(name), energies[name], reference.get(name))
            for name, layer in layers.items()
        ]
    )


def _run_of(layer: Any, calls: dict[str, LayerCall], name: str) -> Rerun:
    initial = calls[layer._deep_place.stack].features if isinstance(layer, DeepLayer) else None
    return Rerun(layer, calls[name], initial)


def _stacks(runs: dict[str, Rerun], measured: dict[str, MeasuredError]) -> dict[str, tuple[float, float]]:
    """The errors that layers of deep stacks carry together."""
    members: dict[str, dict[str, tuple[Rerun, MeasuredError]]] = {}
    for name, run in runs.items():
        if isinstance(run.layer, DeepLayer):
            members.setdefault(run.layer._deep_place.stack, {})[name] = (run, measured[name])
    found: dict[str, tuple[float, float]] = {}
    for stack in members.values():
        found |= stack_errors(stack)
    return found


def _report(
    name: str,
    layer: Any,
    found: MeasuredError,
    stack: tuple[float, float] | None,
    energy: float | None,
    float_energy: float | None,
) -> LayerError:
    reason = found.bound if isinstance(found.bound, str) else None
    return LayerError(
        name,
        type(layer).float_class.__name__,
        found.error,
        found.carried,
        None if isinstance(found.bound, str) else found.bound,
        found.carried / max(found.norm, 1e-300),
        energy,
        float_energy,
        tuple(StepError(*state) for state in found.states),
        reason,
        None if stack is None else StepError(*stack),
    )


# What runs through the model ##########################################################################################


def _calls(
    model: nn.Module, batch: Any, forward: Forward | None, names: list[str] | None = None
) -> dict[str, LayerCall]:
    """The first call of every converted convolution, or of the layers ``names``."""
    calls: dict[str, LayerCall] = {}
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if (name in names) if names is not None else isinstance(layer, QuantizedConv):

                def note(layer: Any, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                    calls.setdefault(name, LayerCall(args, kwargs, out))

                stack.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        run_model(model, batch, forward)
    return calls


def _energies(calls: dict[str, LayerCall]) -> dict[str, float | None]:
    return {name: _energy(call) for name, call in calls.items()}


def _energy(call: LayerCall) -> float | None:
    x = call.features
    if not (isinstance(x, Tensor) and isinstance(call.out, Tensor) and x.dim() == 2):  # not of several samples
        return None
    if call.out.size(0) != x.size(0):
        return None
    graph = gcn_graph(call.edge_index, None, x.size(0), dtype=torch.float64)
    return float(dirichlet_energy(call.out, graph.apply))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, BaseData):
        return value.clone().apply(_double)
    if isinstance(value, (tuple, list)):
        return type(value)(_double(item) for item in value)
    return {key: _double(item) for key, item in value.items()} if isinstance(value, dict) else value
