"""Rows of nodes gathered for every edge by a model's own code: ``x[row]`` as a result that is not computed yet.

Networks of edges (``MetaLayer``, decoders of links, potentials) are given what the ends of each edge have.  What they
do to it row by row, and the codes that their first packed layer takes, are then made by blocks of edges, so that
nothing of edges times features is written before somebody asks for such floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from . import sizes
from .calls import is_deferring
from .deferred import NOTES, DeferredTensor, Pending, materialized
from .producers import Producer

__all__ = ["Gathering"]

aten = torch.ops.aten

FEWEST_ROWS = 2  # times those that they are of: these are copied, since the model may write over them


def gathered_rows(x: Any, index: Any) -> Tensor | None:
    """``x[index]`` of a float matrix and many rows of it, not computed yet; :obj:`None` where torch should do it."""
    if type(x) not in (Tensor, Parameter, DeferredTensor) or type(index) is not Tensor or not is_deferring():
        return None
    if x.dim() != 2 or index.dim() != 1 or index.dtype is not torch.int64 or x.dtype is not torch.float32:
        return None
    if x.device.type != "cpu" or index.device != x.device or x.layout != torch.strided:
        return None
    rows = index.numel()
    if rows < FEWEST_ROWS * x.size(0) or rows * x.size(1) < sizes.FEWEST_GATHERED:
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    first, last = index.aminmax()
    if first < 0 or last >= x.size(0):
        return None
    return DeferredTensor._of(Pending(Producer.gathering(materialized(x).detach().clone(), index.clone())))


def _note_index(x: Any, indices: Any) -> Tensor | None:
    return gathered_rows(x, indices[0]) if len(indices) == 1 else None


def _note_index_select(x: Any, dim: int, index: Any) -> Tensor | None:
    return gathered_rows(x, index) if dim == 0 else None


NOTES[aten.index.Tensor] = _note_index  # of results of packed layers, which pass the dispatcher
NOTES[aten.index_select.default] = _note_index_select

_NOTES: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.__getitem__: gathered_rows, Tensor.index_select: _note_index_select, torch.index_select: _note_index_select,
}  # fmt: skip


class Gathering(TorchFunctionMode):
    """Sees gathers of ordinary tensors, such as a model's own input."""

    sees_gathers = True

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> Gathering | None:
        """For a call whose arguments name enough rows to be gathered; others are not to pay for a look."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.numel() >= sizes.FEWEST_INDICES and value.dtype is torch.int64:
                return cls()
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note = _NOTES.get(func)
        if note is not None and not kwargs and (noted := note(*args)) is not None:
            return noted
        return func(*args, **(kwargs or {}))
