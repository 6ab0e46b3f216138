"""Columns of results that are not computed yet, and results whose rows have several dimensions.

What a linear map gives for two things at once is split (``beta, gamma = film(x).split(F, dim=-1)``), features have
heads or towers (``[N, T, F]``), and aggregations are joined with what they are of (``torch.cat([x, out], dim=-1)``).
Noted here, none of it writes a matrix of floats where the next layers take its codes, tower by tower: these are packed
together, in one pass over blocks of rows (:class:`~.asked.Asked`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ...kernels.finite import is_finite
from . import sizes
from .deferred import NOTES, VIEWS, DeferredTensor, Pending, Step, materialized
from .producers import Producer, Rows, row_blocks, with_epilogue
from .runs import JointRuns, RunsOfColumns

__all__ = ["Columns", "Late", "Shaped", "deferred_result", "waits"]

aten = torch.ops.aten
Dims = tuple[int, ...]

LARGEST_SHARE = 0.4  # of a row, of what is there already and is copied to be joined with what is not


def deferred_result(producer: Producer, on_repeat: Callable[[], None], asked: Any) -> DeferredTensor:
    """What ``producer`` computes, in its dimensions."""
    pending = Pending(producer, on_repeat=on_repeat, asked=asked)
    return shaped(pending, producer.dims) if producer.dims else DeferredTensor._of(pending)


def shaped(pending: Pending, dims: Dims) -> DeferredTensor:
    """A result whose rows have the dimensions ``dims``."""
    return DeferredTensor._of(pending) if len(dims) == 1 else Shaped._of(pending, dims)


def waits(x: Any) -> bool:
    """Whether ``x`` is a result that is not computed yet."""
    return isinstance(x, DeferredTensor) and x.pending.value is None


@dataclass(frozen=True, eq=False)
class Late:
    """A matrix that is not computed yet, as it is now: what is noted on it later is none of its rows.

    Args:
        base: What tells which result it is of.
        producer: That result.
        columns: Which of its columns it is.
    """

    base: Pending
    producer: Producer
    columns: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor) -> Late:
        """That of a result for which :func:`waits` holds."""
        pending: Pending = x.pending  # type: ignore[attr-defined]
        base = _base(pending)
        producer = base.composed()
        return cls(base, producer, pending.columns if isinstance(pending, Columns) else (0, producer.num_features))

    def take(self, index: Tensor) -> Tensor:
        """The rows numbered by ``index``."""
        return self.producer.take(index)[:, self.columns[0] : self.columns[1]]

    def rows(self, rows: slice, made: dict[int, Tensor]) -> Tensor:
        """Some rows; ``made`` has these rows of results, by identity: those of several columns are computed once."""
        if id(self.base) not in made:
            made[id(self.base)] = self.producer.run(rows.start, rows.stop)
        return made[id(self.base)][:, self.columns[0] : self.columns[1]]


class Columns(Pending):
    """The columns ``[start, stop)`` of another result; its value is a view of that one's, as in torch."""

    def __init__(self, base: Pending, start: int, stop: int) -> None:
        self.base, self.columns = base, (start, stop)
        self.view: Tensor | None = None

    is_whole = False
    steps: tuple[Step, ...] = ()

    @classmethod
    def between(cls, base: Pending, start: int, stop: int) -> Pending:
        if (start, stop) == (0, base.producer.num_features):
            return base
        if not isinstance(base, Columns):
            return cls(base, start, stop)
        first = base.columns[0]
        return cls(base.base, first + start, first + stop)

    @property
    def row_stride(self) -> int:
        return self.base.row_stride

    @property
    def value(self) -> Tensor | None:
        if self.view is None and self.base.value is not None:
            self.view = self.base.value[:, self.columns[0] : self.columns[1]]
        return self.view

    @property
    def runs(self) -> Any:
        if self.base.runs_of_columns is None:
            self.base.runs_of_columns = RunsOfColumns(self.base.runs)
        return self.base.runs_of_columns

    @property
    def producer(self) -> Producer:
        """Of the other result as it is now: steps that are noted on it later change it, not what was made before."""
        whole, (first, last), latest = self.base.composed(), self.columns, self.latest()

        def run(start: int, stop: int, **out: Any) -> Rows:
            # Several columns are asked for these rows one after another: they are computed once.
            if latest.get("rows") != (start, stop):
                latest.clear()
                latest.update(value=whole.run(start, stop), rows=(start, stop))
            return with_epilogue(latest["value"][:, first:last].clone(), **out)

        return Producer(whole.num_rows, last - first, whole.device, run, is_fused=False)

    def latest(self) -> dict[str, Any]:
        """The rows of the other result that were computed last, shared by its columns while it has no further step."""
        known = self.base.rows_of_columns
        if known is None or known[0] != self.base.steps:
            known = self.base.rows_of_columns = (self.base.steps, {})
        return known[1]

    def then(self, step: Step) -> Pending:
        after = Pending.__new__(Pending)
        after.producer, after.runs, after.value = self.producer, self.runs, self.value
        after.steps, after.first, after.codes = (step,), None, {}
        return after

    def materialize(self) -> Tensor:
        self.base.materialize()
        assert self.value is not None
        return self.value

    def blocks(self, only_read: bool = False) -> Any:
        first, last = self.columns
        if self.value is None:
            yield from ((rows, value[:, first:last].contiguous()) for rows, value in self.base.blocks(only_read))
            return
        for rows in row_blocks(self.value.size(0), last - first, self.value.device):
            yield rows, self.value[rows]

    def packed(self, **out: Any) -> Rows:
        if "columns" in out:
            first = self.columns[0]
            out["columns"] = (first + out["columns"][0], first + out["columns"][1])
        else:
            out["columns"] = self.columns
        return self.base.packed(**out)


