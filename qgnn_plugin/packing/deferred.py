"""Results of packed layers that are not computed yet: the next layer decides whether floats are ever written.

Inside a packed model a layer returns a :class:`DeferredTensor`.  Row-wise operations on it (ReLU, ELU, dropout in eval
mode, BatchNorm in eval mode) are noted; a packed layer that takes it has the kernels write the codes of its own range,
and anything else finds an ordinary float tensor, computed on first touch.  Both ways run the same float operations in
the same order, so what a model returns does not depend on what was deferred.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from ..kernels.backend import backend_for
from ..kernels.cpu.parallel import on_every_thread
from ..kernels.quantize_pack import quantize_pack
from .asked import Asked, key_of
from .weight import refuse_dtype

__all__ = [
    "NOTES",
    "DeferredTensor",
    "Pending",
    "Producer",
    "added",
    "computed",
    "conclude",
    "defer_inside",
    "is_deferring",
    "plain",
    "row_blocks",
]

aten = torch.ops.aten
Step = Callable[[Tensor], Tensor]
Rows = Any  # floats or packed words of a matrix; or words and the multipliers of their rows, a pair
Block = tuple[slice, Rows]  # rows, and what they hold

BLOCK_FLOATS = 1 << 19  # of a block of rows: they stay in the cache from the kernel to the codes
BLOCK_ROWS = 64  # blocks are multiples of it, so that vectorized operations have their tails where whole matrices do


def row_blocks(num_rows: int, num_features: int, device: torch.device) -> Iterator[slice]:
    """Blocks of rows that stay in a cache; on an accelerator, where each would cost a launch, one of all.

    A program that is being traced has one block as well: its number of rows may be any.
    """
    if torch.compiler.is_compiling():
        return iter((slice(0, num_rows),))
    step = max(1, num_rows)
    if device.type == "cpu":
        step = max(1, BLOCK_FLOATS // max(1, num_features) // BLOCK_ROWS) * BLOCK_ROWS
    return (slice(start, min(start + step, num_rows)) for start in range(0, max(1, num_rows), step))


def gathered(num_rows: int, blocks: Iterator[Block]) -> Rows:
    """Blocks of rows as one matrix."""
    rows, first = next(blocks)
    if rows.stop == num_rows:
        return first
    out = _room(first, num_rows)
    _put(out, rows, first)
    for rows, part in blocks:
        _put(out, rows, part)
    return out


def _room(block: Rows, num_rows: int) -> Rows:
    """Room for all of ``num_rows`` rows of which ``block`` has some."""
    if isinstance(block, tuple):
        return tuple(_room(part, num_rows) for part in block)
    return block.new_empty((num_rows, *block.shape[1:]))


def _put(out: Rows, rows: slice, part: Rows) -> None:
    """``out[rows] = part``, on the CPU by NumPy: torch would wake threads that then spin against the kernels' own."""
    if isinstance(out, tuple):
        for one, its_part in zip(out, part, strict=True):
            _put(one, rows, its_part)
    elif out.device.type == "cpu":
        out.numpy()[rows] = part.numpy()
    else:
        out[rows] = part


def conclude(
    y: Tensor,
    *,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    out_unit: Tensor | None = None,
) -> Rows:
    """The end of a computation whose floats are there: ReLU, in place, and packed codes where a range is given."""
    if relu:
        y = y.relu_()
    if out_bits == 0:
        return y
    assert out_scale is not None
    assert out_offset is not None
    return quantize_pack(y, out_scale, out_offset, out_bits, out_unit, is_checked=True)


