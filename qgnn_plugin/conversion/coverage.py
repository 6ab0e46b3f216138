"""What of a model is quantized, and what stays float, and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch_geometric.nn import MessagePassing

from ..config import OFF
from ..layers.base import WEIGHT, QuantizedLayer, SwappedLayer
from ..layers.message_passing import SentFeatures
from ..layers.naming import float_class_of
from ..layers.registry import mixin_for
from ..quantizers import QLRQuantizer
from .selection import is_output_projection
from .unregistered import unregistered_layers

__all__ = [
    "Coverage",
    "FloatArgument",
    "FloatPart",
    "LayerShare",
    "counting_rows",
    "coverage",
    "has_run",
    "warn_of_float_parts",
    "warn_of_unregistered",
]

ENOUGH = 0.5  # share of the weights below which conversion warns
OFF_BY_CHOICE = "32 bits by its configuration"
NEVER_RAN = "never ran while ranges were set"
UNREGISTERED = "held where torch does not look for layers, so that it is in no modules()"

OWN_FORWARD = "its forward is its own"
REASONS: dict[type[nn.Module], str] = {
    nn.RNNBase: OWN_FORWARD,
    nn.RNNCellBase: OWN_FORWARD,
    nn.Embedding: OWN_FORWARD,
    nn.EmbeddingBag: "a table that is summed as it is looked up",
    nn.Conv1d: OWN_FORWARD,
    nn.Conv2d: OWN_FORWARD,
    nn.modules.conv._ConvNd: "of convolutions over a grid, Conv1d and Conv2d have a quantized form",
    nn.Bilinear: OWN_FORWARD,
    nn.MultiheadAttention: OWN_FORWARD,
    torch.jit.ScriptModule: "compiled by torch.jit.script: convert the model before compiling it",
    MessagePassing: "weights of its own, which are no factors of products with features",
}

_rows: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # that passed a module in the first batch of calibration


@dataclass(frozen=True)
class FloatPart:
    """A module with weights that stay float.

    Args:
        name: Qualified name.
        type: Its class.
        weights: Number of weights.
        work: Multiply-adds with them for one batch, unknown (:obj:`None`) before calibration and of
            packed models, whose files do not hold it.
        reason: Why.
        chosen: Whether the configuration asks for it.
    """

    name: str
    type: str
    weights: int
    work: int | None
    reason: str
    chosen: bool = False

    def __str__(self) -> str:
        return f"{self.name or '(model)'} ({self.type}, {self.weights:,} weights): {self.reason}"


@dataclass(frozen=True)
class FloatArgument:
    """What neighbours send in full precision.

    Args:
        layer: Qualified name of the layer.
        name: As the layer's ``propagate`` calls it.
        reason: Why; of most only known once the layer has run.
    """

    layer: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"'{self.name}' that {self.layer or '(model)'} sends: {self.reason}"


@dataclass(frozen=True)
class LayerShare:
    """What is quantized of one module's own weights, and of the multiply-adds with them for one batch.

    Args:
        quantized, total: Numbers of weights.
        quantized_work, total_work: Multiply-adds.
    """

    quantized: int = 0
    total: int = 0
    quantized_work: int = 0
    total_work: int = 0

    def plus(self, weights: int, work: int, is_quantized: bool) -> LayerShare:
        return LayerShare(
            self.quantized + is_quantized * weights, self.total + weights,
            self.quantized_work + is_quantized * work, self.total_work + work,
        )  # fmt: skip


@dataclass(frozen=True)
class Coverage:
    """What is quantized of the weights of a model, its matrices; vectors such as biases and norms do not count.

    Args:
        quantized: Number of quantized weights.
        parts: The modules whose weights stay float.
        work: Multiply-adds with quantized weights for one batch, :obj:`None` before calibration.
        arguments: What layers without kernels of their own send in floats.
        layers: Of each module with weights, by its name; multiply-adds are zero before calibration.
        unregistered: Layers with weights that are in no ``modules()``; they count nowhere else.
    """

    quantized: int
    parts: tuple[FloatPart, ...]
    work: int | None = None
    arguments: tuple[FloatArgument, ...] = ()
    layers: Mapping[str, LayerShare] = field(default_factory=dict)
    unregistered: tuple[FloatPart, ...] = ()

    @property
    def total(self) -> int:
        return self.quantized + sum(part.weights for part in self.parts)

    @property
    def share(self) -> float:
        """Of the weights; 1 for a model without any."""
        return self.quantized / self.total if self.total else 1.0

    @property
    def work_share(self) -> float | None:
        """Of the multiply-adds with weights, :obj:`None` before calibration."""
        if self.work is None or any(part.work is None for part in self.parts):
            return None
        total = self.work + sum(part.work or 0 for part in self.parts)
        return self.work / total if total else 1.0

    def cells(self, name: str) -> tuple[str, str]:
        """For a table: the share of a module's weights that is quantized, and its share of all multiply-adds."""
        layer = self.layers.get(name)
        if layer is None or not layer.total:
            return "-", "-"
        total = sum(other.total_work for other in self.layers.values())
        return f"{layer.quantized / layer.total:.0%}", f"{layer.total_work / total:.0%}" if total else "-"

    def __str__(self) -> str:
        work = self.work_share
        done = "" if work is None else f", {work:.0%} of the multiply-adds with weights"
        lines = [f"quantized: {self.quantized:,} of {self.total:,} weights ({self.share:.0%}){done}"]
        return "\n".join([*lines, *(f"float: {part}" for part in (*self.parts, *self.arguments, *self.unregistered))])


