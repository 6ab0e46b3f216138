"""What the operands of a row program hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx

from .evaluate import Values
from .spaces import EDGE, SOURCE, TARGET

__all__ = ["SIDE", "Leaf", "PackedForm"]

SIDE = {SOURCE: "source", TARGET: "target", EDGE: "edge"}  # of operands, by where an operation is computed


@dataclass(frozen=True)
class PackedForm:
    """Of packed features: bits, kind of ranges."""

    bits: int
    ranges: str


@dataclass(frozen=True)
class Leaf:
    """What an operand of the program holds.

    Args:
        node: Of the record.
        is_packed: Whether it is an input that is taken as it is packed.
        value: What is computed of the values, ``[rows, width]``; the default is the node's own, one row after another.
    """

    node: fx.Node
    is_packed: bool = False
    value: Callable[[Values], Tensor] | None = None

    def rows(self, values: Values) -> Tensor:
        if self.value is not None:
            return self.value(values)
        return values[self.node]

