"""Denormal numbers, which a CPU computes with a hundred times slower than with others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["flushed_denormals"]


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Take denormal numbers for zero, as weight decay drives unused weights there; also a decorator.

    The processor's mode is the caller's again afterwards: much, property tests for one, does not work without.
    """
    smallest, one = math.ulp(0.0), 1.0
    was_flushed = smallest * one == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushed)
