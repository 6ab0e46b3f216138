"""What layers derive from a graph: cached, and a constant of what is compiled inside :func:`fixed_graph`.

Constants are guarded: compiled and exported code compares the graph it is called with to the one they were made from.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..kernels.cache import Fingerprint, have_memory, parts_of
from ..kernels.guard import checksums, require_same
from ..kernels.plan import plan_cache
from ..kernels.streams import Built

__all__ = ["cached", "fixed_graph", "has_fixed_graph", "is_exporting"]

Build = Callable[[], Any]

WAY_OUT = (
    "call the model once on its graph inside 'with qgnn_plugin.fixed_graph():', then compile or export it there; the "
    "graph becomes a constant, and other graphs are refused"
)
ANOTHER_GRAPH = (
    "Expected the graph, and edge weights, that were there when this function was compiled or exported, whose plan is "
    "a constant in it (got others); call the model on the new graph and compile it again inside a new "
    "'with qgnn_plugin.fixed_graph():'"
)


class _Record:
    """A value, and what shows that it is asked for of the same graph."""

    def __init__(self, value: Any, parts: tuple[Tensor, ...]) -> None:
        self.value = value
        self._built, self._fingerprint = Built(value), Fingerprint(parts)
        self._versions = tuple(map(_version, parts))
        self.checksums = checksums(parts)

    def is_of(self, parts: tuple[Tensor, ...]) -> bool:
        """Whether ``parts`` are the same memory, trusted not to have changed unseen, or hold the same."""
        placed = tuple(part.data_ptr() for part in parts) == self._fingerprint.addresses
        if placed and None not in self._versions and tuple(map(_version, parts)) == self._versions:
            self._built.wait()
            return True
        return checksums(parts) == self.checksums


def _version(part: Tensor) -> int | None:
    return None if part.is_inference() else part._version  # one made in inference mode counts none


class _Fixed:
    """The records of one context."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.records: dict[tuple[Any, ...], _Record] = {}

    def get(self, tensors: tuple[Tensor | None, ...], key: tuple[Any, ...], build: Build) -> Any:
        parts = parts_of(tensors)
        if not have_memory(parts):
            return build()
        record = self.records.get(key)
        if record is None:
            value = plan_cache.get(tensors, key, build)
            record = self.records[key] = _Record(value, parts)
        elif not record.is_of(parts):
            raise ValueError("Expected one graph inside 'fixed_graph' (got another of the same size); use two contexts")
        return record.value


class _Current(threading.local):
    """The number of the context that this thread entered last, or that there was when it began.

    Compilers take it for a condition of their code, which is made anew in another context.
    """

    latest = 0

    def __init__(self) -> None:
        self.number = _Current.latest


class _Constants:
    """The records that compiled code refers to, as attributes: compilers do not take the results of calls for objects.

    No more than ``LIMIT`` are held, since nothing tells when code is dropped; code that outlives its own is refused.
    """

    LIMIT = 64

    def name_of(self, record: _Record, number: int) -> str:
        held = vars(self)
        for name, value in held.items():
            if value is record:
                return name
        while len(held) >= self.LIMIT:
            del held[next(iter(held))]
        name = f"constant_{number}_{next(_numbers)}"
        setattr(self, name, record)
        return name


_fixed: ContextVar[_Fixed | None] = ContextVar("qgnn_fixed_graph", default=None)
_current = _Current()
_numbers = itertools.count(1)
_constants = _Constants()


@contextmanager
def fixed_graph() -> Iterator[None]:
    """Let ``torch.compile(fullgraph=True)`` and ``torch.export`` trace models on one graph.

    A compiled function cannot look a graph up by its memory.  Inside the context the calls of layers remember their
    graph, and what is compiled there uses it as a constant: run the model once (for training with its backward pass),
    compile it, and call it with that graph only, inside or outside the context; another graph, or other edge weights,
    are refused.  Edge weights that require a gradient are no part of the constant.
    (:func:`qgnn_plugin.compressed_activations` still breaks the graph.)  ::

        with qgnn.fixed_graph():
            packed(x, edge_index)
            compiled = torch.compile(packed, fullgraph=True)
            compiled(x, edge_index)

    Inside, calls that are not compiled trust that nothing writes the graph's memory but operations of torch: they do
    not read it again, as they do outside.  The context is that of the thread, or of the asynchronous task, that enters
    it.

    Raises:
        ValueError: If layers see two graphs of the same size inside, or compiled code another than its own.
    """
    outer = _fixed.get()
    fixed = _Fixed(next(_numbers))
    token = _fixed.set(fixed)
    _current.number = _Current.latest = fixed.number
    try:
        yield
    finally:
        _fixed.reset(token)
        if outer is not None:
            _current.number = outer.number


