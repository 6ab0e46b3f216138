"""Print the oldest versions that pyproject.toml claims, as requirements for pip (see ``make test-floors``)."""

from __future__ import annotations

import re
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
MINIMUM = re.compile(r"^([\w\[\],.-]+)>=([\w.]+)$")


def floors() -> list[str]:
    """``name==version`` for every dependency with a minimum, the name alone for others."""
    listed = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    return [MINIMUM.sub(r"\1==\2", requirement.replace(" ", "")) for requirement in listed]


if __name__ == "__main__":
    print(*floors())
