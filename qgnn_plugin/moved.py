"""Modules under the names by which pickles of earlier versions, and scripts, know them."""

from __future__ import annotations

import sys

from .convs import appnp, attention, deep, gcn, gin, hops, sage

__all__: list[str] = []

_MOVED = {"layers": (appnp, attention, deep, gcn, gin, hops, sage)}

for _package, _modules in _MOVED.items():
    for _module in _modules:
        sys.modules[f"{__package__}.{_package}.{_module.__name__.rpartition('.')[2]}"] = _module
