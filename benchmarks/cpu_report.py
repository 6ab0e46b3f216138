"""What the sections of the CPU benchmark have in common: Markdown tables, and targets met or missed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Target", "number", "per_threads", "table", "target_table"]


@dataclass(frozen=True)
class Target:
    """An aim and what was measured for it.

    Args:
        text: What is compared.
        bound: The ratio to reach, or with ``at_most`` the figure not to pass.
        measured: Figures by circumstance, such as ``"(1 thread)"``; the target is met if all of them are in bounds.
        at_most: Whether ``bound`` is an upper one.
    """

    text: str
    bound: float
    measured: Mapping[str, float]
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        values = self.measured.values()
        if not values:
            return False
        return max(values) <= self.bound if self.at_most else min(values) >= self.bound


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else str(value)


def table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of some keys of ``rows``; a missing value is an empty cell."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return [*lines, ""]


def target_table(targets: Sequence[Target]) -> list[str]:
    """One line per target, with the figures and whether it is met."""
    rows = [
        {
            "target": target.text,
            "aim": f"{'at most' if target.at_most else 'at least'} {target.bound:g}",
            "measured": ", ".join(f"{number(v)} {k}".rstrip() for k, v in target.measured.items()),
            "": "not measured" if not target.measured else "met" if target.is_met else "**missed**",
        }
        for target in targets
    ]
    return table(("target", "aim", "measured", ""), rows)


def per_threads(rows: Iterable[Mapping[str, Any]], column: str, **where: Any) -> dict[str, float]:
    """``column`` of the rows that agree with ``where``, by their thread count (the median, were there several)."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if all(row[key] == value for key, value in where.items()) and row.get(column) is not None:
            found.setdefault(f"({row['threads']} thread{'s' if row['threads'] > 1 else ''})", []).append(row[column])
    return {key: statistics.median(values) for key, values in found.items()}
