"""Values derived from tensors, kept for as long as the tensors hold what they held.

Plans of graphs, patterns of sparse features and weights prepared for a kernel are all found by the memory they were
made from.  That memory is the caller's, who may write it in ways that nothing counts (NumPy, ``.data``, DLPack, another
process), move it (``share_memory_``, a queue) or hand its address on to another tensor (``set_``, ``resize_``).
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from .checksum import checksum
from .streams import Built, lasting

__all__ = ["Fingerprint", "PlanCache", "have_memory", "is_pinning", "parts_of", "pinned_plans"]

LATEST = 4  # tensors for each entry, before all are forgotten

_pins: ContextVar[list[Any] | None] = ContextVar("qgnn_pins", default=None)


@contextmanager
def pinned_plans() -> Iterator[list[Any]]:
    """Collect what caches hand out inside, so that it outlives their bounds.

    Caches forget what has not been used for long; a captured CUDA graph goes on reading it.  Keep the list that this
    context gives for as long as the capture may be replayed::

        with pinned_plans() as pins, torch.cuda.graph(graph):
            out = packed(x, edge_index)
    """
    outer = _pins.get()
    pins: list[Any] = []
    token = _pins.set(pins)
    try:
        yield pins
    finally:
        _pins.reset(token)
        if outer is not None:
            outer.extend(pins)


def is_pinning() -> bool:
    """Whether a context of :func:`pinned_plans` is open here."""
    return _pins.get() is not None


def _outside_transforms() -> AbstractContextManager[Any]:
    """What is kept of tensors with memory of their own, made inside of torch.func, is of no transform of it."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return torch._C._DisableFuncTorch()


class Fingerprint:
    """What shows whether tensors still are where they were, and hold what they held.

    Memory of the CPU is compared by a checksum: version counters see torch's own operations alone.  On accelerators,
    where a checksum would wait for the device, the version counter decides, and for inference tensors, which have
    none, a copy; what is written there through ``.data`` is not seen.
    """

    __slots__ = ("addresses", "contents", "memory")

    def __init__(self, parts: tuple[Tensor, ...]) -> None:
        self.memory = tuple(part.detach() for part in parts)  # the storages, whatever the caller's tensors come to be
        self.addresses = tuple(part.data_ptr() for part in parts)
        self.contents = tuple(_contents_of(part) for part in parts)

    def holds_for(self, parts: tuple[Tensor, ...]) -> bool:
        """Whether ``parts``, of the same form, are that memory, where it was and unchanged."""
        for held, part, address, contents in zip(self.memory, parts, self.addresses, self.contents, strict=True):
            if held.data_ptr() != address or part.data_ptr() != address or not contents.are_those_of(held, part):
                return False
        return True


class _Checked(NamedTuple):
    """Memory of the CPU."""

    checksum: int

    def are_those_of(self, held: Tensor, part: Tensor) -> bool:
        return checksum(part) == self.checksum


class _Counted(NamedTuple):
    """Memory of a device, whose versions are counted: by the caller's tensor, and by the one that is held."""

    version: int

    def are_those_of(self, held: Tensor, part: Tensor) -> bool:
        return part._version == self.version and held._version == self.version


class _Copied(NamedTuple):
    """Memory of a device that counts no versions."""

    copy: Tensor

    def are_those_of(self, held: Tensor, part: Tensor) -> bool:
        return torch.equal(part, self.copy)


def _contents_of(part: Tensor) -> _Checked | _Counted | _Copied:
    if part.is_cpu:
        return _Checked(checksum(part))
    return _Copied(part.clone()) if part.is_inference() else _Counted(part._version)


