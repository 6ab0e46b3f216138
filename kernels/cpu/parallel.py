"""Rows shared out to threads: chunks of equal cost, taken in order by whoever is free.

A row is computed by one thread, always in the same order, so results do not depend on the number of
threads.  Kernels release the GIL and run on threads of our own: numba's threading layers may not be
entered from two Python threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from threading import Lock
from typing import Any

import numpy as np
import torch

from . import jit

__all__ = ["even_chunks", "num_threads", "on_every_thread", "row_chunks", "run_chunks"]

CHUNKS_PER_THREAD = 16
ROW_COST = 8  # cost of a row without edges, in edges
SERIAL_COST = 1 << 14  # below this many edges one thread is faster

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = Lock()
_alone: ContextVar[bool] = ContextVar("qgnn_alone", default=False)


def num_threads() -> int:
    """Threads of a kernel called from here."""
    return 1 if _alone.get() else torch.get_num_threads()


@jit.kernel
def _split(rowptr: Any, row_cost: int, bounds: Any) -> None:
    """Cut rows into chunks of equal cost ``edges + row_cost * rows``, by bisection."""
    rows, chunks = rowptr.size - 1, bounds.size - 1
    total = rowptr[rows] - rowptr[0] + row_cost * rows
    bounds[0] = 0
    for k in range(1, chunks + 1):
        goal = total * k // chunks
        low, high = bounds[k - 1], rows
        while low < high:
            middle = (low + high) // 2
            if rowptr[middle] - rowptr[0] + row_cost * middle < goal:
                low = middle + 1
            else:
                high = middle
        bounds[k] = low


def row_chunks(rowptr: np.ndarray) -> np.ndarray:
    """Boundaries of chunks of destination rows, ``[chunks + 1]`` int64, for the current threads."""
    rows = rowptr.size - 1
    threads = num_threads()
    if threads == 1 or int(rowptr[-1] - rowptr[0]) + ROW_COST * rows < SERIAL_COST:
        return np.array([0, rows])
    bounds = np.empty(min(rows, CHUNKS_PER_THREAD * threads) + 1, np.int64)
    _split(rowptr, ROW_COST, bounds)
    return bounds


def even_chunks(rows: int, row_cost: int) -> np.ndarray:
    """Boundaries of chunks of ``rows`` rows that cost the same, in edges, each."""
    threads = num_threads()
    if threads == 1 or rows * row_cost < SERIAL_COST:
        return np.array([0, rows])
    return np.linspace(0, rows, min(rows, CHUNKS_PER_THREAD * threads) + 1).astype(np.int64)


def run_chunks(kernel: Callable[..., None], bounds: np.ndarray, *args: Any) -> None:
    """Call ``kernel(*args, bounds, counter)`` on every thread; all take chunks off ``counter``."""
    counter = np.zeros(1, np.int64)
    chunks = bounds.size - 1
    helpers = min(num_threads(), chunks) - 1 if chunks > 1 else 0
    if helpers <= 0:
        kernel(*args, bounds, counter)
        return
    _with_helpers(helpers, kernel, *args, bounds, counter)


def on_every_thread(work: Callable[[], None]) -> None:
    """Run ``work`` on every thread at once, each of which then runs its kernels by itself.

    ``work`` may call nothing but kernels: torch's own operations would each start a team of threads.  The caller's
    context variables hold in all of them, gradients are off.
    """
    if num_threads() == 1:
        work()
        return

    @torch.no_grad()
    def alone() -> None:
        _alone.set(True)
        work()

    contexts = [copy_context() for _ in range(num_threads())]  # a context is entered by one thread at a time
    _with_helpers(len(contexts) - 1, lambda: contexts.pop().run(alone))


def _with_helpers(helpers: int, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(*args)`` here and on as many other threads; the first error is raised when all are done."""
    pool = _executor(helpers)
    pending = [pool.submit(function, *args) for _ in range(helpers)]
    try:
        function(*args)
    finally:
        for future in pending:
            future.result()


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            # A pool that is replaced finishes what it was given: its threads end when idle.
            _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="qgnn"), size
        return _pool


def _forget_pool() -> None:
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, Lock()


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_forget_pool)
