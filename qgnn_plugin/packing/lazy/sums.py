"""Sums and products of results that are not computed yet, and sums over a stack of relations without the stack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ...kernels.cpu.memory import empty
from ...kernels.finite import is_finite
from .calls import left_to_scope
from .deferred import NOTES, VIEWS, DeferredTensor, Pending, materialized
from .producers import Producer, gathered, row_blocks
from .runs import JointRuns
from .stand_in import refusing_reads

__all__ = ["Stacked"]

aten = torch.ops.aten


def note_sum(x: Any, other: Any, **options: Any) -> Tensor | None:
    """``x + other`` of two matrices that are not computed yet; of one of them by blocks of rows, without it as a whole.
    """
    return None if options else _both(x, other, Producer.plus, Tensor.add_)


def note_product(x: Any, other: Any) -> Tensor | None:
    """``x * other``, as :func:`note_sum`."""
    return _both(x, other, partial(Producer.combined, onto=Tensor.mul_), Tensor.mul_)


def note_difference(x: Any, other: Any, **options: Any) -> Tensor | None:
    """``x - other``, as :func:`note_sum`, where ``x`` is not computed yet."""
    if options or not _is_late(x) or not isinstance(other, Tensor) or x.shape != other.shape:
        return None
    return _both(x, other, partial(Producer.combined, onto=Tensor.sub_), Tensor.sub_)


def in_place(note: Callable[..., Tensor | None], combine: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    """The form of ``note`` that changes its first matrix; one that is there already, by blocks of the other."""

    def noted(x: Any, other: Any, **options: Any) -> Tensor | None:
        if not _is_late(x):
            by_blocks = not options and _is_late(other) and _is_plain(x) and x.shape == other.shape
            if not by_blocks or _is_one_block(other):
                return None
            for rows, value in other.pending.blocks():
                combine(x[rows], value)
            return x
        after = note(x, other, **options) if x.pending.is_whole else None
        if after is None or after.shape != x.shape:
            return None
        x.pending.become(after.pending)  # type: ignore[attr-defined]
        return x

    return noted


def _is_one_block(x: Tensor) -> bool:
    return len(list(row_blocks(x.size(0), x.size(1), x.device))) < 2


def _is_late(x: Any) -> bool:
    """Whether ``x`` is a matrix that is not computed yet."""
    return type(x) is DeferredTensor and x.pending.value is None


def _both(x: Any, other: Any, combined: Callable[..., Producer], onto: Callable[..., Tensor]) -> Tensor | None:
    if not all(isinstance(t, Tensor) for t in (x, other)) or other is x:
        return None
    if x.device != other.device or not (_is_late(x) or _is_late(other)):
        return None
    if other.shape != x.shape:
        late, known = (x, other) if _is_late(x) else (other, x)
        return None if _is_late(known) else _spread(late, known, onto)
    if not (_is_late(x) and _is_late(other)):
        return _onto(other, x, onto) if _is_late(x) else _onto(x, other, onto)
    first, second = x.pending, other.pending
    if first.producer is second.producer:  # of one result, which is computed once
        return DeferredTensor._of(first.of_both(second.steps, onto))
    if first.floats is not None or second.floats is not None:
        return _of_blocks(first, second, onto)
    pending = Pending(combined(first.composed(), second.composed()))
    pending.runs = JointRuns(first.runs, second.runs)
    return DeferredTensor._of(pending)


def _is_plain(known: Tensor) -> bool:
    plain = type(known) in (Tensor, Parameter) and known.dtype is torch.float32 and known.layout == torch.strided
    return plain and not (known.requires_grad and torch.is_grad_enabled())


def _spread(late: DeferredTensor, known: Tensor, onto: Callable[..., Tensor]) -> Tensor | None:
    """With one number per column or per row, of which a copy is taken: the layer may write over it."""
    if not _is_plain(known) or not is_finite(known):
        return None
    rows, columns = late.shape
    own = known.detach().clone()
    if known.numel() == columns and known.shape[-1:] == (columns,) and known.dim() <= 2:
        return DeferredTensor._of(late.pending.then(lambda y: onto(y, own)))
    if known.shape == (rows, 1):
        pending = Pending(late.pending.composed().combined(Producer.of(own), onto))
        pending.runs = late.pending.runs
        return DeferredTensor._of(pending)
    return None


def _onto(known: Tensor, x: Any, combine: Callable[..., Tensor]) -> Tensor | None:
    """A matrix that is there with one that is not computed yet, by blocks of rows; what follows is noted.

    :obj:`None` where there is one block, and where sites that take the result would have to look for NaN.
    """
    known = materialized(known)
    if not _is_plain(known) or _is_one_block(x) or not is_finite(known):
        return None
    return _of_blocks(x.pending, known, combine)


def _of_blocks(first: Pending, second: Pending | Tensor, combine: Callable[..., Tensor]) -> Tensor:
    """Made once: of two matrices at least one is there, and what follows is noted."""
    pair = (first, second) if isinstance(second, Tensor) or second.floats is not None else (second, first)
    (late, known), into = pair, _INTO[combine]
    out = empty((late.producer.num_rows, late.producer.num_features), torch.float32)
    for rows, value in late.blocks(only_read=True):
        there = known[rows] if isinstance(known, Tensor) else known.read(rows)
        into(*((value, there) if late is first else (there, value)), out=out[rows])
    return DeferredTensor._of(Pending.holding(out, late.runs.asked))


_INTO: dict[Any, Callable[..., Tensor]] = {Tensor.add_: torch.add, Tensor.mul_: torch.mul, Tensor.sub_: torch.sub}


def note_row_sums(x: DeferredTensor, dims: Any, keepdim: bool = False, **options: Any) -> Tensor | None:
    """``x.sum(-1)`` by blocks of rows; :obj:`None` where there is one block."""
    if type(x) is not DeferredTensor or _is_one_block(x) or options or list(dims) not in ([1], [-1]):
        return None
    return gathered(x.size(0), ((rows, value.sum(1, keepdim=keepdim)) for rows, value in x.pending.blocks()))


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
        left_to_scope(made)
        return refusing_reads(made)

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
        pending = Pending(reduce(Producer.plus, terms))
        pending.runs = JointRuns(*(part.runs for part in parts))
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
NOTES[aten.sub.Tensor] = note_difference
NOTES[aten.add_.Tensor] = in_place(note_sum, Tensor.add_)
NOTES[aten.mul_.Tensor] = in_place(note_product, Tensor.mul_)
NOTES[aten.sub_.Tensor] = in_place(note_difference, Tensor.sub_)
VIEWS[aten.sum.dim_IntList] = note_row_sums
NOTES[aten.stack.default] = Stacked.of
