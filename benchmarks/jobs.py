"""Runs of a benchmark in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["run_jobs"]


def run_jobs(work: Callable[[Any], str], jobs: Sequence[Any], processes: int) -> None:
    """Call ``work``, a function of a module, with every job, and print what it returns as each is done."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for count, line in enumerate(pool.imap_unordered(work, jobs), 1):
            print(f"[{count}/{len(jobs)}] {line}", flush=True)
