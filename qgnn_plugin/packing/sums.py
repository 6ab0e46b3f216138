"""Sums and products of results that are not computed yet, and sums over a stack of relations without the stack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .asked import Asked
from .deferred import NOTES, DeferredTensor, Pending, materialized
from .producers import Producer, gathered, row_blocks

__all__ = ["BothRun", "Stacked"]

aten = torch.ops.aten


def note_sum(x: Any, other: Any, **options: Any) -> Tensor | None:
    """``x + other`` of two matrices that are not computed yet; of one of them by blocks of rows, without it as a whole.
    """
    return None if options else _both(x, other, Producer.plus, Tensor.add_)


def note_product(x: Any, other: Any) -> Tensor | None:
    """``x * other``, as :func:`note_sum`."""
    return _both(x, other, Producer.times, Tensor.mul_)


def _both(x: Any, other: Any, combined: Callable[..., Producer], onto: Callable[..., Tensor]) -> Tensor | None:
    if not all(isinstance(t, Tensor) for t in (x, other)) or other is x:
        return None
    if other.shape != x.shape or x.device != other.device:
        return None
    waits = [type(t) is DeferredTensor and t.pending.value is None for t in (x, other)]
    if not all(waits):
        return _onto(other, x, onto) if waits[0] else _onto(x, other, onto) if waits[1] else None
    first, second = x.pending, other.pending
    if first.producer is second.producer:  # of one result, which is computed once
        return DeferredTensor._of(first.of_both(second.steps, onto))
    pending = Pending(combined(first.composed(), second.composed()))
    pending.runs = BothRun(first.runs, second.runs)
    return DeferredTensor._of(pending)


def _onto(known: Tensor, x: Any, combine: Callable[..., Tensor]) -> Tensor | None:
    """A matrix that is there with one that is not computed yet; :obj:`None` where there is one block."""
    plain_matrix = type(known) is Tensor and known.dtype is torch.float32 and known.layout == torch.strided
    num_rows, num_features = x.shape
    if not plain_matrix or known.requires_grad or len(list(row_blocks(num_rows, num_features, x.device))) < 2:
        return None
    return gathered(num_rows, ((rows, combine(value, known[rows])) for rows, value in x.pending.blocks()))


class BothRun:
    """The runs of a sum are those of its terms; columns of one result, whose rows are computed once, are one."""

    is_once = False
    terms: tuple[Any, ...]

    def __init__(self, *terms: Any) -> None:
        every = [one for term in terms for one in (term.terms if type(term) is BothRun else (term,))]
        firsts = {id(term): k for k, term in reversed(list(enumerate(every)))}
        self.terms = tuple(t for k, t in enumerate(every) if not getattr(t, "is_once", False) or firsts[id(t)] == k)

    @property
    def asked(self) -> Asked:
        """That of the first: ranges are told apart by what packs in them."""
        return self.terms[0].asked

    def add(self) -> None:
        for term in self.terms:
            term.add()

    def undo(self) -> None:
        for term in self.terms:
            term.undo()


class Stacked(DeferredTensor):
    """Matrices that are not computed yet, ``[M, N, F]``; their sum is computed by blocks of rows, without the stack."""

    parts: tuple[DeferredTensor, ...]

    @classmethod
    def of(cls, tensors: Any, dim: int = 0) -> Stacked | None:
        """The stack of ``tensors``; :obj:`None` where some are known, or stacked along another dimension."""
        if dim != 0 or not all(type(t) is DeferredTensor and t.pending.value is None for t in tensors):
            return None
        first = tensors[0]
        if any(t.shape != first.shape or t.device != first.device for t in tensors):
            return None
        made = Tensor._make_wrapper_subclass(
            cls, (len(tensors), *first.shape), dtype=torch.float32, device=first.device
        )
        made.parts, made.pending = tuple(tensors), _StackedPending(tensors)  # type: ignore[assignment]
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        x = args[0] if args else None
        if func is aten.sum.dim_IntList and isinstance(x, cls) and list(args[1]) == [0] and not kwargs:
            pending = [part.pending for part in x.parts]
            waits = x.pending.value is None and all(p.value is None for p in pending)
            if waits and not (len(args) > 2 and args[2]):
                return _sum_of(pending)
        return func(*materialized(args), **materialized(kwargs or {}))


IN_ORDER = 4  # terms that torch adds one after another, wherever their results lie


def _sum_of(parts: list[Pending]) -> Tensor:
    """What ``torch.stack(parts).sum(0)`` gives, bit for bit; of few terms not computed yet, else by blocks of rows."""
    terms = [part.composed() for part in parts]
    if len(terms) <= IN_ORDER:
        pending = Pending(functools.reduce(Producer.plus, terms))
        pending.runs = BothRun(*(part.runs for part in parts))
        return DeferredTensor._of(pending)
    for part in parts:
        part.runs.add()
    rows, features, device = terms[0].num_rows, terms[0].num_features, terms[0].device
    blocks = row_blocks(rows, len(terms) * features, device)
    return gathered(rows, ((b, torch.stack([t.run(b.start, b.stop) for t in terms]).sum(0)) for b in blocks))


class _StackedPending:
    """Of a stack, what :class:`Pending` is of a matrix."""

    def __init__(self, parts: Any) -> None:
        self.parts, self.value, self.steps = parts, None, ()

    def materialize(self) -> Tensor:
        if self.value is None:
            self.value = torch.stack([part.materialized() for part in self.parts])  # type: ignore[assignment]
        assert self.value is not None
        return self.value


NOTES[aten.add.Tensor] = note_sum
NOTES[aten.mul.Tensor] = note_product
NOTES[aten.stack.default] = Stacked.of
