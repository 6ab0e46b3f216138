"""Ranges and multipliers as training goes on: measured from a model, kept as series, read from a logger's CSV file."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..atomic import atomic_file
from ..config import OFF
from ..conversion.converted import quantizers
from ..quantizers import QLRQuantizer
from ..smp import smp_layers

__all__ = ["History", "Series", "quantization_series"]

LOW, HIGH, MULTIPLIER, VIOLATION = "qgnn/low/", "qgnn/high/", "qgnn/lambda/", "qgnn/violation/"
PREFIX, STEP = "qgnn/", "step"


@torch.no_grad()
def quantization_series(model: nn.Module) -> dict[str, float]:
    """What moves while a converted model trains, by the names that loggers show.

    ``qgnn/low/<site>`` and ``qgnn/high/<site>``: the ends of its range (the outermost of several; of ranges per row in
    units of the row's largest magnitude); ``qgnn/lambda/<layer>`` and ``qgnn/violation/<layer>``: multiplier of the
    smoothness constraint, and by how much the last training step missed the bound.
    """
    found: dict[str, float] = {}
    for name, quantizer in quantizers(model).items():
        ends = _ends(quantizer)
        if ends is not None:
            site = name.removesuffix("_quantizer")
            found[f"{LOW}{site}"], found[f"{HIGH}{site}"] = ends
    for name, layer in smp_layers(model).items():
        found[f"{MULTIPLIER}{name}"] = float(layer._multiplier_value)
        if layer._constraint is not None:
            found[f"{VIOLATION}{name}"] = float(layer._constraint) - 1
    return found


def _ends(quantizer: QLRQuantizer) -> tuple[float, float] | None:
    if quantizer.bits == OFF or not quantizer.is_set or quantizer.is_zero_one:
        return None
    scale, lower = quantizer.range()
    return float(lower.min()) + 0.0, float((lower + scale * quantizer.qmax).max())


@dataclass
class Series:
    """Values of one quantity at rising steps."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


class History:
    """Series by name.

    Args:
        series: Those to start with.
    """

    def __init__(self, series: Mapping[str, Series] | None = None) -> None:
        self.series: dict[str, Series] = dict(series or {})

    def __len__(self) -> int:
        return len(self.series)

    def add(self, step: float, values: Mapping[str, float]) -> None:
        """Append one value each."""
        for name, value in values.items():
            series = self.series.setdefault(name, Series())
            series.steps.append(step)
            series.values.append(value)

    def with_prefix(self, prefix: str) -> dict[str, Series]:
        """The series of one kind, by what follows the prefix."""
        return {name.removeprefix(prefix): s for name, s in self.series.items() if name.startswith(prefix)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file as Lightning's ``CSVLogger`` does, whole or not at all."""
        names = sorted(self.series)
        rows: dict[float, dict[str, float]] = {}
        for name, series in self.series.items():
            for step, value in zip(series.steps, series.values, strict=True):
                rows.setdefault(step, {})[name] = value
        text = io.StringIO()
        writer = csv.DictWriter(text, [STEP, *names])
        writer.writeheader()
        writer.writerows({STEP: step, **rows[step]} for step in sorted(rows))
        with atomic_file(path) as file:
            file.write(text.getvalue().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read the ``metrics.csv`` of Lightning's ``CSVLogger``, or of :meth:`save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it has no column of steps, or none of :func:`quantization_series`.
        """
        with Path(path).open(newline="") as file:
            reader = csv.DictReader(file)
            columns = [name for name in reader.fieldnames or () if name.startswith(PREFIX)]
            if STEP not in (reader.fieldnames or ()) or not columns:
                raise ValueError(
                    f"Expected a CSV file with 'step' and columns that begin with {PREFIX!r} (got '{path}'); log with "
                    f"QuantizationMonitor or DifferentialMultiplier and Lightning's CSVLogger"
                )
            history = cls()
            for row in reader:
                history.add(float(row[STEP]), dict(_numbers(row, columns)))
        return history


def _numbers(row: Mapping[str, str], columns: Iterable[str]) -> Iterable[tuple[str, float]]:
    for name in columns:
        text = row.get(name)
        if text and math.isfinite(value := float(text)):
            yield name, value
