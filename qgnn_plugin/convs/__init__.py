"""Convolutions, told once each: what a layer makes of codes, whether its sites are trainable or frozen.

Importing this package enters every one of them into the registries.  Nothing below it does; the package around it does,
so that a layer is known whatever is imported first.
"""

from . import appnp, attention, deep, gcn, gin, graph_conv, hops, sage

__all__ = ["appnp", "attention", "deep", "gcn", "gin", "graph_conv", "hops", "sage"]