def has_fixed_graph() -> bool:
    """Whether a context of :func:`fixed_graph` is open here."""
    return _fixed.get() is not None


def cached(tensors: tuple[Any, ...], key: tuple[Any, ...], build: Build, *, is_sized: bool = True) -> Any:
    """What ``build()`` derives from ``tensors``, the dense or sparse tensors of a graph, some of them :obj:`None`.

    Found again under ``key`` while the tensors hold the same; anew each time where they are being learned.  It
    ``is_sized`` where its shapes follow from those of the tensors, whatever edges they hold.
    """
    if torch.compiler.is_compiling():
        return _constant(tensors, key, build, is_sized)
    if torch.jit.is_tracing():
        raise RuntimeError(
            "Expected no torch.jit.trace of a quantized layer, which would keep the graph of the trace unchecked; use "
            "torch.export.export, or qgnn_plugin.export_program, which take the edge_index as an input"
        )
    if any(t is not None and (not isinstance(t, Tensor) or t.requires_grad) for t in tensors):
        return build()
    fixed = _fixed.get()
    if fixed is None:
        return plan_cache.get(tensors, key, build)
    return fixed.get(tensors, _complete(tensors, key), build)


def _complete(tensors: tuple[Any, ...], key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key, and the form of the tensors, as far as compilers know it."""
    forms = tuple(None if t is None else (tuple(t.shape), t.dtype, t.layout) for t in tensors)
    return (*key, forms)


def _constant(tensors: tuple[Any, ...], key: tuple[Any, ...], build: Build, is_sized: bool) -> Any:
    """The value as a constant of the code that is being compiled, guarded.

    Where there is none it is built in the program; looked up in Python, behind a graph break, of a matrix, and for a
    backward pass where its size is not known: compilers do not hand such a size on to a function's own backward.
    """
    number = _current.number
    name = _constant_name(_static(_complete(tensors, key), _known_sizes(number)), number)
    if name is None:
        if _is_edge_list(tensors) and (is_sized or is_exporting() or not torch.is_grad_enabled()):
            return build()  # with the op that makes plans of the program's own edges
        if is_exporting():
            raise ValueError(
                f"Expected a graph that a program can take as its input, an edge_index [2, E] (got a sparse matrix); "
                f"export with an edge_index, or for one graph alone {WAY_OUT}"
            )
        return _looked_up(tensors, key, build)
    record = getattr(_constants, name)
    require_same(parts_of(tensors), record.checksums, ANOTHER_GRAPH)
    return record.value


def _is_edge_list(tensors: tuple[Any, ...]) -> bool:
    return all(t is None or (isinstance(t, Tensor) and t.layout is torch.strided) for t in tensors)


def is_exporting() -> bool:
    """Whether a program is being made that outlives this process, by :func:`torch.export.export`."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def _constant_name(key: tuple[Any, ...], number: int) -> str | None:
    """The constant made of the record of the context around the compiler, whose code holds for that ``number``."""
    fixed = _fixed.get()
    record = None if fixed is None else fixed.records.get(key)
    return None if record is None else _constants.name_of(record, number)


@torch.compiler.assume_constant_result
def _known_sizes(number: int) -> tuple[int, ...]:
    """The numbers in the keys of all records."""
    del number
    fixed = _fixed.get()
    return (
        ()
        if fixed is None
        else tuple({size for key in fixed.records for size in tree_leaves(key) if type(size) is int})
    )


def _static(key: Any, known: tuple[int, ...]) -> Any:
    """``key`` with constants in the place of sizes that a compiler has taken for variables."""
    if isinstance(key, tuple):
        return tuple([_static(item, known) for item in key])
    if isinstance(key, bool) or not isinstance(key, (int, torch.SymInt)):
        return key
    for size in known:
        if key == size:
            return size
    return -1


@torch.compiler.disable(reason=f"Expected a graph that is known to the compiler (got one that is not): {WAY_OUT}")
def _looked_up(tensors: tuple[Any, ...], key: tuple[Any, ...], build: Build) -> Any:
    return cached(tensors, key, build)