def coverage(model: nn.Module) -> Coverage:
    """What of a converted or packed model is quantized."""
    finder = _Finder(model)
    for name, module in model.named_modules():
        finder.visit(name, module)
    work = finder.work if finder.knows_work else None
    left = tuple(_unregistered_parts(model))
    return Coverage(finder.quantized, tuple(finder.parts), work, tuple(_float_arguments(model)), finder.shares, left)


def _unregistered_parts(model: nn.Module) -> Iterator[FloatPart]:
    for where, layer in unregistered_layers(model).items():
        weights = sum(p.numel() for p in layer.parameters() if _is_matrix(p))
        if weights:
            yield FloatPart(where, type(layer).__name__, weights, None, UNREGISTERED)


def _float_arguments(model: nn.Module) -> Iterator[FloatArgument]:
    for name, module in model.named_modules():
        if isinstance(module, SentFeatures):
            for argument, reason in sorted(module.float_arguments.items()):
                yield FloatArgument(name, argument, reason)


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.quantized = self.work = 0
        self.parts: list[FloatPart] = []
        self.knows_work = model in _rows
        self.shares: dict[str, LayerShare] = {}
        self._seen: set[int] = set()
        self._reasons = {spec.name: spec.reason for spec in vars(model).get("_packed_specs", ())}
        self._has_run = any(isinstance(m, QLRQuantizer) and m.bits != OFF and m.is_set for m in model.modules())

    def visit(self, name: str, module: nn.Module) -> None:
        if isinstance(module, SwappedLayer):
            weights = _weights_of(module)
            self._add_swapped(name, module, weights)
            if weights and not (module.has_others or isinstance(module, MessagePassing)):
                # What a weight is computed from, such as its norm and direction, is the weight.
                sources = _parametrized(module) + ([] if module.extended else list(module.parameters(recurse=False)))
                self._seen |= {id(p) for p in sources}
        own = list(module.parameters(recurse=isinstance(module, torch.jit.ScriptModule)))
        left = [p for p in own if id(p) not in self._seen]
        self._seen |= {id(p) for p in left}
        count = sum(p.numel() for p in left if _is_matrix(p))
        if count:
            self._leave(name, module, count, self._reason(name, module))

    def _add_swapped(self, name: str, module: Any, weights: dict[str, tuple[Tensor | None, int, int]]) -> None:
        for tensor, count, bits in weights.values():
            if tensor is not None and id(tensor) in self._seen:  # tied
                continue
            self._seen.add(id(tensor))
            if bits == OFF:
                self._leave(name, module, count, OFF_BY_CHOICE, chosen=True)
            elif isinstance(module, QuantizedLayer) and self._has_run and not has_run(module):
                self._leave(name, module, count, NEVER_RAN)
            else:
                work = 0 if isinstance(module, nn.Embedding) else count * self._rows_of(name)
                self.quantized += count
                self.work += work
                self._share(name, count, work, True)

    def _leave(self, name: str, module: Any, count: int, reason: str, chosen: bool = False) -> None:
        scripted = isinstance(module, torch.jit.ScriptModule)
        kind = module.original_name if scripted else float_class_of(module).__name__
        rows = 0 if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else self._rows_of(name)
        self.parts.append(FloatPart(name, kind, count, count * rows if self.knows_work else None, reason, chosen))
        self._share(name, count, count * rows, False)

    def _share(self, name: str, weights: int, work: int, is_quantized: bool) -> None:
        self.shares[name] = self.shares.get(name, LayerShare()).plus(weights, work, is_quantized)

    def _rows_of(self, name: str) -> int:
        """Rows that passed a module, or the nearest one around it."""
        while True:
            module = self.model.get_submodule(name)
            if module in _rows or not name:
                return _rows.get(module, 0)
            name = name.rpartition(".")[0]

    def _reason(self, name: str, module: nn.Module) -> str:
        if self._reasons.get(name) == "never ran":
            return NEVER_RAN
        is_converted = isinstance(module, (MessagePassing, SwappedLayer))
        if (mixin_for(module) is not None or isinstance(module, nn.Linear)) and not is_converted:
            around = self.model.get_submodule(name.rpartition(".")[0])
            part = is_output_projection(self.model, name) and not isinstance(around, SwappedLayer)
            return "read by the attention around it, which stays float" if part else "not converted"
        for cls, reason in REASONS.items():
            if isinstance(module, cls):
                return reason
        return "weights of its own, which the code around them takes as they are"


