"""Print the oldest versions that pyproject.toml claims, as requirements for pip (see ``make test-floors``).

torch is the one of constraints.txt: older builds come with gigabytes of CUDA, or not at all for a newer Python.
"""

from __future__ import annotations

import re
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = ROOT / "pyproject.toml"
MINIMUM = re.compile(r"^([\w\[\],.-]+)>=([\w.]+)$")


def floors() -> list[str]:
    """``name==version`` for every dependency with a minimum, the name alone for others."""
    listed = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    others = [requirement.replace(" ", "") for requirement in listed if not requirement.startswith("torch>=")]
    return [*pinned, *(MINIMUM.sub(r"\1==\2", requirement) for requirement in others)]


if __name__ == "__main__":
    print(*floors())
