"""How kernels are compiled: without the GIL, with IEEE floats, cached on disk between processes."""
# mypy: ignore-errors

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba

__all__ = ["kernel"]


def _fingerprint() -> str:
    """A digest of every source that compiled code can depend on."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), folder.parent / "layout.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _fingerprint()


def kernel(function: Callable[..., Any] | None = None, *, reassociate: bool = False) -> Any:
    """Compile ``function`` on first call, or load what an earlier process compiled.

    ``reassociate`` lets LLVM reorder float sums, for logits whose order no contract fixes.
    """
    if function is None:
        return partial(kernel, reassociate=reassociate)
    fastmath = {"reassoc", "contract"} if reassociate else False
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place on disk may be written
        return numba.njit(**options)(function)
    # numba looks at the age of the function's own file only; helpers in other files count as well.
    cache_file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cache_file is not None:
        cache_file._source_stamp = _STAMP
    return compiled
