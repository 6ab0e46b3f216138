"""Threads of the CPU kernels."""

import threading

import numpy as np
import pytest
from cpu_support import threads

from qgnn_plugin.kernels.backend import current_backend, use_backend
from qgnn_plugin.kernels.cpu.parallel import num_threads, on_every_thread, run_chunks


def test_work_runs_on_every_thread_which_is_alone_there() -> None:
    """In the context of the caller, whose own threads are as before afterwards."""
    meeting = threading.Barrier(3, timeout=30)  # passed only by three at once
    seen: list[tuple[int, str, list[int]]] = []

    def work() -> None:
        meeting.wait()
        inside: list[int] = []
        run_chunks(lambda bounds, counter: inside.append(threading.get_ident()), np.array([0, 5, 10]))
        on_every_thread(lambda: inside.append(threading.get_ident()))
        assert set(inside) == {threading.get_ident()}
        seen.append((num_threads(), current_backend(), inside))

    with threads(3), use_backend("cpu"):
        on_every_thread(work)
        assert num_threads() == 3
    assert [(count, backend) for count, backend, _ in seen] == [(1, "cpu")] * 3
    assert len({inside[0] for _, _, inside in seen}) == 3


def test_an_error_on_any_thread_is_raised_once_all_are_done() -> None:
    turns, done = iter(range(3)), []

    def work() -> None:
        if next(turns) == 1:
            raise ValueError("one of them failed")
        done.append(True)

    with threads(3), pytest.raises(ValueError, match="one of them failed"):
        on_every_thread(work)
    assert len(done) == 2
    with threads(3):
        assert num_threads() == 3


def test_one_thread_needs_no_others() -> None:
    seen = []
    with threads(1):
        on_every_thread(lambda: seen.append(threading.get_ident()))
    assert seen == [threading.get_ident()]