def parts_of(tensors: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """The strided tensors that hold ``tensors``."""
    found: list[Tensor] = []
    for tensor in tensors:
        if tensor is None:
            continue
        layout = tensor.layout
        if layout is torch.strided:
            found.append(tensor)
        elif layout is torch.sparse_coo:
            found += (tensor._indices(), tensor._values())
        elif layout in (torch.sparse_csr, torch.sparse_bsr):
            found += (tensor.crow_indices(), tensor.col_indices(), tensor.values())
        else:
            found += (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return tuple(found)


def have_memory(parts: tuple[Tensor, ...]) -> bool:
    """Whether all can be known by their address: a meta tensor, or a subclass that wraps another tensor, cannot."""
    return not any(part.data_ptr() == 0 and part.numel() for part in parts)


class _Entry:
    """A value, the tensors that it counts for, and where it is found."""

    __slots__ = ("__weakref__", "built", "dtype", "fingerprint", "key", "shape")

    def __init__(self, key: tuple[Any, ...], fingerprint: Fingerprint, built: Built, parts: tuple[Tensor, ...]) -> None:
        self.key, self.fingerprint, self.built = key, fingerprint, built
        self.shape: Any = parts[0].shape if parts else None
        self.dtype: Any = parts[0].dtype if parts else None


class PlanCache:
    """A bounded least-recently-used cache of values derived from tensors.

    An entry is found by the address and the form of its tensors' memory, keeps that memory alive, and counts only while
    its :class:`Fingerprint` holds; one that does not is replaced.  Safe to use from several threads, each of which may
    build a value that the others build too, and in a child process forked meanwhile.
    """

    def __init__(self, capacity: int = 32) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._latest: dict[tuple[Any, ...], weakref.ref[_Entry]] = {}  # by one tensor itself: a short way to an entry
        self._lock = Lock()
        _caches.add(self)

    def get(self, tensors: tuple[Tensor | None, ...], key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """Return the cached value for ``tensors`` and ``key``, building it on a miss."""
        first = tensors[0]
        others = len(tensors) > 2 or (len(tensors) == 2 and tensors[1] is not None)
        alone = not others and type(first) is Tensor and first.is_cpu and first.layout is torch.strided
        if alone:
            assert first is not None
            found = self._latest.get((id(first), len(tensors), key))
            latest = None if found is None else found()
            same = latest is not None and first.shape == latest.shape and first.dtype is latest.dtype
            if same and latest.fingerprint.holds_for((first,)):  # type: ignore[union-attr]
                return self._used(latest, (first,))  # type: ignore[arg-type]
        parts = parts_of(tensors)
        if not have_memory(parts):
            return build()
        full_key = (key, tuple(map(_form, tensors)), *map(_place, parts))
        entry = self._entries.get(full_key)
        if entry is None or not entry.fingerprint.holds_for(parts):
            with _outside_transforms():
                fingerprint = Fingerprint(parts)  # of what is read next
                built = Built(lasting(build), on_cpu=all(part.is_cpu for part in parts))
            entry = _Entry(full_key, fingerprint, built, parts)
            with self._lock:
                self._entries[full_key] = entry
                while len(self._entries) > self.capacity:
                    self._entries.popitem(last=False)
        if alone:
            if len(self._latest) > LATEST * self.capacity:
                self._latest.clear()
            self._latest[id(first), len(tensors), key] = weakref.ref(entry)
        return self._used(entry, parts)

    def _used(self, entry: _Entry, parts: tuple[Tensor, ...]) -> Any:
        """The value of an entry, from now on the one used last."""
        entry.built.wait()
        with self._lock:
            if entry.key in self._entries:
                self._entries.move_to_end(entry.key)
        if (pins := _pins.get()) is not None:
            pins.append((entry.built.value, parts))
        return entry.built.value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._latest.clear()

    def __len__(self) -> int:
        return len(self._entries)


def _form(tensor: Tensor | None) -> Any:
    if tensor is None or tensor.layout is torch.strided:
        return tensor is None
    return (tensor.layout, tensor.shape, tensor.layout is torch.sparse_coo and tensor.is_coalesced())


def _place(part: Tensor) -> tuple[Any, ...]:
    return (part.data_ptr(), part.shape, part.stride(), part.dtype, part.device)


_caches: WeakSet[PlanCache] = WeakSet()


def _renew_locks() -> None:
    """Another thread's lock stays locked in a child process, which has no such thread to open it."""
    for cache in _caches:
        cache._lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
