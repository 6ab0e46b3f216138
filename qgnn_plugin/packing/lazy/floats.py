"""Floats that are there already for results which nobody has asked for yet, and what else may read them."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import Tensor

__all__ = ["Floats"]


class Floats:
    """A matrix that was computed for a result, and that only what follows from this result can read.

    Args:
        value: The matrix ``[N, F]``; nobody else holds it.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.readers: WeakSet[Any] = WeakSet()  # results that are made of it, should somebody ask for them
        self.is_kept = False  # by what cannot be told any more

    def left_to(self, reader: Any) -> Tensor | None:
        """The matrix, for ``reader`` to write over; :obj:`None` where something else that is left may read it."""
        is_alone = not self.is_kept and all(other is reader for other in self.readers)
        self.readers.discard(reader)
        return self.value if is_alone else None
