"""From which sizes on results are computed by blocks, or noted at all.

Small graphs take other ways than large ones.  Every such size has its home here and is looked up where it is used, as
``sizes.NAME``, never imported by name: who sets one here, as tests do, has small graphs computed as large ones.
"""

from __future__ import annotations

# Floats of a block of rows, which stay in the cache from the kernel to the codes.
BLOCK_FLOATS = 1 << 19
# Floats of what a model gathers for its edges, from which on that is noted: less stays in the cache anyway.
FEWEST_GATHERED = 1 << 20
# Indices among a model's arguments, from which on gathers are looked for.
FEWEST_INDICES = 1 << 14
# Blocks of a joined result, below which what a block holds counts beside the whole.
FEW_BLOCKS = 8
# Results of a linear map that go the short way: of more, codes that are handed on save more than the long way costs.
FEW_RESULTS = 1 << 19
# Floats of what a block's edges hold of the widest argument or message, for each thread.  A block costs about a
# millisecond of calls whatever its size: EdgeConv of width 64 took 1.5 times as long in blocks of half of this.
EDGE_BLOCK_FLOATS = 1 << 20
# Edges of such a block.
FEWEST_EDGES, MOST_EDGES = 256, 1 << 14