class Shaped(DeferredTensor):
    """A result ``[N, *dims]`` that is not computed yet; a row has its numbers one after another."""

    def _noted(self, func: Any, args: Any, kwargs: Any) -> Any:
        return VIEWS[func](self, *args, **kwargs) if func in VIEWS else None

    def materialized(self) -> Tensor:
        return super().materialized().view(self.shape)


# Views ################################################################################################################


def _view(x: DeferredTensor, size: Any) -> DeferredTensor | None:
    """``x.view(size)`` where rows stay rows."""
    sizes = list(size)
    known = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and known:
        sizes[sizes.index(-1)] = x.numel() // known
    if len(sizes) < 2 or sizes[0] != x.size(0) or 0 in sizes or math.prod(sizes) != x.numel():
        return None
    return shaped(x.pending, tuple(sizes[1:]))


def _select(x: DeferredTensor, dim: int, index: int) -> DeferredTensor | None:
    """``x.select(dim, index)`` of the first dimension of rows."""
    if dim % x.dim() != 1 or x.dim() < 3 or not -x.size(1) <= index < x.size(1):
        return None
    count, dims = math.prod(x.shape[2:]), tuple(x.shape[2:])
    start = index % x.size(1) * count
    return shaped(Columns.between(x.pending, start, start + count), dims)


def _slice(x: DeferredTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """``x[:, start:end]`` of the first dimension of rows."""
    if dim % x.dim() != 1 or step != 1:
        return None
    first, last, _ = slice(start, end).indices(x.size(1))
    return _part(x, first, last) if first < last else None


def _split(x: DeferredTensor, size: Any, dim: int = 0) -> Any:
    """``x.split(size, dim)`` of the first dimension of rows."""
    if dim % x.dim() != 1:
        return None
    width = x.size(1)
    sizes = [min(size, width - at) for at in range(0, width, size)] if isinstance(size, int) else list(size)
    if sum(sizes) != width or not all(sizes):
        return None
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [_part(x, end - n, end) for end, n in zip(ends, sizes, strict=True)]


def _part(x: DeferredTensor, first: int, last: int) -> DeferredTensor:
    each, rest = math.prod(x.shape[2:]), tuple(x.shape[2:])
    return shaped(Columns.between(x.pending, first * each, last * each), (last - first, *rest))


VIEWS |= {
    aten.view.default: _view, aten._unsafe_view.default: _view, aten.select.int: _select, aten.slice.Tensor: _slice,
    aten.split.Tensor: _split, aten.split_with_sizes.default: _split,
}  # fmt: skip


def _base(pending: Pending) -> Pending:
    return pending.base if isinstance(pending, Columns) else pending


def _of_its_kind(make: Any) -> Callable[..., Tensor]:
    """An operation that looks at dtype and device alone."""

    def made(x: DeferredTensor, *args: Any, **kwargs: Any) -> Tensor:
        return make(torch.empty(0, dtype=x.dtype, device=x.device), *args, **kwargs)

    return made


VIEWS |= {
    make: _of_its_kind(make)
    for make in (aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default, aten.new_full.default)
}


# Joined ###############################################################################################################


def note_cat(tensors: Any, dim: int = 0) -> DeferredTensor | None:
    """``torch.cat(tensors, dim)`` of the last dimension, where most of a row is not computed yet.

    What is there is copied: the layer may write over it before the result is computed.
    """
    if not all(type(t) in (Tensor, Parameter, DeferredTensor, Shaped) for t in tensors):
        return None
    first = tensors[0]
    rank = first.dim()
    if rank < 2 or dim % rank != rank - 1:
        return None
    if any(t.dtype is not torch.float32 or t.layout != torch.strided or t.device != first.device for t in tensors):
        return None
    if any(t.shape[:-1] != first.shape[:-1] or t.numel() == 0 for t in tensors):
        return None
    widths, late = [t.size(-1) for t in tensors], [t for t in tensors if waits(t)]
    known = sum(width for width, t in zip(widths, tensors, strict=True) if not waits(t))
    if known > LARGEST_SHARE * sum(widths) or len({id(_base(t.pending)) for t in late}) < len(late):
        return None
    middle = tuple(first.shape[1:-1])
    if not all(waits(t) or is_finite(materialized(t)) for t in tensors):  # sites would have to look for NaN
        return None
    parts = [
        t.pending.composed() if waits(t) else Producer.of(materialized(t).detach().flatten(1).clone()) for t in tensors
    ]
    pending = Pending(_side_by_side(parts, middle, widths))
    pending.runs = JointRuns(*(t.pending.runs for t in late))
    return shaped(pending, (*middle, sum(widths)))


def _side_by_side(parts: list[Producer], middle: Dims, widths: list[int]) -> Producer:
    def run(start: int, stop: int, **out: Any) -> Rows:
        pieces = [
            part.run(start, stop).view(stop - start, *middle, w) for part, w in zip(parts, widths, strict=True)
        ]
        return with_epilogue(torch.cat(pieces, -1).flatten(1), **out)

    def taken(index: Tensor) -> Producer:
        return _side_by_side([part.taken(index) for part in parts], middle, widths)  # type: ignore[misc]

    first, alone = parts[0], all(part.taken is not None for part in parts)
    width = math.prod(middle) * sum(widths)
    is_small = first.num_rows * width < sizes.FEW_BLOCKS * sizes.BLOCK_FLOATS
    alive = 2 * width if is_small else width  # the parts and all of them
    return Producer(
        first.num_rows, width, first.device, run, is_fused=False, taken=taken if alone else None, alive=alive
    )


NOTES[aten.cat.default] = note_cat
