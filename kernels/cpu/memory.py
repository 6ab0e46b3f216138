"""Recycled result buffers.

The C library returns large blocks to the system when they are freed, so every large result pays
for fresh zeroed pages: for a memory-bound kernel that costs as much as the kernel.  Buffers of at
least :data:`RECYCLE_BYTES` therefore come back to a small pool once nothing refers to the tensor
that used them (views and autograd included), as in torch's caching allocator for CUDA.

``QGNN_CPU_CACHE_MB`` bounds the idle memory (default: a sixteenth of the machine's; 0 turns recycling off).
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from functools import cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

__all__ = ["array_of", "empty", "release_cpu_memory"]

RECYCLE_BYTES = 1 << 20
ALIGNMENT = 64  # bytes of a cache line
SLACK = 1.25  # a buffer serves requests down to its size over this
LIMIT_ENV = "QGNN_CPU_CACHE_MB"
SHARE = 16  # the idle memory's default share of the machine's is one over this
FALLBACK_LIMIT = 256 << 20  # where the machine does not tell its memory

_idle: deque[np.ndarray] = deque()  # least recently used first
_lock = Lock()


def _renew_lock() -> None:
    global _lock
    _lock = Lock()


if hasattr(os, "register_at_fork"):  # a lock that another thread held would stay locked in the child
    os.register_at_fork(after_in_child=_renew_lock)


@cache
def _default_limit() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // SHARE
    except (AttributeError, OSError, ValueError):
        return FALLBACK_LIMIT


def _limit() -> int:
    """The most idle memory to keep, in bytes."""
    megabytes = os.environ.get(LIMIT_ENV)
    return _default_limit() if megabytes is None else int(megabytes) << 20


def release_cpu_memory() -> None:
    """Give all idle result buffers back to the system."""
    _idle.clear()


def _take(size: int) -> np.ndarray:
    """An aligned buffer of at least ``size`` bytes."""
    with _lock:
        for index in range(len(_idle)):
            if size <= _idle[index].nbytes <= size * SLACK:
                found = _idle[index]
                del _idle[index]
                return found
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def _give(buffer: np.ndarray) -> None:
    # Runs when a tensor dies, possibly inside _take: it must not lock.
    _idle.append(buffer)
    limit = _limit()
    while sum(b.nbytes for b in tuple(_idle)) > limit:
        _idle.popleft()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor, contiguous and 64-byte aligned, in recycled memory if large."""
    size = math.prod(shape) * dtype.itemsize
    if size < RECYCLE_BYTES or _limit() == 0:
        return torch.empty(shape, dtype=dtype)
    buffer = _take(size)
    view = buffer[:size]
    weakref.finalize(view, _give, buffer).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


class _View:
    """What NumPy needs to know of a tensor, which it keeps alive."""

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": _TYPES[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


_TYPES = {
    getattr(torch, name): np.dtype(name).str
    for name in ("float32", "float64", "int8", "int16", "int32", "int64", "uint8")
}


def array_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor, whose storage its owner may still resize.

    After ``tensor.numpy()`` that is an error, also for everybody else who shares the storage: reversible blocks and
    sharded parameters free and restore theirs.
    """
    return np.asarray(_View(tensor))
