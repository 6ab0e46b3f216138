"""The grid of kernel specializations that :mod:`..aot` compiles: what the launchers can pick."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..case import Case
from .aggregate import aggregate_cases
from .attention import attention_cases
from .float_sums import smp_cases
from .grid import shapes
from .linear import linear_cases
from .rows import head_cases, pack_cases, training_cases

__all__ = ["BUILDERS", "shapes"]

BUILDERS: list[Callable[[str, str], Iterator[Case]]] = [
    aggregate_cases,
    attention_cases,
    head_cases,
    linear_cases,
    pack_cases,
    training_cases,
    smp_cases,
]
