"""Generated modules on disk: one file per expression in a folder of the user's, with the code compiled from it.

``QGNN_KERNEL_CACHE`` names the folder; by default it is ``qgnn_plugin/generated`` under ``$XDG_CACHE_HOME`` or
``~/.cache``.  A file is written whole or not at all, and one that does not hold what would be written now is replaced,
never run.  Where no folder may be written, kernels are compiled for this process alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

__all__ = ["CACHE_ENV", "cache_folder", "load_kernel"]

CACHE_ENV = "QGNN_KERNEL_CACHE"
_lock = Lock()
_loaded: dict[str, Any] = {}


def cache_folder() -> Path:
    """Where generated modules are kept."""
    named = os.environ.get(CACHE_ENV)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "qgnn_plugin" / "generated"


@cache
def _sources() -> bytes:
    """A digest of what generated code calls, or is written by."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    kernels = folder.parent
    for path in sorted({*folder.glob("*.py"), *kernels.glob("cpu/**/*.py"), *kernels.glob("*/cpu*.py")}):
        digest.update(path.read_bytes())
    return digest.digest()


def load_kernel(source: str, name: str = "kernel") -> Callable[..., Any]:
    """The function ``name`` of a module with this source; loaded once per process."""
    key = hashlib.sha256(_sources() + source.encode()).hexdigest()[:40]
    with _lock:
        if key not in _loaded:
            _loaded[key] = _module(key, source)
        return getattr(_loaded[key], name)


def _module(key: str, source: str) -> Any:
    path = _written(key, source)
    module_name = f"qgnn_generated_{key}"
    if path is None:
        spec: Any = importlib.util.spec_from_loader(module_name, loader=None)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        name = f"<{module_name}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # where Triton reads sources
        exec(compile(source, name, "exec"), module.__dict__)
        return module
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # numba looks functions up there
    # What was compared is what runs, whatever happens to the file, or to compiled Python beside it, in between.
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def _written(key: str, source: str) -> Path | None:
    """The file with this source; :obj:`None` where none can be written."""
    folder = cache_folder()
    path = folder / f"kernel_{key}.py"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_file() and path.read_text() == source:
            return path
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(source)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError:
        return None
    return path
