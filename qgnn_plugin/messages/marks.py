"""Linear maps of packed layers as single operations of a record: they look at codes, which a tracer cannot follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .shadow import NotTraceable

__all__ = ["LINEAR", "marked"]

_library = torch.library.Library("qgnn_messages", "DEF")
_library.define("linear(Tensor x, int number, int width) -> Tensor")


def _stand_in(x: Tensor, number: int, width: int) -> Tensor:
    """Of the right shape: the record is only looked at."""
    return x.new_zeros((*x.shape[:-1], width))


_library.impl("linear", _stand_in, "CompositeExplicitAutograd")
LINEAR = torch.ops.qgnn_messages.linear.default


class _Marked(nn.Module):
    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.number, self.width = number, width

    def forward(self, x: Tensor) -> Tensor:
        return LINEAR(x, self.number, self.width)


class _Unrecorded(nn.Module):
    """Takes the place of a packed module whose code multiplies by parameters of its own.

    What such code holds in their place computes past the dispatcher, which a recording mode does not survive.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotTraceable(f"it calls a {self.name}, which multiplies by weights of its own")


def marked(child: Any, found: list[nn.Module]) -> nn.Module | None:
    """What takes the place of a packed module inside a layer; :obj:`None` for those that are recorded as they are.

    Linear maps are added to ``found``.
    """
    known = vars(child)  # what a wrapper passes attributes on from is marked itself
    if "_packed" in known and getattr(child, "has_others", False):
        return _Unrecorded(type(child).__name__)
    if "_packed" not in known or "_num_out" not in known:
        return None
    if child._forward_hooks or child._forward_pre_hooks or child.output_quantizer is not None:
        return None
    found.append(child)
    return _Marked(len(found) - 1, child._num_out)
