"""Timings on a shared machine: all sides in turn, round after round, compared within the round."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numba
import torch

__all__ = ["KEPT_MEMORY", "Timing", "copy_bandwidth", "interleaved", "keeps_memory", "set_threads"]


@dataclass(frozen=True)
class Timing:
    """Seconds by call: wall clock, and processor time of the whole process."""

    wall: dict[int, float]
    processor: dict[int, float]

    @property
    def median(self) -> float:
        return statistics.median(self.wall.values())

    @property
    def processor_median(self) -> float:
        return statistics.median(self.processor.values())

    def over(self, other: Timing) -> float:
        """How many times ``other``'s time is this one's: the median ratio of the rounds that both ran in."""
        shared = self.wall.keys() & other.wall.keys()
        return statistics.median(other.wall[i] / self.wall[i] for i in shared)


def interleaved(
    sides: Mapping[str, Callable[[], Any]], rounds: int, slow: Mapping[str, int] | None = None, in_a_row: int = 1
) -> dict[str, Timing]:
    """Time every side once per round, after one call each that is not counted.

    Results are dropped before the next call: no side pays for freeing another's.

    Args:
        sides: The calls, by name.
        rounds: How many rounds.
        slow: Sides that take part in fewer rounds, evenly spread, and how many; they get no call beforehand.
        in_a_row: Calls of a side before it is the next one's turn, each timed and compared with the same call of other
            sides.  If there are several, one that is not counted comes before them: in a process that runs one model,
            short calls find their code and data in the caches, and not after a call of another library.
    """
    slow = slow or {}
    if not all(1 <= count <= rounds for count in slow.values()):
        raise ValueError(f"Expected slow sides in 1 to {rounds} rounds (got {dict(slow)})")
    turns = {name: {i * rounds // slow.get(name, rounds) for i in range(slow.get(name, rounds))} for name in sides}
    for name, run in sides.items():
        if name not in slow:
            run()
    timings = {name: Timing({}, {}) for name in sides}
    for i in range(rounds):
        for name, run in sides.items():
            if i not in turns[name]:
                continue
            if in_a_row > 1:
                run()
            for call in range(i * in_a_row, (i + 1) * in_a_row):
                begin, begin_processor = time.perf_counter(), time.process_time()
                result = run()
                timings[name].wall[call] = time.perf_counter() - begin
                timings[name].processor[call] = time.process_time() - begin_processor
                del result
    return timings


def set_threads(count: int) -> None:
    """Threads of torch (and with it of our kernels, MKL and oneDNN), of numba's own loops, and of DGL once imported."""
    # numba first: its threading layer, launched by the first call, sets OpenMP's threads for torch as well.
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(count)
    if (dgl := sys.modules.get("dgl")) is not None:  # which has an OpenMP of its own
        dgl.utils.set_num_threads(count)


# Of a process whose C library (glibc) keeps what is freed and allocates of it, which is when float layers are fastest.
# By default it maps each block of more than 32 MB anew, and gives it back when it is freed, unless there is room for it
# in what was freed before: a page fault for each 4 kB that is written, which is up to two thirds of the time of a float
# layer that writes a row for each of 200,000 edges, in some processes and not in others.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}


def keeps_memory() -> bool:
    """Whether this process was started so that the C library keeps what is freed."""
    return all(os.environ.get(name) == value for name, value in KEPT_MEMORY.items())


def copy_bandwidth(num_bytes: int = 1 << 28, rounds: int = 7) -> float:
    """Bytes per second, read and written, of copying memory that does not fit the caches."""
    source = torch.zeros(num_bytes // 4)
    target = torch.zeros_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * num_bytes / min(timing.wall.values())
