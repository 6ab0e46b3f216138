"""Progress bars of whatever takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm import tqdm

from ..analysis.history import History, quantization_series

__all__ = ["EpochBar", "working"]

DELAY = 2.0  # seconds until a bar appears


class EpochBar:
    """What the recipe calls after each epoch: moves a bar, and keeps the history of ranges and multipliers."""

    def __init__(self, name: str) -> None:
        self.history = History()
        self._bar: tqdm[Any] = tqdm(desc=name, unit="epoch", delay=DELAY, leave=False)

    def __call__(self, model: nn.Module, epoch: int, epochs: int) -> None:
        self._bar.total = epochs
        self._bar.update(epoch - self._bar.n)
        self.history.add(epoch, quantization_series(model))

    def __enter__(self) -> EpochBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


@contextmanager
def working(steps: Sequence[str]) -> Iterator[Any]:
    """A bar over named steps: call what it gives when one begins."""
    with tqdm(total=len(steps), unit="step", delay=DELAY, leave=False) as bar:
        names = iter(steps)
        bar.set_description("start", refresh=False)

        def begin() -> None:
            if bar.desc != "start: ":
                bar.update()
            bar.set_description(next(names), refresh=False)

        yield begin
