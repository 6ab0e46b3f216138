"""Modules under the names by which pickles of earlier versions, and scripts, know them."""

from __future__ import annotations

import sys
from types import ModuleType

from .convs import appnp, attention, deep, gcn, gin, hops, sage

__all__: list[str] = []


def _joined(name: str, *modules: ModuleType) -> ModuleType:
    """One module of what several list."""
    joined = ModuleType(name, "Moved to " + ", ".join(module.__name__ for module in modules))
    joined.__dict__.update({key: getattr(module, key) for module in modules for key in module.__all__})
    return joined


_MOVED = {f"layers.{module.__name__.rpartition('.')[2]}": module for module in (appnp, attention, deep, gcn, gin, hops)}
_MOVED |= {"layers.sage": sage, "packing.attention": attention}
_MOVED |= {"packing.convs": _joined("convs", deep, gcn, gin, sage), "packing.propagation": _joined("hops", appnp, hops)}

for _name, _module in _MOVED.items():
    sys.modules[f"{__package__}.{_name}"] = _module
