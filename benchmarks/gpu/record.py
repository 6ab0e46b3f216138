"""Rows of JSON, appended as they are made: what was measured before a crash or a limit is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Row", "append", "read"]

Row = dict[str, Any]


def append(file: Path, row: Row) -> None:
    """Append one row and see it on disk before returning.  One ``write``: rows of several processes do not mix."""
    line = (json.dumps(row, default=str) + "\n").encode()
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def read(file: Path) -> list[Row]:
    """The rows of a file; a last line that was cut off is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
