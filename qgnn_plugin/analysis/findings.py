"""What a report shows, as plain numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.utils import degree

from ..calibration import calibrate
from ..config import OFF
from ..conversion.convert import quantize_model
from ..conversion.converted import quantized_layers, quantizers
from ..conversion.copying import copy_model
from ..inputs import run_model
from ..packing import packed_bytes
from ..quantizers import QLRQuantizer, QuantizedTensor
from ..summaries import Summary, model_bytes
from .comparison import Comparison, score

__all__ = [
    "DegreeError",
    "LayerCost",
    "Point",
    "SiteValues",
    "accuracy_points",
    "degree_errors",
    "layer_costs",
    "outer_layers",
    "quality",
    "site_values",
]

SAMPLE = 100_000  # values of a site that are kept
RUNS = 5  # forward passes whose layers are timed


# Accuracy against bytes ###############################################################################################


@dataclass(frozen=True)
class Point:
    """A model as one point: bytes of its tensors, and its quality."""

    name: str
    bytes: int
    value: float
    kind: str = "uniform"  # "float", "this" (the model of the report) or "uniform"


def quality(outputs: Tensor, expected: Tensor, data: Any) -> tuple[float, str]:
    """How good ``outputs`` are, and in what: test accuracy where there are labels, else agreement with ``expected``."""
    y, mask = getattr(data, "y", None), getattr(data, "test_mask", None)
    rows = outputs.size(0)
    if isinstance(y, Tensor) and y.dim() == 1 and y.size(0) == rows and not y.is_floating_point():
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 1 else None
        return score(outputs, y, mask), "accuracy" if mask is None else "test accuracy"
    if outputs.dim() == 2 and outputs.size(1) > 1:
        return float((outputs.argmax(1) == expected.argmax(1)).float().mean()), "same prediction as the float model"
    return 1 - float((outputs - expected).norm() / expected.norm().clamp_min(1e-30)), "1 - relative error"


@torch.no_grad()
def accuracy_points(
    float_model: nn.Module, qmodel: nn.Module, packed: nn.Module, data: Any
) -> tuple[list[Point], str]:
    """The float model, the converted one, and the float one converted to uniform widths without training."""
    expected = run_model(float_model.eval(), data)
    value, what = quality(expected, expected, data)
    points = [Point("float", model_bytes(float_model), value, "float")]
    for bits in (8, 4, 2):
        other = calibrate(quantize_model(float_model, bits=bits), data).eval()
        found, _ = quality(run_model(other, data), expected, data)
        points.append(Point(f"{bits} bits, no training", model_bytes(other), found))
    found, _ = quality(run_model(qmodel.eval(), data), expected, data)
    points.append(Point("this model", packed_bytes(packed).packed, found, "this"))
    return points, what


# Sites ################################################################################################################


@dataclass(frozen=True)
class SiteValues:
    """A sample of what passes a site, and the levels that it is rounded to.

    Args:
        name: Qualified name of the site.
        bits: Stored width.
        values: ``[n]``, in ``unit``.
        levels: Values of the codes, in the same.
        unit: Of values and levels; empty where they are the values themselves.
        error: Root mean square of the rounding, over that of the values.
    """

    name: str
    bits: int
    values: Tensor
    levels: Tensor
    unit: str
    error: float


@torch.no_grad()
def site_values(qmodel: nn.Module, data: Any) -> list[SiteValues]:
    """What passes every site of a converted model in one forward pass."""
    model = copy_model(qmodel).eval()
    found: dict[str, SiteValues] = {}
    with ExitStack() as stack:
        for name, quantizer in quantizers(model).items():
            if quantizer.bits == OFF:
                continue

            def note(site: QLRQuantizer, args: Any, out: QuantizedTensor, name: str = name) -> None:
                if name not in found and out.qmax is not None:
                    found[name] = _values(name.removesuffix("_quantizer"), site, args[0], out)

            stack.callback(quantizer.register_forward_hook(note).remove)
        run_model(model, data)
    return list(found.values())


def _values(name: str, site: QLRQuantizer, x: Tensor, out: QuantizedTensor) -> SiteValues:
    values = x.values() if x.layout == torch.sparse_csr else x
    codes = out.codes.float()
    lower, scale = out.lower.float(), out.scale.float()
    if out.pattern is not None and scale.numel() > 1:  # stored entries, a range per row
        scale, lower = scale.reshape(-1)[out.pattern.dst], lower.expand_as(out.scale).reshape(-1)[out.pattern.dst]
    rounded = lower + scale * codes
    error = float((rounded - values).norm() / values.norm().clamp_min(1e-30))
    levels = torch.arange(site.qmax + 1, dtype=torch.float32)
    unit = ""
    if site.is_zero_one:
        levels = levels * (float(values.max()) if values.numel() else 1.0)
    elif site.log_scale.numel() > 1:  # of every channel its own: all are shown on one axis
        values, unit = (values - lower) / scale, "code of the channel's range"
    else:
        step, low = site.range()
        levels = (low + step * levels).float()
        if scale.numel() > 1:  # of every row its own: all are shown in multiples of these
            values = values * (step / scale)
            unit = "of the row's largest magnitude" if site.granularity == "node" else "over the row's multiplier"
    flat = values.detach().reshape(-1).float()
    if flat.numel() > SAMPLE:
        flat = flat[:: -(-flat.numel() // SAMPLE)]
    return SiteValues(name, site.stored_bits, flat.cpu(), levels.detach().cpu(), unit, error)


# Nodes ################################################################################################################


@dataclass(frozen=True)
class DegreeError:
    """Error of node outputs by in-degree: ``||float - quantized|| / mean ||float||`` per node, in bins of degrees.

    Args:
        degrees: Smallest degree of each bin.
        counts: Nodes in it.
        low: First quartile of the error.
        median: Of the error.
        high: Third quartile.
    """

    degrees: list[int]
    counts: list[int]
    low: list[float]
    median: list[float]
    high: list[float]


@torch.no_grad()
def degree_errors(float_model: nn.Module, qmodel: nn.Module, data: Any) -> DegreeError | None:
    """Errors of nodes by in-degree; :obj:`None` where outputs are not of nodes, or edges are no ``edge_index``."""
    edge_index: Any = getattr(data, "edge_index", None)
    nodes = getattr(data, "num_nodes", None)
    expected = run_model(float_model.eval(), data)
    found = run_model(qmodel.eval(), data)
    plain = isinstance(edge_index, Tensor) and edge_index.layout == torch.strided
    if not plain or not isinstance(found, Tensor) or found.dim() != 2 or found.size(0) != nodes:
        return None
    degrees = degree(edge_index[1], nodes, dtype=torch.long)
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1).mean().clamp_min(1e-30)
    out = DegreeError([], [], [], [], [])
    edges = [0, 1, *(2**i for i in range(1, int(degrees.max()).bit_length() + 1))]
    for first, last in pairwise(edges):
        inside = errors[(degrees >= first) & (degrees < last)]
        if inside.numel():
            quartiles = torch.quantile(inside.float(), torch.tensor([0.25, 0.5, 0.75], device=inside.device)).tolist()
            out.degrees.append(first)
            out.counts.append(inside.numel())
            for values, value in zip((out.low, out.median, out.high), quartiles, strict=True):
                values.append(value)
    return out


# Layers ###############################################################################################################


@dataclass(frozen=True)
class LayerCost:
    """Time and bytes of one layer with all that is inside it, in float and packed; seconds per forward pass."""

    name: str
    float_seconds: float
    packed_seconds: float
    float_bytes: int
    packed_bytes: int


@dataclass
class _Clock:
    times: dict[str, list[float]] = field(default_factory=dict)


def outer_layers(qmodel: nn.Module) -> list[str]:
    """Names of converted layers that are inside no other."""
    names = list(quantized_layers(qmodel))
    return [n for n in names if not any(n != other and (not other or n.startswith(f"{other}.")) for other in names)]


@torch.no_grad()
def layer_costs(
    float_model: nn.Module, qmodel: nn.Module, packed: nn.Module, data: Any, table: Summary, total: Comparison
) -> list[LayerCost]:
    """Time and bytes of every outer layer, and of the rest of the model under ``(rest)``.

    Packed layers hand each other work to be done later, which counts where it is done.
    """
    names = outer_layers(qmodel)
    before, after = (_times(model.eval(), names, data) for model in (float_model, packed))
    costs = []
    for name in names:
        inside = [r for r in table.layers if r.name == name or not name or r.name.startswith(f"{name}.")]
        sizes = sum(r.float_bytes for r in inside), sum(r.packed_bytes for r in inside)
        costs.append(LayerCost(name or "(model)", before.get(name, 0.0), after.get(name, 0.0), *sizes))
    rest = LayerCost(
        "(rest)",
        max(0.0, total.runs[0].seconds - sum(cost.float_seconds for cost in costs)),
        max(0.0, total.runs[-1].seconds - sum(cost.packed_seconds for cost in costs)),
        max(0, table.float_bytes - sum(cost.float_bytes for cost in costs)),
        max(0, table.packed_bytes - sum(cost.packed_bytes for cost in costs)),
    )
    return [*costs, rest]


def _times(model: nn.Module, names: list[str], data: Any) -> dict[str, float]:
    """Median seconds of modules in a forward pass."""
    passes = []
    with _timed(model, names) as clock:
        for _ in range(RUNS):
            clock.times.clear()
            run_model(model, data)
            passes.append({name: sum(times) for name, times in clock.times.items()})
    return {name: sorted(p.get(name, 0.0) for p in passes)[RUNS // 2] for name in names}


@contextmanager
def _timed(model: nn.Module, names: list[str]) -> Iterator[_Clock]:
    clock, started = _Clock(), {}

    def start(module: nn.Module, *_: Any) -> None:
        started[module] = time.perf_counter()

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)

            def stop(module: nn.Module, *_: Any, name: str = name) -> None:
                clock.times.setdefault(name, []).append(time.perf_counter() - started[module])

            stack.callback(module.register_forward_pre_hook(start).remove)
            stack.callback(module.register_forward_hook(stop).remove)
        yield clock
