"""The tree as an installed package, without installing anything: folders of links, and wheels unpacked beside them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["MAPPED", "environment_for", "lay_out", "lay_out_kernels", "missing", "unpack_wheels"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "qgnn_plugin"
MAPPED = ("kernels", "lightning_modules")  # as in pyproject.toml
ROOTED = ("benchmarks", "tools")
NEEDED = ("torch_geometric", "safetensors", "numba")  # by the package beyond PyTorch; the kernels need none of them


def _link(folder: Path, targets: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets:
        link = folder / target.name
        if not link.exists():
            link.symlink_to(target)


def lay_out(scratch: Path, root: Path = ROOT) -> Path:
    """A folder from which ``qgnn_plugin``, ``benchmarks`` and ``tools`` are imported as if they were installed."""
    site = scratch / "site"
    modules = [path for path in sorted((root / PACKAGE).iterdir()) if path.name != "__pycache__"]
    _link(site / PACKAGE, modules + [root / name for name in MAPPED])
    _link(site, [root / name for name in ROOTED])
    return site


def lay_out_kernels(scratch: Path, root: Path = ROOT) -> Path:
    """The same with an empty ``qgnn_plugin/__init__.py``: the kernels alone, where PyG is missing."""
    site = scratch / "kernels-only"
    _link(site / PACKAGE, [root / "kernels"])
    (site / PACKAGE / "__init__.py").touch()
    _link(site, [root / name for name in ROOTED])
    return site


def unpack_wheels(wheels: Path, scratch: Path) -> Path:
    """Install the wheels of a folder into one of their own; no index is asked and nothing else is touched."""
    target = scratch / "wheels"
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    if not files:
        raise ValueError(f"Expected wheels in '{wheels}' (got none)")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--target", str(target), *files], check=True)
    return target


def missing(paths: list[Path]) -> list[str]:
    """Packages that are neither installed nor in ``paths``."""
    carried = {entry.name for path in paths if path.exists() for entry in path.iterdir()}
    return [name for name in NEEDED if name not in carried and importlib.util.find_spec(name) is None]


def environment_for(paths: list[Path], cache: Path, dry: bool) -> dict[str, str]:
    """The environment of a section's process."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH", "QGNN_BACKEND")}
    before = os.environ.get("PYTHONPATH")
    return kept | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(cache),
        **({"TRITON_INTERPRET": "1"} if dry else {}),
    }
