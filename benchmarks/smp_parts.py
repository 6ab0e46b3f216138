"""What ``make bench-smp`` trains and measures: one function per part."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GCN, GCN2Conv, GCNConv, Linear, SGConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.analysis.error_report import error_report
from qgnn_plugin.config import OFF
from qgnn_plugin.graph.adjacency import gcn_graph
from qgnn_plugin.inputs import model_inputs
from qgnn_plugin.recipe import Recipe, StageResult, fit_float, fit_quantized
from qgnn_plugin.smp import SMPropagation, dirichlet_energy, smp_layers
from qgnn_plugin.training import distillation_loss, parameter_groups

from .fast_layers import speed_up
from .models import Propagation, TwoLayer, build_model, dropout
from .smp_settings import PLAIN_WIDTHS, TELEPORT, WIDTHS, Settings
from .timing import interleaved

__all__ = ["RUNS"]


# Measuring ############################################################################################################


def _scores(result: StageResult) -> dict[str, Any]:
    return {"val": result.val_accuracy, "test": result.test_accuracy, "epoch": result.epoch}


@torch.no_grad()
def layer_energies(model: nn.Module, data: Any, layers: list[nn.Module]) -> list[float]:
    """``tr(H' (I - A~) H) / ||H||^2`` of every layer's result, in [0, 2]: 0 where neighbours no longer differ."""
    energies: list[float] = []
    graph = gcn_graph(data.edge_index, None, data.num_nodes)

    def note(_: Any, __: Any, out: Tensor) -> None:
        energies.append(float(dirichlet_energy(out, graph.apply) / out.square().sum().clamp_min(1e-30)))

    handles = [layer.register_forward_hook(note) for layer in layers]
    args, kwargs = model_inputs(model, data)
    model.eval()(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return energies


def _constraints(model: nn.Module) -> dict[str, dict[str, float | None]]:
    layers = smp_layers(model)
    return {n: {"constraint": x.constraint, "multiplier": x.multiplier_value} for n, x in layers.items()}


def _fitted(result: StageResult, data: Any, last: str) -> dict[str, Any]:
    """Scores of a model, with energy, quantization error and constraint of its layer ``last``."""
    model = result.model
    layer = model.get_submodule(last)
    found = {**_scores(result), "energy": layer_energies(model, data, [layer])[0], **_constraints(model).get(last, {})}
    if qgnn.is_quantized(model) and not getattr(layer, "is_off", True):
        error = next(x for x in error_report(model, _dense(data)).layers if x.name == last)
        found |= {"error": error.relative, "carried": error.carried, "bound": error.bound}
    return found


def _dense(data: Any) -> Any:
    x = data.x if data.x.layout == torch.strided else data.x.to_dense()
    return Data(x=x, edge_index=data.edge_index)


def _sizes(data: Any) -> tuple[int, int]:
    return data.x.size(1), int(data.y.max()) + 1


# Parts ################################################################################################################


def _constraint(data: Any, settings: Settings, seed: int, dataset: str) -> dict[str, Any]:
    """Multipliers and ``g`` over its bound in every step of quantized training, and once they have settled.

    Dropout is off, as noise would move the constraint from one step to the next.
    """
    smp = SMPConfig(alpha=settings.alpha)
    results = {}
    for name in ("GCN-64", "Propagation"):
        torch.manual_seed(seed)
        model = build_model(name, *_sizes(data))
        if name == "Propagation":
            model.prop = SMPropagation(10, TELEPORT, smp=smp)
        fit_float(model, data, settings.recipe)
        config = QuantConfig(4, smp=smp)
        qmodel = qgnn.calibrate(qgnn.quantize_model(model, config=config), data, method="ranges")
        results[name] = _watch(qmodel, model, data, settings)
    return results


def _watch(student: nn.Module, teacher: nn.Module, data: Any, settings: Settings) -> dict[str, Any]:
    recipe = settings.recipe
    stage = recipe.quantized_stage
    args, kwargs = model_inputs(teacher, data)
    with torch.no_grad():
        soft = teacher.eval()(*args, **kwargs)
    student.train()
    student.rate = 0.0
    optimizer = torch.optim.Adam(parameter_groups(student, stage.lr, stage.weight_decay, recipe.range_lr))
    peaks = [group["lr"] for group in optimizer.param_groups]
    paths: dict[str, dict[str, list[float]]] = {n: {"constraint": [], "multiplier": []} for n in smp_layers(student)}

    def train(step: int) -> None:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / settings.constraint_steps))
        optimizer.zero_grad()
        distillation_loss(student(*args, **kwargs), soft).backward()
        optimizer.step()

    def settle(_: int) -> None:
        with torch.no_grad():
            student(*args, **kwargs)

    for step in range(settings.constraint_steps + settings.settling_steps):
        (train if step < settings.constraint_steps else settle)(step)
        for name, state in qgnn.differential_multiplier_step(student).items():
            paths[name]["constraint"].append(round(state.constraint, 5))
            paths[name]["multiplier"].append(round(state.multiplier, 5))
    settle(0)
    return {"final": _constraints(student), "trained": settings.constraint_steps, "paths": paths}


def _depth(data: Any, settings: Settings, seed: int) -> dict[str, Any]:
    """PyG's GCN with many layers: as it is, with deep stacks in float, and in INT4."""
    smp = SMPConfig(initial_residual=0.1, identity_map=0.5)
    inputs, classes = _sizes(data)
    torch.manual_seed(seed)
    plain = speed_up(GCN(inputs, 64, settings.depth, classes, dropout=0.6))
    deep = qgnn.quantize_model(plain, config=QuantConfig(bits=OFF, smp=smp))
    recipe = settings.deep_recipe
    fits: dict[str, Callable[[], StageResult]] = {
        "plain FP32": lambda: fit_float(plain, data, recipe),
        "deep FP32": lambda: fit_float(deep, data, recipe),
        "deep INT4": lambda: fit_quantized(deep, data, 4, config=QuantConfig(4, smp=smp), recipe=recipe),
    }
    results = {}
    for name, fit in fits.items():
        torch.manual_seed(seed)
        start = time.perf_counter()
        result = fit()
        seconds = round(time.perf_counter() - start, 1)
        energies = layer_energies(result.model, data, list(result.model.convs))
        results[name] = {**_scores(result), "seconds": seconds, "energies": energies}
    return results


def _propagation(data: Any, settings: Settings, seed: int, steps: int) -> dict[str, Any]:
    """An MLP and K steps: APPNP (off), and the same constrained (on)."""
    inputs, classes = _sizes(data)
    results = {}
    for state in ("off", "on"):
        torch.manual_seed(seed)
        model: Any = speed_up(Propagation(inputs, 64, classes, steps, TELEPORT, 0.5))
        smp = None
        if state == "on":
            smp = SMPConfig(alpha=settings.alpha)
            model.prop = SMPropagation(steps, TELEPORT, smp=smp)
        for width, result in _at_every_width(model, data, smp, settings, seed):
            results[f"{width} {state}"] = _fitted(result, data, "prop")
    return results


def _plain(data: Any, settings: Settings, seed: int, dataset: str, steps: int) -> dict[str, Any]:
    """An MLP and K steps without a teleport: nothing but the bound keeps them from averaging everything away.

    Beside it, in floats, what a teleport does instead.
    """
    inputs, classes = _sizes(data)
    torch.manual_seed(seed)
    teleport = speed_up(Propagation(inputs, 64, classes, steps, TELEPORT, 0.5))
    torch.manual_seed(seed)
    results = {"FP32 teleport": _fitted(fit_float(teleport, data, settings.recipe), data, "prop")}
    for state in ("off", "on"):
        torch.manual_seed(seed)
        model: nn.Module = speed_up(Propagation(inputs, 64, classes, steps, 0.0, 0.5))
        smp = SMPConfig.for_steps(steps, terms=settings.plain_terms) if state == "on" else None
        if smp is not None:
            model = qgnn.quantize_model(model, config=QuantConfig(bits=OFF, smp=smp), include=["prop"])
        for width, result in _at_every_width(model, data, smp, settings, seed, PLAIN_WIDTHS):
            results[f"{width} {state}"] = _fitted(result, data, "prop")
    return results


def _shallow(data: Any, settings: Settings, seed: int) -> dict[str, Any]:
    """A GCN of two layers: without a constraint, with the default one, and with one that binds.

    The convolutions are PyG's own: the fast ones run past the constraint at 32 bits.
    """
    inputs, classes = _sizes(data)
    states = {"off": None, "on": SMPConfig(), "binding": SMPConfig(alpha=settings.alpha)}
    results = {}
    for state, smp in states.items():
        torch.manual_seed(seed)
        model: nn.Module = TwoLayer(GCNConv(inputs, 64), GCNConv(64, classes), 0.5)
        speed_up(model.conv1.lin)  # it takes sparse features
        if smp is not None:
            model = qgnn.quantize_model(model, config=QuantConfig(bits=OFF, smp=smp))
        for width, result in _at_every_width(model, data, smp, settings, seed):
            results[f"{width} {state}"] = _fitted(result, data, "conv1")
    return results


def _at_every_width(
    model: nn.Module,
    data: Any,
    smp: SMPConfig | None,
    settings: Settings,
    seed: int,
    widths: Sequence[str] = tuple(WIDTHS),
) -> Iterator[tuple[str, StageResult]]:
    for width in widths:
        bits = WIDTHS[width]
        torch.manual_seed(seed)
        if bits == OFF:
            yield width, fit_float(model, data, settings.recipe)
        else:
            config = QuantConfig(bits, smp=smp)
            yield width, fit_quantized(copy.deepcopy(model), data, bits, config=config, recipe=settings.recipe)


class GCNII(nn.Module):
    """PyG's GCN2Conv between two linear maps."""

    def __init__(self, inputs: int, hidden: int, classes: int, steps: int, rate: float) -> None:
        super().__init__()
        self.first, self.last, self.rate = Linear(inputs, hidden), Linear(hidden, classes), rate
        self.convs = nn.ModuleList(GCN2Conv(hidden, 0.1, 0.5, depth) for depth in range(1, steps + 1))

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        x = initial = self.first(dropout(x, self.rate, self.training)).relu()
        for conv in self.convs:
            x = conv(F.dropout(x, self.rate, self.training), initial, edge_index).relu()
        return self.last(F.dropout(x, self.rate, self.training))


class SGC(nn.Module):
    """SGConv: K plain steps of a linear model."""

    def __init__(self, inputs: int, classes: int, steps: int) -> None:
        super().__init__()
        self.conv = SGConv(inputs, classes, steps, cached=True)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        return self.conv(x if x.layout == torch.strided else x.to_dense(), edge_index)


def _baseline(data: Any, settings: Settings, seed: int, steps: int) -> dict[str, Any]:
    """Other float models of the same depth."""
    inputs, classes = _sizes(data)
    builds: dict[str, tuple[Callable[[], nn.Module], Recipe, str]] = {
        "GCNII": (lambda: GCNII(inputs, 64, classes, steps, 0.6), settings.deep_recipe, f"convs.{steps - 1}"),
        "GCN": (lambda: GCN(inputs, 64, steps, classes, dropout=0.5), settings.recipe, f"convs.{steps - 1}"),
        "SGC": (lambda: SGC(inputs, classes, steps), settings.recipe, "conv"),
    }
    results = {}
    for name, (build, recipe, last) in builds.items():
        torch.manual_seed(seed)
        results[name] = _fitted(fit_float(speed_up(build()), data, recipe), data, last)
    return results


def _cost(data: Any, settings: Settings, seed: int) -> dict[str, Any]:
    """Seconds of a training step and of packed inference: off, on while the multiplier is 0, and on while it acts."""
    inputs, classes = _sizes(data)
    smp = SMPConfig(alpha=settings.alpha)
    states = {"off": None, "on, multiplier 0": smp, "on, multiplier 1": replace(smp, multiplier=1.0)}
    builds = {
        "GCN-64": lambda smp: build_model("GCN-64", inputs, classes),
        "Propagation": lambda smp: _with_propagation(build_model("Propagation", inputs, classes), smp),
    }
    results: dict[str, Any] = {}
    for name, build in builds.items():
        training, inference = {}, {}
        for state, constraint in states.items():
            torch.manual_seed(seed)
            config = QuantConfig(4, smp=constraint)
            qmodel = qgnn.calibrate(qgnn.quantize_model(build(constraint), config=config), data, method="ranges")
            packed = qgnn.pack_model(qmodel)
            training[state] = partial(_training_step, qmodel.train(), data)
            inference[state] = partial(packed, data.x, data.edge_index)
        timings = {"training step": training, "packed inference": inference}
        results[name] = {what: _medians(interleaved(sides, settings.rounds)) for what, sides in timings.items()}
    return results


def _with_propagation(model: Any, smp: SMPConfig | None) -> nn.Module:
    if smp is not None:
        model.prop = SMPropagation(model.prop.K, model.prop.alpha, smp=smp)
    return model


def _training_step(model: nn.Module, data: Any) -> None:
    model.zero_grad()
    F.cross_entropy(model(data.x, data.edge_index)[data.train_mask], data.y[data.train_mask]).backward()


def _medians(timings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds, and how many times those without a constraint."""
    off = timings["off"]
    return {state: {"seconds": t.median, "over off": 1 / t.over(off)} for state, t in timings.items()}


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "constraint": _constraint,
    "depth": _depth,
    "propagation": _propagation,
    "baseline": _baseline,
    "plain": _plain,
    "shallow": _shallow,
    "cost": _cost,
}
