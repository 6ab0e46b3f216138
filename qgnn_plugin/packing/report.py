"""A table of a packed model: what runs on packed codes, and what in floats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..conversion.coverage import Coverage, coverage
from ..layers.base import WEIGHT
from ..smp.deep import StackPlace
from ..tables import table
from .layers.base import LayerSpec
from .layers.ranges import PackedRange
from .layers.weights import PackedWeight, PackedWeights
from .model import PackedBytes, packed_bytes, packed_layers, specs_of

__all__ = ["PackedLayerReport", "PackedSummary", "packed_summary"]

MOST_NAMES = 6  # of layers, in a line
HEADER = ("layer", "type", "runs", "bits", "float bytes", "packed bytes", "quantized")


@dataclass(frozen=True)
class PackedLayerReport:
    """One layer of a :class:`PackedSummary`.

    Args:
        name: Qualified name.
        type: Its float class.
        reason: Why it runs its quantized-float path, :obj:`None` where it is packed.
        bits: Width of stored codes per site.
        bytes: Its own tensors, without the layers inside it.
        deep_place: Where it stands in a deep stack, :obj:`None` outside of one.
        path: What computes a packed layer: ``"kernel"``, ``"generated kernel"``, ``"row blocks"``, or ``"unblocked"``
            with the reason; of layers without a kernel of their own, what calls up to now have taken.
        compiles_unblocked: Whether compiled code computes its messages for all edges at once, in floats, whatever its
            path is without ``torch.compile``.
    """

    name: str
    type: str
    reason: str | None
    bits: dict[str, int]
    bytes: PackedBytes
    deep_place: StackPlace | None = None
    path: str = "kernel"
    compiles_unblocked: bool = False

    @property
    def runs(self) -> str:
        """How it runs: packed and on what, or in floats and why."""
        return f"packed: {self.path}" if self.reason is None else f"float: {self.reason}"


@dataclass(frozen=True)
class PackedSummary:
    """Per-layer reports of a packed model; prints as a table."""

    layers: list[PackedLayerReport]
    bytes: PackedBytes
    coverage: Coverage = field(default_factory=lambda: Coverage(0, ()))

    def __str__(self) -> str:
        size = self.bytes
        model = f"model: {size.float:,} bytes, packed {size.packed:,} ({size.ratio:.1f}x)"
        rows = [(*_cells(layer), self.coverage.cells(layer.name)[0]) for layer in self.layers]
        return "\n".join([table(HEADER, rows), model, str(self.coverage), *self._when_compiled()])

    def _when_compiled(self) -> list[str]:
        """What ``torch.compile`` does not run on packed rows."""
        names = [layer.name or "(model)" for layer in self.layers if layer.compiles_unblocked]
        if not names:
            return []
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return [f"under torch.compile, messages of all edges at once, in floats: {', '.join(names[:MOST_NAMES])}{more}"]

    __repr__ = __str__


def _cells(layer: PackedLayerReport) -> tuple[str, ...]:
    return (
        layer.name or "(model)",
        layer.type if layer.deep_place is None else f"{layer.type} ({layer.deep_place})",
        layer.runs,
        " ".join(f"{site}:{bits}" for site, bits in layer.bits.items()),
        f"{layer.bytes.float:,}",
        f"{layer.bytes.packed:,}",
    )


def packed_summary(packed: nn.Module) -> PackedSummary:
    """Describe every converted layer of a packed model.

    Raises:
        ValueError: If ``packed`` is not a packed model.
    """
    layers = packed_layers(packed)
    reports = [_report(spec, layers.get(spec.name), packed) for spec in specs_of(packed)]
    return PackedSummary(reports, packed_bytes(packed), coverage(packed))


def _report(spec: LayerSpec, layer: Any, packed: nn.Module) -> PackedLayerReport:
    bits = {site.removesuffix("_quantizer"): s.bits for site, s in spec.sites.items()}
    if layer is None:
        own = packed.get_submodule(spec.name).parameters(recurse=False)
        size = sum(p.numel() * p.element_size() for p in own)
        return PackedLayerReport(spec.name, spec.type, spec.reason, bits, PackedBytes(size, size), spec.deep_place)
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    for site in spec.sites:
        owner = layer.get_submodule(site) if site != WEIGHT or isinstance(layer, PackedWeights) else None
        tensors += [*owner.parameters(), *owner.buffers()] if isinstance(owner, (PackedRange, PackedWeight)) else []
    size = sum(t.numel() * t.element_size() for t in tensors)
    sizes = PackedBytes(layer._packed.float_bytes, size)
    path, compiled = layer._path_taken(), layer.compiles_unblocked
    return PackedLayerReport(spec.name, spec.type, None, bits, sizes, spec.deep_place, path, compiled)
