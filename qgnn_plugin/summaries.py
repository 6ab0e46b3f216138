"""A table of a converted model: bits, bytes, ranges, error and smoothness per layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .config import OFF
from .conversion.converted import expect_converted, expect_values, is_packed, is_quantized, quantized_layers, quantizers
from .conversion.coverage import Coverage, coverage, has_run
from .kernels.layout import row_words
from .layers.normalized import still
from .packing.model import packed_bytes
from .packing.report import PackedSummary, packed_summary
from .quantizers import QLRQuantizer, RangeKind
from .smp import smp_layers
from .smp.deep import StackPlace
from .tables import table

__all__ = ["LayerReport", "Summary", "model_bytes", "summary"]

FLOAT = 4  # bytes of a number of a range
SHARES = ("quantized", "work")
HEADER = ("layer", "type", "bits", "bytes", "packed", "ranges", "weight error", "constraint", "multiplier", *SHARES)


@dataclass(frozen=True)
class LayerReport:
    """One layer of a :class:`Summary`.

    Args:
        name: Qualified name.
        type: Its float class.
        bits: Width per site, such as ``{"weight": 4}``.
        float_bytes: Size of its own parameters as they are.
        packed_bytes: The same once packed: quantized weights in whole 32-bit words per row, and ranges.
        ranges: ``(lower, upper)`` per site with one range, in the units of the data.
        weight_error: ``||Q(W) - W|| / ||W||``, :obj:`None` without a set weight range.
        constraint: ``g`` over its bound in the last training forward.
        multiplier: Multiplier of the smoothness constraint.
        deep_place: Where it stands in a deep stack, :obj:`None` outside of one.
    """

    name: str
    type: str
    bits: dict[str, int]
    float_bytes: int
    packed_bytes: int
    ranges: dict[str, tuple[float, float]]
    weight_error: float | None
    constraint: float | None
    multiplier: float | None
    deep_place: StackPlace | None = None


@dataclass(frozen=True)
class Summary:
    """Per-layer reports of a converted model, and what stays float; prints as a table."""

    layers: list[LayerReport]
    float_bytes: int
    packed_bytes: int
    coverage: Coverage = field(default_factory=lambda: Coverage(0, ()))

    def __str__(self) -> str:
        ratio = self.float_bytes / max(1, self.packed_bytes)
        size = f"model: {self.float_bytes:,} bytes, packed {self.packed_bytes:,} ({ratio:.1f}x)"
        rows = [(*_cells(layer), *self.coverage.cells(layer.name)) for layer in self.layers]
        return "\n".join([table(HEADER, rows), size, str(self.coverage)])

    __repr__ = __str__


def _cells(layer: LayerReport) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    return (
        layer.name or "(model)",
        layer.type if layer.deep_place is None else f"{layer.type} ({layer.deep_place})",
        " ".join(f"{site}:{bits}" for site, bits in layer.bits.items()),
        f"{layer.float_bytes:,}",
        f"{layer.packed_bytes:,}",
        " ".join(f"{site}:[{low:.3g},{high:.3g}]" for site, (low, high) in layer.ranges.items()) or "-",
        number(layer.weight_error),
        number(layer.constraint),
        number(layer.multiplier),
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers once packed; of a plain model, as they are."""
    if is_packed(model):
        return packed_bytes(model).packed
    return _summary(model).packed_bytes if is_quantized(model) else _tensor_bytes(model)


def summary(qmodel: nn.Module) -> Summary | PackedSummary:
    """Describe every converted layer, and what of the model is quantized and what stays float, and why.

    Of each layer it also says which share of its own weights is ``quantized``, and its share of the ``work``: of the
    multiply-adds with weights that the model does for one batch, known once it is calibrated.

    Of a packed model it also says whether a layer runs packed or in floats.

    Raises:
        ValueError: If ``qmodel`` is not a converted model.
    """
    if isinstance(qmodel, nn.Module) and is_packed(qmodel):
        return packed_summary(qmodel)
    expect_converted(qmodel)
    expect_values(qmodel)
    with still(qmodel):
        return _summary(qmodel)


