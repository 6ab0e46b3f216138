"""Convolutions: one module for each, found by its layer type through the registry, where importing this enters them.

Nothing below this package imports it, but for the package itself, so that every layer is known once it is there.
"""

from . import appnp, attention, deep, gcn, gin, hops, sage

__all__ = ["appnp", "attention", "deep", "gcn", "gin", "hops", "sage"]
