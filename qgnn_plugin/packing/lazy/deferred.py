"""Results of packed layers that are not computed yet: the next layer decides whether floats are ever written.

Inside a packed model a layer returns a :class:`DeferredTensor`.  Row-wise operations on it (activations, dropout and
BatchNorm in eval mode, LayerNorm) are noted; a packed layer that takes it has the kernels write the codes of its own
range, and anything else finds an ordinary float tensor, computed on first touch.  Both ways run the same float
operations in the same order, so what a model returns does not depend on what was deferred.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .asked import Asked, key_of
from .calls import left_to_scope
from .producers import Block, Producer, Rows, gathered, row_blocks
from .runs import Runs
from .stand_in import StandIn, refusing_reads
from .steps import IN_PLACE, Step, as_now, batch_norm, finished, step_of, with_epilogue

__all__ = ["NOTES", "DeferredTensor", "Pending", "materialized"]

aten = torch.ops.aten


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


class Pending:
    """A producer and the row-wise steps after it; its value once something has touched that."""

    def __init__(
        self, producer: Producer, *, on_repeat: Callable[[], None] = lambda: None, asked: Asked | None = None
    ) -> None:
        self.producer, self.runs = producer, Runs(on_repeat, Asked() if asked is None else asked)
        self.steps: tuple[Step, ...] = ()
        self.value = None
        self.first: dict[str, Any] | None = None  # the range that it was packed in first, since its last step
        self.codes: dict[Any, Rows] = {}  # in other ranges, packed with it

    runs: Any
    producer: Any
    value: Any
    floats: Floats | None = None  # what the producer reads, where these are there for it alone
    # What views of some of its columns share: the runs of all, and the rows that were computed last, by the steps then.
    runs_of_columns: Any = None
    rows_of_columns: tuple[tuple[Step, ...], dict[str, Any]] | None = None

    @classmethod
    def holding(cls, value: Tensor, asked: Asked | None = None) -> Pending:
        """Of floats that nobody else holds: what follows is noted, and written over them in the end."""
        pending = cls(Producer.of(value), asked=asked)
        pending._reads(Floats(value))
        return pending

    def _reads(self, floats: Floats | None) -> None:
        self.floats = floats
        if floats is not None:
            floats.readers.add(self)

    def then(self, step: Step) -> Pending:
        after = Pending.__new__(Pending)
        after.producer, after.runs, after.value = self.producer, self.runs, self.value
        after.steps = (*self.steps, step)
        after.first, after.codes = None, {}
        after._reads(self.floats)
        return after

    def become(self, after: Pending) -> None:
        """Take the place of what follows from this one, which was changed in place."""
        self.producer, self.runs, self.steps = after.producer, after.runs, after.steps
        self.first, self.codes, self.runs_of_columns, self.rows_of_columns = None, {}, None, None
        self._reads(after.floats)

    def of_both(self, steps: tuple[Step, ...], combine: Callable[..., Tensor]) -> Pending:
        """What ``combine`` gives of this value and of that after ``steps`` in place of its own."""
        own, after = self.steps, Pending.__new__(Pending)
        after.producer, after.runs, after.value = self.producer, self.runs, None
        after.steps = (lambda y: combine(finished(y.clone(), own), finished(y, steps)),)
        after.first, after.codes = None, {}
        after._reads(self.floats)
        return after

    is_whole = True  # and no view of another result, which a change in place would have to reach

    @property
    def row_stride(self) -> int:
        """Numbers from one row to the next, as views of the value have it."""
        return self.producer.num_features

    def composed(self) -> Producer:
        """The producer with the steps after it, to be kept."""
        if self.floats is not None:
            self.floats.is_kept = True
        return self._composed()

    def _composed(self) -> Producer:
        return self.producer.then(*self.steps) if self.steps else self.producer

    def _fused(self) -> tuple[bool, tuple[Step, ...]]:
        """Whether a ReLU comes first, which producers compute themselves, and the steps that are left."""
        relu = self.steps[:1] == (torch.relu,)
        return relu, self.steps[relu:]

    def materialize(self) -> Tensor:
        if self.value is None:
            self.runs.add()
            relu, steps = self._fused()
            value = None if self.floats is None else self.floats.left_to(self)
            if value is None:
                value = self.producer(relu=relu)
            elif relu:
                steps = self.steps
            for rows in row_blocks(value.size(0), value.size(1), value.device) if steps else ():
                block = value[rows]
                if (done := finished(block, steps)) is not block:
                    block.copy_(done)
            # What it was made of is not needed any more.
            self.value, self.producer, self.steps, self.floats = value, Producer.of(value), (), None
        return self.value

    def read(self, rows: slice) -> Tensor:
        """Some rows of floats that are there already, which are not to be written to where no step follows them."""
        assert self.floats is not None
        if not self.steps:
            return self.floats.value[rows]
        relu, steps = self._fused()
        return finished(self.producer.run(rows.start, rows.stop, relu=relu), steps)

    def blocks(self, only_read: bool = False) -> Iterator[Block]:
        """The value by blocks of rows, without a whole matrix where there is none yet.

        They are not written to with ``only_read``.
        """
        producer, (relu, steps) = self.producer, self._fused()
        if self.value is not None:
            for rows in row_blocks(producer.num_rows, producer.num_features, producer.device):
                yield rows, self.value[rows]
            return
        self.runs.add()
        if only_read and self.floats is not None:
            yield from ((rows, self.read(rows)) for rows in producer.row_blocks())
            return
        for rows in producer.row_blocks():
            yield rows, finished(producer.run(rows.start, rows.stop, relu=relu), steps)

    def packed(self, **out: Any) -> Rows:
        """The codes, ``[N, row_words(F, out_bits)]`` int32, in a range of one element or ``[F]``; ``out`` as in
        :class:`Producer`, and ``columns`` where only these are wanted.
        """
        if self.value is None:
            if (codes := self.codes.pop(key_of(out), None)) is not None:
                self.runs.asked.was_used(self.first, out)
                return codes
            if self.first is not None:
                if self.runs.asked.note(self.first, out):
                    self.runs.undo()
            else:
                self.first = out
                device = out["out_scale"].device
                others = [o for o in self.runs.asked.after(out) if o["out_scale"].device == device]
                if others:
                    return self._packed_with(others, out)
        producer, (relu, steps) = self.producer, self._fused()
        if self.value is None and "columns" not in out:
            self.runs.add()
            return self._composed()(**out) if steps else producer(relu=relu, **out)
        blocks = ((rows, _codes(value, **out)) for rows, value in self.blocks(only_read=True))
        return gathered(producer.num_rows, blocks)

    def _packed_with(self, others: list[dict[str, Any]], first: dict[str, Any]) -> Rows:
        """The codes in the range ``first``; those in ``others``, of the same floats, are kept until they are wanted."""
        producer, (relu, steps) = self.producer, self._fused()

        def run(start: int, stop: int, **epilogue: Any) -> Rows:
            value = finished(producer.run(start, stop, **epilogue), steps)
            return tuple(_codes(value, **out) for out in (first, *others))

        self.runs.add()
        whole_rows = not any("columns" in out for out in (first, *others))
        only_kernels = not steps and whole_rows and (producer.is_fused or producer.only_kernels)
        codes = replace(producer, run=run, is_fused=False, adds=False, only_kernels=only_kernels)(relu=relu)
        self.codes = {key_of(out): rows for out, rows in zip(others, codes[1:], strict=True)}
        return codes[0]


def _codes(value: Tensor, columns: tuple[int, int] | None = None, **out: Any) -> Rows:
    """Codes of rows of floats, or of some columns of them."""
    return with_epilogue(value if columns is None else value[:, columns[0] : columns[1]].contiguous(), **out)


class DeferredTensor(StandIn, Tensor):  # type: ignore[misc]
    """A float32 matrix ``[N, F]`` that its producer has not computed yet.

    Shape, dtype and device are known; every operation that is neither noted (see :mod:`.steps`) nor an alias
    computes the value, once, and acts on that.  ``on_repeat`` is called where the producer has to run a second time;
    not where that is for codes in another range, which later calls that share ``asked`` compute together.
    """

    pending: Pending
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, producer: Producer, on_repeat: Callable[[], None] = lambda: None, asked: Asked | None = None
    ) -> DeferredTensor:
        return cls._of(Pending(producer, on_repeat=on_repeat, asked=asked))

    @classmethod
    def _of(cls, pending: Pending, dims: tuple[int, ...] = ()) -> DeferredTensor:
        producer = pending.producer
        dims = dims or (producer.num_features,)
        strides = (pending.row_stride, *(math.prod(dims[k + 1 :]) for k in range(len(dims))))
        shape, kind = (producer.num_rows, *dims), {"dtype": torch.float32, "device": producer.device}
        tensor = Tensor._make_wrapper_subclass(cls, shape, strides, **kind)
        tensor.pending = pending
        left_to_scope(tensor)
        return refusing_reads(tensor)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        note = NOTES.get(func)
        if note is not None and (noted := note(*args, **kwargs)) is not None:
            return noted
        if args and isinstance(args[0], cls) and args[0].pending.value is None:
            noted = args[0]._noted(func, args[1:], kwargs)
            if noted is not None:
                return noted
        out = func(*materialized(args), **materialized(kwargs))
        # What was changed in place is the same tensor still.
        touched = [a for a in (*args, *kwargs.values()) if isinstance(a, cls)]
        return next((t for t in touched if out is t.pending.value), out)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        value = materialized(value)
        if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
            raise ValueError(
                f"Expected data of shape {list(self.shape)}, {self.dtype}, on {self.device}, as the result of a packed "
                f"layer has (got {list(value.shape)}, {value.dtype}, on {value.device}); use the new tensor instead"
            )
        value = value.flatten(1)
        self.pending = Pending(Producer.of(value))  # views keep what they had
        self.pending.value = value

    def _noted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of ``func(self, ...)`` without computing this one; :obj:`None` where that takes its value."""
        return _note(self, func, args, kwargs)

    def materialized(self) -> Tensor:
        if not torch.is_grad_enabled():
            return self.pending.materialize()
        with torch.no_grad():
            return self.pending.materialize()