def _summary(qmodel: nn.Module) -> Summary:
    ran = any(q.bits != OFF and q.is_set for q in quantizers(qmodel).values())
    layers = [_report(name, layer, ran and not has_run(layer)) for name, layer in quantized_layers(qmodel).items()]
    before = sum(layer.float_bytes for layer in layers)
    extra = {id(t) for module in qmodel.modules() if isinstance(module, QLRQuantizer) for t in _tensors(module)}
    extra |= {id(t) for layer in smp_layers(qmodel).values() for t in layer._constraint_buffers}
    total = sum(t.numel() * t.element_size() for t in _tensors(qmodel) if id(t) not in extra)
    packed = total - before + sum(layer.packed_bytes for layer in layers)
    return Summary(layers, total, packed, coverage(qmodel))


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _tensor_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(module))


def _report(name: str, layer: Any, stays: bool) -> LayerReport:
    """What is to be said of a layer; one that ``stays`` float when packed, as no data reached it, keeps its bytes."""
    own = dict(layer.own_quantizers())
    bits = {site.removesuffix("_quantizer"): q.stored_bits for site, q in own.items()}
    if getattr(layer, "attention_bits", OFF) != OFF:
        bits["attention"] = layer.attention_bits
    ranges = {site.removesuffix("_quantizer"): r for site, q in own.items() if (r := _range(q)) is not None}
    parameters = list(layer.parameters(recurse=False))
    before = sum(p.numel() * p.element_size() for p in parameters)
    after, error = before, None
    weights = layer._weight_sites()
    ran = any(q.is_set for q in own.values() if q.bits != OFF)  # what has no range then is not read: it stays as it is
    used = {site: q for site, q in own.items() if q.bits != OFF and (q.is_set or not ran) and not stays}
    matrices = [(used[site], matrix) for site, matrix in layer._weight_matrices().items() if site in used]
    for weight, matrix in matrices:
        held = 4 * row_words(matrix.size(1), weight.bits) * matrix.size(0) + _range_bytes(weight, matrix.size(0))
        after += held - matrix.numel() * matrix.element_size()
    if matrices and all(weight.is_set for weight, _ in matrices):
        error = _weight_error(matrices)
    after += sum(_range_bytes(q) for site, q in used.items() if site not in weights)
    smooth = getattr(layer, "_smp", None) is not None
    return LayerReport(
        name,
        type(layer).float_class.__name__,
        bits,
        before,
        after,
        ranges,
        error,
        layer._constraint if smooth else None,
        layer._multiplier_value if smooth else None,
        getattr(layer, "_deep_place", None),
    )


def _range_bytes(quantizer: QLRQuantizer, rows: int = 0) -> int:
    """Bytes of a range in a packed model, of a weight of ``rows`` rows: of what does not follow from the rest."""
    if quantizer.is_zero_one:
        return 0
    by_row = rows > 0 and quantizer.granularity == "node"
    each = rows if by_row else quantizer.log_scale.numel()
    zero = quantizer.zero_code
    ends = 2 if zero is None or (by_row and zero != 0) else 1
    settings = () if rows else (quantizer.unit, quantizer.skew)
    return FLOAT * (ends * each + sum(setting is not None for setting in settings))


@torch.no_grad()
def _weight_error(matrices: list[tuple[QLRQuantizer, torch.Tensor]]) -> float:
    error = sum(float((weight(matrix).dequantize() - matrix).square().sum()) for weight, matrix in matrices)
    return math.sqrt(error / max(1e-60, sum(float(matrix.square().sum()) for _, matrix in matrices)))


@torch.no_grad()
def _range(quantizer: QLRQuantizer) -> tuple[float, float] | None:
    kind = quantizer.range_kind
    if quantizer.bits == OFF or kind == RangeKind.UNSET or quantizer.is_zero_one:
        return None
    if quantizer.log_scale.numel() != 1:
        return None
    scale, lower = quantizer.range()
    return float(lower) + 0.0, float(lower + scale * quantizer.qmax)  # + 0.0 turns -0 into 0
