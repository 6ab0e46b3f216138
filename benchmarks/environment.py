"""What a figure was measured on, and writing results whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["code_digest", "compact_json", "environment", "write_atomically"]

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


def code_digest() -> str:
    """A digest of the library's sources: figures belong to the code that they were measured on."""
    import qgnn_plugin
    from qgnn_plugin import kernels

    digest = hashlib.sha256()
    for package in (qgnn_plugin, kernels):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    other = os.environ.get("NUMBA_CPU_NAME")
    return _host() + (f", kernels compiled for {other}" if other else "")


def _host() -> str:
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


def compact_json(value: Any, indent: int = 0) -> str:
    """JSON with one line per run: every element of a list of objects, and every object that holds no such list, is
    one line.
    """
    pad = " " * indent
    if isinstance(value, dict) and _holds_runs(value):
        entries = (f"{pad} {json.dumps(key)}: {compact_json(inner, indent + 1)}" for key, inner in value.items())
        return "{\n" + ",\n".join(entries) + f"\n{pad}}}"
    if isinstance(value, list) and _holds_runs(value):
        return "[\n" + ",\n".join(f"{pad} {json.dumps(run)}" for run in value) + f"\n{pad}]"
    return json.dumps(value)


def _holds_runs(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_runs(inner) for inner in value.values())
    return isinstance(value, list) and any(isinstance(run, dict) for run in value)
