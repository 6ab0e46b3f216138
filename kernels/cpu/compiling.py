"""What is said, and counted, while kernels are compiled: once per machine, and seconds long."""
# mypy: ignore-errors

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event

__all__ = ["compilations", "listen"]

_LOGGER = logging.getLogger("qgnn_plugin")
_PACKAGE = __name__.partition(".")[0]
SAID = (
    "Compiling kernels for this CPU, once per machine: the first calls take seconds to half a minute "
    "(qgnn_plugin.warmup(packed) does it ahead of time)"
)


class _Listener(event.Listener):
    """Sees numba compile, not load, a function of this package."""

    def __init__(self) -> None:
        self.said = False
        self.watchers: list[Callable[[str], None]] = []

    def on_start(self, event: Any) -> None:
        if _name_of(event) and not self.said and not self.watchers:
            self.said = True
            _LOGGER.warning(SAID)

    def on_end(self, event: Any) -> None:
        name = _name_of(event)
        for watch in self.watchers if name else ():
            watch(name)


def _name_of(event: Any) -> str | None:
    function = getattr((event.data or {}).get("dispatcher"), "py_func", None)
    module = getattr(function, "__module__", "") or ""
    return function.__name__.lstrip("_") if module.partition(".")[0] == _PACKAGE else None


_listener = _Listener()


def listen() -> None:
    """Say so when a kernel is compiled; called once, where kernels are made."""
    event.register("numba:compile", _listener)


@contextmanager
def compilations(watch: Callable[[str], None]) -> Iterator[None]:
    """Call ``watch`` with the name of every function that is compiled inside, which is not said then."""
    _listener.watchers.append(watch)
    try:
        yield
    finally:
        _listener.watchers.remove(watch)
