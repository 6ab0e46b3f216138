"""What a figure was measured on, and writing results whole or not at all."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["environment", "write_atomically"]

PACKAGES = ("torch", "torch-geometric", "numba", "numpy", "triton", "pytorch-lightning")


def environment(threads: int) -> dict[str, Any]:
    """Processor, operating system, Python, package versions and threads."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        flags = [flag for flag in ("avx2", "avx512f", "avx512_vnni") if flag in fields.get("flags", "").split()]
        name = fields.get("model name", platform.processor())
        return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')}; {', '.join(flags)})"
    return platform.processor()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` through a temporary file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
