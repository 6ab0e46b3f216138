"""Modules under the names by which pickles of earlier versions, and scripts, know them."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

from . import conversion
from .convs import appnp, attention, deep, gcn, gin, hops, sage
from .graph import adjacency, edges, fixed, samples
from .packing import embeddings, layers, lazy, message_passing
from .quantizers import packed

__all__: list[str] = []


def _joined(name: str, *modules: ModuleType) -> ModuleType:
    """One module of what several list."""
    joined = ModuleType(name, "Moved to " + ", ".join(module.__name__ for module in modules))
    joined.__dict__.update({key: getattr(module, key) for module in modules for key in module.__all__})
    return joined


def _later(name: str) -> ModuleType:
    """The module ``name`` of this package, imported when something of it is asked for."""
    module = ModuleType(name, f"Moved to {__package__}.{name}")

    def of(attribute: str) -> Any:
        return getattr(importlib.import_module(f"{__package__}.{name}"), attribute)

    module.__getattr__ = of  # type: ignore[method-assign]
    return module


_MOVED = {f"layers.{module.__name__.rpartition('.')[2]}": module for module in (appnp, attention, deep, gcn, gin, hops)}
_MOVED |= {"layers.sage": sage, "packing.attention": attention}
_MOVED |= {"packing.convs": _joined("convs", deep, gcn, gin, sage), "packing.propagation": _joined("hops", appnp, hops)}
_MOVED |= {"layers.graph": adjacency, "layers.edges": edges, "layers.fixed": fixed, "layers.samples": samples}
for _package in (conversion, embeddings, layers, lazy, message_passing):
    for _found in pkgutil.iter_modules(_package.__path__):
        if _found.name != "embeddings":  # which is the name of its package now
            _old = _found.name if _package is conversion else f"packing.{_found.name}"
            _MOVED[_old] = importlib.import_module(f"{_package.__name__}.{_found.name}")
_MOVED |= {"packing.packed_tensor": packed}
_MOVED |= {f"smp.{name}": _later(f"analysis.{name}") for name in ("injection", "operators", "stack_error")}
_MOVED |= {"smp.error": _later("analysis.error_report"), "smp.bounds": _later("analysis.bounds")}

for _name, _module in _MOVED.items():
    sys.modules[f"{__package__}.{_name}"] = _module
