"""Tables of text, as summaries, reports and the command line print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["table"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = False) -> str:
    """Columns under a header and a rule, as wide as their widest cell and two spaces apart.

    Args:
        header: One name per column.
        rows: As many cells each.
        right: Whether columns after the first are aligned to the right, as numbers are.

    Raises:
        ValueError: If a row has another number of cells.
    """
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("  ".join(_aligned(line, widths, right)).rstrip() for line in lines)


def _aligned(cells: Sequence[str], widths: Sequence[int], right: bool) -> list[str]:
    sizes = list(zip(cells, widths, strict=True))
    return [c.rjust(width) if right and i else c.ljust(width) for i, (c, width) in enumerate(sizes)]