@dataclass(eq=False, slots=True)
class Producer:
    """How to compute a float32 matrix ``[N, F]``.

    Args:
        num_rows: ``N``.
        num_features: ``F``.
        device: Where it is computed.
        run: ``run(start, stop, relu=False, **out)`` gives the rows ``[start, stop)``, as floats or, with a range
            ``out_scale``, ``out_offset`` and ``out_bits``, as packed codes; with ``out_unit`` as a pair, the codes and
            the multipliers of the rows.
        is_fused: Whether packed codes come out of one kernel, without floats in between.
        adds: Whether ``run`` takes another matrix's rows as ``addend``, which it adds before ReLU.
        only_kernels: Whether ``run`` calls nothing but kernels, so that threads may share blocks among them.
    """

    num_rows: int
    num_features: int
    device: torch.device
    run: Callable[..., Rows]
    is_fused: bool = True
    adds: bool = False
    only_kernels: bool = False

    def __call__(self, **epilogue: Any) -> Rows:
        """The whole matrix; ``epilogue`` as that of ``run``."""
        if self.is_fused or self._is_one_block:
            return self.run(0, self.num_rows, **epilogue)
        if self.only_kernels and not torch.compiler.is_compiling() and backend_for(self.device) == "cpu":
            return self._shared_out(**epilogue)
        return gathered(self.num_rows, self.blocks(**epilogue))

    @property
    def _is_one_block(self) -> bool:
        return self.num_rows * self.num_features <= BLOCK_FLOATS // 2 and self.num_rows > 0

    def blocks(self, **epilogue: Any) -> Iterator[Block]:
        """The matrix by blocks of rows (see :func:`row_blocks`)."""
        for rows in row_blocks(self.num_rows, self.num_features, self.device):
            yield rows, self.run(rows.start, rows.stop, **epilogue)

    def _shared_out(self, **epilogue: Any) -> Rows:
        """The matrix, each block of it by one thread."""
        blocks = row_blocks(self.num_rows, self.num_features, self.device)
        rows = next(blocks)
        first = self.run(rows.start, rows.stop, **epilogue)
        if rows.stop == self.num_rows:
            return first
        out = _room(first, self.num_rows)
        _put(out, rows, first)
        rest = iter(list(blocks))  # unlike a generator, it may be advanced by several threads

        def work() -> None:
            for rows in rest:
                _put(out, rows, self.run(rows.start, rows.stop, **epilogue))

        on_every_thread(work)
        return out

    def then(self, step: Step) -> Producer:
        """With ``step``, which treats every row for itself, applied to the floats."""

        def run(start: int, stop: int, **out: Any) -> Rows:
            return conclude(step(self.run(start, stop)), **out)

        return replace(self, run=run, is_fused=False, adds=False, only_kernels=False)


def computed(value: Tensor) -> Producer:
    """A matrix that is there already."""

    def run(start: int, stop: int, **out: Any) -> Rows:
        return conclude(value[start:stop].clone(), **out)

    num_rows, num_features = value.shape
    return Producer(num_rows, num_features, value.device, run, is_fused=False)


def added(first: Producer, second: Producer) -> Producer:
    """The sum of two matrices, neither of which is written as a whole where the sum is packed."""

    def run(start: int, stop: int, **out: Any) -> Rows:
        y = first.run(start, stop)
        if second.adds:
            return second.run(start, stop, addend=y, **out)
        return conclude(y.add_(second.run(start, stop)), **out)

    only_kernels = (first.is_fused or first.only_kernels) and second.adds
    return Producer(first.num_rows, first.num_features, first.device, run, is_fused=False, only_kernels=only_kernels)


class _Runs:
    """How often a producer has run: all that follows from it shares the count."""

    def __init__(self, on_repeat: Callable[[], None], asked: Asked) -> None:
        self.count, self.on_repeat, self.asked = 0, on_repeat, asked

    def add(self) -> None:
        self.count += 1
        if self.count > 1:
            self.on_repeat()

    def undo(self) -> None:
        self.count -= 1


