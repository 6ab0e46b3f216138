"""How kernels spread the numbers of a narrower value over the features of a wider one."""

from __future__ import annotations

import math

from .shadow import NotTraceable

__all__ = ["is_simple", "mode"]

Dims = tuple[int, ...]


def mode(dims: Dims, full: Dims) -> str:
    """How numbers of ``dims`` are spread over ``full``.

    Raises:
        NotTraceable: If neither way of kernels does it.
    """
    dims = (1,) * (len(full) - len(dims)) + tuple(dims)
    if math.prod(dims) == math.prod(full):
        return "full"
    if math.prod(dims) == 1:
        return "repeat"
    wide = [k for k, n in enumerate(full) if n != 1]
    own = [k for k in wide if dims[k] != 1]
    if own == wide[: len(own)]:
        return "repeat"
    if own == wide[len(wide) - len(own) :]:
        return "tile"
    raise NotTraceable("numbers are spread over inner dimensions")


def is_simple(dims: Dims, full: Dims) -> bool:
    """Whether kernels spread numbers of ``dims`` over ``full``: one number for a run of features, or all."""
    try:
        return mode(dims, full) != "tile"
    except NotTraceable:
        return False
