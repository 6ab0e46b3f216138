"""How kernels are compiled: without the GIL, with IEEE floats, cached on disk between processes."""
# mypy: ignore-errors

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import IndexDataCacheFile

from .compiling import listen

__all__ = ["kernel"]

listen()


def _fingerprint() -> str:
    """A digest of every source that compiled code can depend on."""
    kernels = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted([*kernels.glob("cpu/**/*.py"), *kernels.glob("*/cpu*.py"), kernels / "layout.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _fingerprint()


@cache
def _stamp_of(file: str) -> str:
    """What code compiled from ``file`` depends on: the kernels, and what is written there."""
    return _STAMP + hashlib.sha256(Path(file).read_bytes()).hexdigest()


class _CheckedFile(IndexDataCacheFile):
    """numba's files of compiled code, with a checksum before each: what is damaged is compiled and written anew."""

    def _load_index(self) -> dict[Any, str]:
        try:
            version, stamp, overloads = self._read(self._index_path)
        except OSError:
            return {}
        return overloads if (version, stamp) == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_path, (self._version, self._source_stamp, overloads))

    def _load_data(self, name: str) -> Any:
        return self._read(self._data_path(name))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _write(self, path: str, value: Any) -> None:
        data = self._dump(value)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(data).digest() + data)

    def _read(self, path: str) -> Any:
        """What :meth:`_write` wrote; an OSError, as for a file that is missing, where that is damaged."""
        content = Path(path).read_bytes()
        length = hashlib.sha256().digest_size
        digest, data = content[:length], content[length:]
        if hashlib.sha256(data).digest() != digest:
            raise OSError(f"Expected compiled code as it was written (got other bytes in '{path}')")
        try:
            return pickle.loads(data)
        except (AttributeError, ImportError) as error:  # of a version whose classes have moved since
            raise OSError(f"Expected compiled code of this version (got another in '{path}')") from error


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
    stored = getattr(compiled, "_cache", None)
    if hasattr(stored, "_cache_file"):
        # numba looks at the age of the function's own file only; helpers in other files count as well.
        stamp = _stamp_of(function.__code__.co_filename)
        stored._cache_file = _CheckedFile(stored._cache_path, stored._impl.filename_base, stamp)
    return compiled