class Pending:
    """A producer and the row-wise steps after it; its value once something has touched that."""

    def __init__(
        self, producer: Producer, *, on_repeat: Callable[[], None] = lambda: None, asked: Asked | None = None
    ) -> None:
        self.producer, self.runs = producer, _Runs(on_repeat, Asked() if asked is None else asked)
        self.steps: tuple[Step, ...] = ()
        self.value: Tensor | None = None
        self.first: dict[str, Any] | None = None  # the range that it was packed in first, since its last step
        self.codes: dict[Any, Rows] = {}  # in other ranges, packed with it

    runs: Any

    def then(self, step: Step) -> Pending:
        after = Pending.__new__(Pending)
        after.producer, after.runs, after.value = self.producer, self.runs, self.value
        after.steps = (*self.steps, step)
        after.first, after.codes = None, {}
        return after

    def composed(self) -> Producer:
        """The producer with the steps after it."""
        producer = self.producer
        for step in self.steps:
            producer = producer.then(step)
        return producer

    def _fused(self) -> tuple[bool, tuple[Step, ...]]:
        """Whether a ReLU comes first, which producers compute themselves, and the steps that are left."""
        relu = self.steps[:1] == (torch.relu,)
        return relu, self.steps[relu:]

    def materialize(self) -> Tensor:
        if self.value is None:
            self.runs.add()
            relu, steps = self._fused()
            value = self.producer(relu=relu)
            for step in steps:
                value = step(value)
            self.value = value
        return self.value

    def blocks(self) -> Iterator[Block]:
        """The value by blocks of rows, without a whole matrix where there is none yet."""
        producer, (relu, steps) = self.producer, self._fused()
        if self.value is not None:
            for rows in row_blocks(producer.num_rows, producer.num_features, producer.device):
                yield rows, self.value[rows]
            return
        self.runs.add()
        for rows, value in producer.blocks(relu=relu):
            for step in steps:
                value = step(value)
            yield rows, value

    def packed(self, **out: Any) -> Rows:
        """The codes, ``[N, row_words(F, out_bits)]`` int32, in a range of one element or ``[F]``; ``out`` as in
        :class:`Producer`.
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
        if self.value is None and not steps:
            self.runs.add()
            return producer(relu=relu, **out)
        return gathered(producer.num_rows, ((rows, conclude(value, **out)) for rows, value in self.blocks()))

    def _packed_with(self, others: list[dict[str, Any]], first: dict[str, Any]) -> Rows:
        """The codes in the range ``first``; those in ``others``, of the same floats, are kept until they are wanted."""
        producer, (relu, steps) = self.producer, self._fused()

        def run(start: int, stop: int, **epilogue: Any) -> Rows:
            value = producer.run(start, stop, **epilogue)
            for step in steps:
                value = step(value)
            return tuple(conclude(value, **out) for out in (first, *others))

        self.runs.add()
        only_kernels = not steps and (producer.is_fused or producer.only_kernels)
        codes = replace(producer, run=run, is_fused=False, adds=False, only_kernels=only_kernels)(relu=relu)
        self.codes = {key_of(out): rows for out, rows in zip(others, codes[1:], strict=True)}
        return codes[0]


class DeferredTensor(Tensor):
    """A float32 matrix ``[N, F]`` that its producer has not computed yet.

    Shape, dtype and device are known; every operation that is neither noted (see :data:`ROW_WISE`) nor an alias
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
    def _of(cls, pending: Pending) -> DeferredTensor:
        producer = pending.producer
        shape = (producer.num_rows, producer.num_features)
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=producer.device)
        tensor.pending = pending
        scope = _scope.get()
        if scope is not None:
            scope.made.append(weakref.ref(tensor))
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        note = NOTES.get(func)
        if note is not None and (noted := note(*args, **kwargs)) is not None:
            return noted
        if args and isinstance(args[0], cls) and args[0].pending.value is None:
            noted = _note(args[0], func, args[1:], kwargs)
            if noted is not None:
                return noted
        out = func(*plain(args), **plain(kwargs))
        # What was changed in place is the same tensor still.
        touched = [a for a in (*args, *kwargs.values()) if isinstance(a, cls)]
        return next((t for t in touched if out is t.pending.value), out)

    def plain(self) -> Tensor:
        """The value, an ordinary tensor; computed on the first call."""
        if not torch.is_grad_enabled():
            return self.pending.materialize()
        with torch.no_grad():
            return self.pending.materialize()

    # What reads memory without passing the dispatcher:

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.plain().tolist()

    def data_ptr(self) -> int:
        return self.plain().data_ptr()

    def untyped_storage(self) -> Any:
        return self.plain().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return self.plain().__repr__(**kwargs)


def plain(value: Any) -> Any:
    """Replace deferred tensors in nested tuples, lists and dictionaries by their values."""
    if isinstance(value, Tensor):
        return value.plain() if isinstance(value, DeferredTensor) else value
    return tree_map_only(DeferredTensor, DeferredTensor.plain, value)


# What other modules note: the operation, and what gives its result or None.
NOTES: dict[Any, Callable[..., Tensor | None]] = {}

# Operations that treat every row alike and for itself, by their in-place form where there is one.
ROW_WISE = {
    aten.relu.default: aten.relu_.default,
    aten.elu.default: aten.elu_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.gelu.default: aten.gelu_.default,
    aten.silu.default: aten.silu_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.tanh.default: aten.tanh_.default,
}
# The same by a number.
BY_NUMBER = {aten.mul.Tensor: aten.mul_.Tensor, aten.div.Tensor: aten.div_.Tensor}
_IN_PLACE = {in_place: func for func, in_place in ROW_WISE.items()}
_ALIASES = (aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default)


def _note(x: DeferredTensor, func: Any, args: Any, kwargs: Any) -> Any:
    """The result of ``func(x, ...)`` without computing ``x``; :obj:`None` where that takes its value."""
    pending = x.pending
    if func in ROW_WISE:
        return DeferredTensor._of(pending.then(_step(func, args, kwargs)))
    if func in BY_NUMBER and len(args) == 1 and type(args[0]) in (int, float) and not kwargs:
        in_place, number = BY_NUMBER[func], args[0]
        return DeferredTensor._of(pending.then(lambda y: in_place(y, number)))
    if func in _IN_PLACE:
        pending.steps = (*pending.steps, _step(_IN_PLACE[func], args, kwargs))
        pending.first, pending.codes = None, {}
        return x
    if func in _ALIASES and (not args or _is_shape_of(x, args[0])):
        return DeferredTensor._of(pending)
    if func is aten.native_batch_norm.default:
        return _note_batch_norm(pending, *args, **kwargs)
    return None