def _weights_of(module: Any) -> dict[str, tuple[Tensor | None, int, int]]:
    """Of a converted or packed layer, the weight, its size and its bits by site."""
    if isinstance(module, QuantizedLayer):
        sites = dict(module.own_quantizers())
        return {site: (tensor, tensor.numel(), sites[site].bits) for site, tensor in module._weight_sites().items()}
    return module._packed_weights() if hasattr(module, "_packed_weights") else {}


def _parametrized(module: Any) -> list[Tensor]:
    inner = module._modules.get("parametrizations")
    return list(inner.parameters()) if isinstance(inner, nn.Module) else []


def has_run(layer: QuantizedLayer) -> bool:
    """Whether data reached ``layer`` while ranges were set; a layer that quantizes nothing needs no data."""
    used = {site: quantizer for site, quantizer in layer.own_quantizers() if quantizer.bits != OFF}
    reads = layer.has_others  # a weight of its own has a range once its code has read it
    data = [quantizer for site, quantizer in used.items() if reads or site != WEIGHT] or list(used.values())
    return not data or any(quantizer.is_set for quantizer in data)


def _is_matrix(p: Tensor) -> bool:
    return not isinstance(p, UninitializedParameter) and p.dim() >= 2 and p.numel() > max(p.shape)


# Conversion ###########################################################################################################


def warn_of_float_parts(model: nn.Module, stacklevel: int) -> None:
    """Warn if less than half of the weights are quantized, apart from those that the configuration leaves float."""
    found = coverage(model)
    parts = sorted((part for part in found.parts if not part.chosen), key=lambda part: -part.weights)
    left = sum(part.weights for part in parts)
    on = any(isinstance(m, QLRQuantizer) and m.bits != OFF for m in model.modules())
    if not on or found.quantized >= ENOUGH * (found.quantized + left):
        return
    if found.quantized == 0 and len(parts) < len(found.parts):  # weights are off by choice
        return
    cls = type(model)
    listed = ", ".join(f"{part.name or '(model)'} ({part.type}, {part.weights:,})" for part in parts[:4])
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    total = found.quantized + left
    warnings.warn(
        f"Only {found.quantized / total:.0%} of the weights of {cls.__name__} are quantized ({found.quantized:,} of "
        f"{total:,}); {listed}{more} stay float, for reasons that qgnn_plugin.summary(qmodel) lists; name what to "
        f"convert in 'include' if that is meant, and this warning does not come",
        stacklevel=stacklevel + 1,
    )


def warn_of_unregistered(model: nn.Module, stacklevel: int) -> None:
    """Warn of layers that stay float because they are in no ``modules()``."""
    parts = list(_unregistered_parts(model))
    if parts:
        listed = ", ".join(f"'{part.name}' ({part.type}, {part.weights:,} weights)" for part in parts[:4])
        more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
        warnings.warn(
            f"{type(model).__name__} holds layers that are not converted: {listed}{more} stand where torch does not "
            f"look for layers, so that optimizers and state dicts do not have them either; put them into an "
            f"nn.ModuleList or nn.ModuleDict, or make them attributes, unless that is meant",
            stacklevel=stacklevel + 1,
        )


# Work #################################################################################################################


@contextmanager
def counting_rows(model: nn.Module) -> Iterator[None]:
    """Note how many rows pass each module of ``model``: what :func:`coverage` counts multiply-adds with."""
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: Any, out: Any) -> None:
        found[module] = found.get(module, 0) + _count(out)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (torch.jit.ScriptModule, QLRQuantizer)):
                continue
            if module is model or _weights_of(module) or any(_is_matrix(p) for p in module.parameters(recurse=False)):
                stack.callback(module.register_forward_hook(note).remove)
        yield
    if found:
        found.setdefault(model, 0)
        for module in model.modules():
            _rows.pop(module, None)
        _rows.update(found)


def _count(out: Any) -> int:
    """Rows of a module's result."""
    while isinstance(out, (tuple, list)) and out:
        out = out[0]
    if isinstance(out, dict):
        return sum(_count(value) for value in out.values())
    return out.numel() // max(1, out.size(-1)) if isinstance(out, Tensor) and out.dim() else 0
