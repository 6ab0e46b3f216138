"""Modules under the names by which pickles of earlier versions, and scripts, know them."""

from __future__ import annotations

import sys

from . import convs
from .convs import appnp, attention, deep, gcn, gin, hops, sage

__all__: list[str] = []

_MOVED = {f"layers.{module.__name__.rpartition('.')[2]}": module for module in (appnp, attention, deep, gcn, gin, hops)}
_MOVED |= {"layers.sage": sage, "packing.attention": convs, "packing.convs": convs, "packing.propagation": convs}

for _name, _module in _MOVED.items():
    sys.modules[f"{__package__}.{_name}"] = _module
