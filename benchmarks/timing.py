"""Timings on a shared machine: all sides in turn, round after round, compared within the round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "copy_bandwidth", "interleaved"]


@dataclass(frozen=True)
class Timing:
    """Seconds of each round: wall clock, and processor time of the whole process."""

    wall: list[float]
    processor: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    def over(self, other: Timing) -> float:
        """How many times ``other``'s time is this one's: the median of the rounds' own ratios."""
        pairs = zip(other.wall, self.wall, strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time every side once per round, after one call each that is not counted.

    Results are dropped before the next call: no side pays for freeing another's.
    """
    for run in sides.values():
        run()
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            begin, begin_processor = time.perf_counter(), time.process_time()
            result = run()
            wall[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - begin_processor)
            del result
    return {name: Timing(wall[name], processor[name]) for name in sides}


def copy_bandwidth(num_bytes: int = 1 << 28, rounds: int = 7) -> float:
    """Bytes per second, read and written, of copying memory that does not fit the caches."""
    source = torch.zeros(num_bytes // 4)
    target = torch.zeros_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * num_bytes / min(timing.wall)