def materialized(value: Any) -> Any:
    """Replace deferred tensors in nested tuples, lists and dictionaries by their values."""
    if isinstance(value, Tensor):
        return value.materialized() if isinstance(value, DeferredTensor) else value
    return tree_map_only(DeferredTensor, lambda tensor: tensor.materialized(), value)


# What other modules note: the operation, and what gives its result or None.
NOTES: dict[Any, Callable[..., Tensor | None]] = {}

# The same of operations on one that is not computed yet which give views of it.
VIEWS: dict[Any, Callable[..., Any]] = {}

_ALIASES = (aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default)


def _note(x: DeferredTensor, func: Any, args: Any, kwargs: Any) -> Any:
    pending = x.pending
    if (step := step_of(func, args, kwargs)) is not None:
        return DeferredTensor._of(pending.then(step))
    if pending.is_whole and func in IN_PLACE and (step := step_of(IN_PLACE[func], args, kwargs)) is not None:
        pending.become(pending.then(step))
        return x
    if func in _ALIASES and (not args or _is_shape_of(x, args[0])):
        return DeferredTensor._of(pending)
    if func in VIEWS:
        return VIEWS[func](x, *args, **kwargs)
    if func is aten.native_batch_norm.default:
        return _note_batch_norm(pending, *args, **kwargs)
    if func is aten.native_layer_norm.default:
        return _note_layer_norm(pending, *args, **kwargs)
    return None


def _is_shape_of(x: Tensor, size: Any) -> bool:
    return len(size) == x.dim() and all(new in (-1, old) for new, old in zip(size, x.shape, strict=True))


def _note_batch_norm(pending: Pending, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Any:
    if training or mean is None:
        return None
    empty = mean.new_empty(0)
    return DeferredTensor._of(pending.then(batch_norm(weight, bias, mean, var, training, *rest))), empty, empty


def _note_layer_norm(pending: Pending, shape: Any, *rest: Any) -> Any:
    """The norm of whole rows."""
    if list(shape) != [pending.producer.num_features]:
        return None
    norm, empty, rest = aten.native_layer_norm.default, torch.empty(0), as_now(*rest)
    return DeferredTensor._of(pending.then(lambda y: norm(y, shape, *rest)[0])), empty, empty
