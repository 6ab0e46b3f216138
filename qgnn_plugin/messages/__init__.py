"""Messages traced once, and run by kernels written for them (docs/any_message.md).

:mod:`.trace` records what a layer's ``message`` and ``aggregate`` do with a few edges, :mod:`.build` sorts the record
into what is computed once per node or edge, what the kernel computes and what follows per row, and :mod:`.traced`
runs it, and compares its first result with the layer's own.  Importing the package offers them to packed layers
(:mod:`.finder`); nothing below it does.
"""

from . import finder

__all__ = ["finder"]