def _is_shape_of(x: Tensor, size: Any) -> bool:
    return len(size) == x.dim() and all(new in (-1, old) for new, old in zip(size, x.shape, strict=True))


def _step(func: Any, args: Any, kwargs: Any) -> Step:
    if func is aten.relu.default:
        return torch.relu
    return lambda y: func(y, *args, **kwargs)


def _note_batch_norm(pending: Pending, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Any:
    if training or mean is None:
        return None
    options = (weight, bias, mean, var, training, *rest)
    empty = mean.new_empty(0)
    return DeferredTensor._of(pending.then(lambda y: aten.native_batch_norm.default(y, *options)[0])), empty, empty


# Where layers may defer ###############################################################################################

_scope: ContextVar[_Scope | None] = ContextVar("qgnn_deferring", default=None)


class _Scope:
    """One call of a packed model: the deferred tensors that were made in it."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[DeferredTensor]] = []

    def compute_what_is_left(self) -> None:
        """Compute what something still refers to after the call, such as an attribute of the model.

        What it follows from may be written over from now on.
        """
        for made in self.made:
            tensor = made()
            if tensor is not None:
                tensor.plain()


def is_deferring() -> bool:
    """Whether a packed model is running, whose output :func:`defer_inside` makes plain; never while compiling."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and _scope.get() is not None


def defer_inside(model: nn.Module) -> None:
    """Let the layers of ``model`` defer their results while it runs; what it returns are plain tensors.

    Its class is swapped for one that sees to that: hooks would not run where a call is interrupted.
    """
    if "inner_class" not in vars(type(model)):
        model.__class__ = _deferring_class(type(model))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _deferring_class(inner: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``inner`` whose calls open a scope, made once, under its name.

    It has no other base, since some classes find themselves among those of their instances (``fx.GraphModule``), and
    holds what PyG would otherwise generate onto it, past a layer that is the model itself.
    """
    if inner not in _CLASSES:
        names = ("__module__", "__qualname__", "__doc__")
        namespace: dict[str, Any] = {name: getattr(inner, name) for name in names}
        namespace |= {name: getattr(inner, name) for name in _GENERATED if hasattr(inner, name)}

        def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
            refuse_dtype(type(self).__name__, fn)  # before any tensor is changed
            return inner._apply(self, fn, recurse)

        def reduce_ex(self: Any, protocol: Any) -> Any:
            reduced: Any = inner.__reduce_ex__(self, protocol)
            make, args, *rest = reduced
            args = tuple(inner if arg is type(self) else arg for arg in args)
            return _rebuild, (make, args), *rest

        namespace |= {"inner_class": inner, "forward": _scoped(inner), "_apply": apply, "__reduce_ex__": reduce_ex}
        if hasattr(inner, "__deepcopy__"):
            namespace["__deepcopy__"] = _deferring_copy(inner)
        if issubclass(inner, GraphModule):
            namespace["recompile"] = _recompiling(inner)
        _CLASSES[inner] = type(inner.__name__, (inner,), namespace)
    return _CLASSES[inner]


_GENERATED = tuple(f"{prefix}{name}" for name in ("propagate", "edge_updater") for prefix in ("", "_orig_", "_jinja_"))


def _scoped(inner: Any) -> Callable[..., Any]:
    """The ``forward`` of a class in a scope of its own; hooks of the model run outside."""

    @functools.wraps(inner.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return inner.forward(self, *args, **kwargs)
        outer, scope = _scope.get(), _Scope()
        try:
            _scope.set(scope)
            out = plain(inner.forward(self, *args, **kwargs))
            scope.compute_what_is_left()
            return out
        finally:
            _scope.set(outer)

    return forward


def _deferring_copy(inner: Any) -> Callable[..., Any]:
    """The ``__deepcopy__`` of a class that has its own, which makes a model of a class that it knows."""

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        copied = inner.__deepcopy__(self, memo)
        if isinstance(copied, nn.Module):
            defer_inside(copied)
        return copied

    return deepcopy


def _recompiling(inner: Any) -> Callable[..., Any]:
    """The ``recompile`` of a traced model, which writes ``forward`` and ``__call__`` onto the class of its instance:
    onto ``inner``, so that the scope stays around them.  Pickling recompiles too.
    """

    def recompile(self: Any) -> Any:
        own = type(self)
        self.__class__ = inner
        try:
            return inner.recompile(self)
        finally:
            self.__class__ = own

    return recompile


def _rebuild(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    model = make(*args)
    defer_inside(model)
    return model


# Pickles of the time when hooks opened the scope name these two: the first call puts the class in their place.


def _enter(model: nn.Module, args: Any) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
            del hooks[key]
    defer_inside(model)


def _leave(model: nn.Module, args: Any, output: Any) -> None:
    """Nothing: :func:`_enter` has taken it off."""
