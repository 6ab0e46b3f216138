"""Budgets, and what is proposed under them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..atomic import atomic_file
from ..config import QuantConfig
from ..tables import table

__all__ = ["WIDTHS", "Budget", "Choice", "Site", "Suggestion"]

WIDTHS = (8, 4, 2)
WORD = 32  # bits


@dataclass(frozen=True)
class Budget:
    """What may be spent; exactly one of three.

    Args:
        bytes: Of all codes: of weights, and of what passes the other sites in one forward pass over the data.
        seconds: Of a packed forward pass over the data on this machine.
        drop: Of the accuracy on validation nodes (of a regression, of minus the mean squared error), from the float
            model's.
    """

    bytes: int | None = None
    seconds: float | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"Expected one budget: of bytes, seconds or drop (got {', '.join(given) or 'none'})")
        (name, value), *_ = given.items()
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0 or value == float("inf"):
            raise ValueError(f"Expected a budget of {name} >= 0 (got {value!r})")


@dataclass(frozen=True)
class Site:
    """Where something is quantized: a layer, and which of its widths that is.

    Args:
        layer: Qualified name.
        kind: ``"input"``, ``"weight"`` or ``"message"``.
        rows: Of the matrices that pass, each with its number of columns.
    """

    layer: str
    kind: str
    rows: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}" if self.layer else self.kind

    def bytes(self, bits: int) -> int:
        """Of its codes, in whole words per row."""
        return sum(4 * rows * -(-columns * bits // WORD) for rows, columns in self.rows)


@dataclass(frozen=True)
class Choice:
    """Widths and what they were measured to do.

    Args:
        widths: By name of the site.
        bytes: Of all codes.
        seconds: Estimated time of a packed forward pass, :obj:`None` where time is no matter.
        loss: Cross-entropy to the float model's predictions on validation nodes, above its own entropy (for a
            regression the mean squared difference).
        accuracy: On validation nodes, see :class:`Budget`.
    """

    widths: Mapping[str, int]
    bytes: int
    seconds: float | None
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Suggestion:
    """What :func:`suggest_bits` proposes; prints as a table.

    Args:
        config: To read, edit, save, and hand to :func:`qgnn_plugin.quantize_model`.
        chosen: Its widths and what they do without training.
        frontier: All that was considered, the most bytes first.
        uniform: One width everywhere, by width.
        float_accuracy: Of the float model on validation nodes.
        sensitivity: By site, the loss with that site alone at a width and the others at 8 bits.
        measured_seconds: Time of the packed ``chosen``, where the budget is one of time.
        meets_budget: Whether ``chosen`` does, as measured.
        budget: What was asked for.
    """

    config: QuantConfig
    chosen: Choice
    frontier: list[Choice]
    uniform: dict[int, Choice]
    float_accuracy: float
    sensitivity: dict[str, dict[int, float]]
    measured_seconds: float | None
    meets_budget: bool
    budget: Budget

    def __str__(self) -> str:
        header = ("site", "bits", *(f"loss at {width}" for width in WIDTHS[1:]))
        rows = [
            (name, str(width), *(f"{self.sensitivity[name][w]:.3g}" for w in WIDTHS[1:]))
            for name, width in self.chosen.widths.items()
        ]
        choices = {f"{width} bits": choice for width, choice in self.uniform.items()} | {"suggested": self.chosen}
        compared = [(name, f"{c.bytes:,}", f"{c.loss:.4g}", f"{c.accuracy:.4f}") for name, c in choices.items()]
        lines = [table(header, rows, right=True), ""]
        lines.append(table(("widths", "bytes of codes", "loss", "validation"), compared, right=True))
        lines.append(f"float: {self.float_accuracy:.4f} on validation nodes; all without training")
        if self.measured_seconds is not None:
            lines.append(f"packed: {1e3 * self.measured_seconds:.2f} ms per forward pass")
        if not self.meets_budget:
            lines.append("the budget is out of reach: this is what comes closest")
        return "\n".join(lines)

    __repr__ = __str__

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as YAML: what ``qgnn --quant`` and :meth:`QuantConfig.from_dict` read."""
        import yaml  # of the command line

        plain = {name: value for name, value in self.config.to_dict().items() if value is not None}
        with atomic_file(path) as file:
            file.write(yaml.safe_dump(plain, sort_keys=False).encode())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the frontier as PNG.

        Raises:
            ImportError: Without matplotlib.
        """
        from . import figures

        mixed = [_point(choice) for choice in self.frontier]
        uniform = {f"{width} bits": _point(choice) for width, choice in self.uniform.items()}
        drawing = figures.frontier(mixed, uniform, _point(self.chosen), self.float_accuracy)
        with atomic_file(path) as file:
            file.write(figures.png(drawing))


def _point(choice: Choice) -> tuple[float, float, float]:
    return float(choice.bytes), choice.loss, choice.accuracy
