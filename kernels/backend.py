"""The one place that chooses who executes an op.

============= ============================================================ ==================
backend       what runs                                                    devices
============= ============================================================ ==================
``torch``     the pure-torch reference beside each op                      all
``cpu``       numba kernels, ``kernels/<op>/cpu.py``                       cpu
``triton``    Triton kernels, ``kernels/<op>/triton.py``                    cuda
``interpret`` the same Triton kernels under Triton's interpreter           all (for tests)
``auto``      the fastest of the above for the device                      all
============= ============================================================ ==================

Others come from elsewhere (:func:`.library.register_backend`): a package with a module for each op.

Each backend module defines a function named like the op, of those of the op's arguments that it needs.  All backends
compute the canonical arithmetic of :mod:`qgnn_plugin.kernels.arithmetic`, so the choice never
changes a result beyond the op's stated tolerance.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .signature import selecting

__all__ = [
    "BACKENDS",
    "add_backend",
    "add_op",
    "available_backends",
    "backend_for",
    "check_devices",
    "current_backend",
    "dispatch",
    "has_numba",
    "implementation",
    "is_direct",
    "onnx_forms",
    "rehearsing",
    "use_backend",
]

BACKENDS = ("torch", "cpu", "triton", "interpret")
_ENV = "QGNN_BACKEND"
# The variables of the environment past their decoding, which takes longer than some kernels do.
_variables: Any = getattr(os.environ, "_data", os.environ)
_KEY: Any = getattr(os.environ, "encodekey", str)(_ENV)
_MODULE = {"cpu": "cpu", "triton": "triton", "interpret": "triton", "onnx": "onnx"}


class _Other(NamedTuple):
    package: str
    devices: tuple[str, ...]
    is_available: Callable[[], bool]


_others: dict[str, _Other] = {}
_CPU = torch.device("cpu")
_requested: ContextVar[str | None] = ContextVar("qgnn_backend", default=None)
_rehearsing: ContextVar[bool] = ContextVar("qgnn_rehearsing", default=False)


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@cache
def has_numba() -> bool:
    """Whether numba is there, and not told to run kernels as plain Python, which they are not."""
    return _installed("numba") and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


def _interpreting() -> bool:
    # Triton reads this when a kernel is decorated, so it must be set before importing them.
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that can run on ``device`` here, fastest first."""
    return _available(torch.device(device).type, _rehearsing.get(), _interpreting())


@cache
def _available(kind: str, rehearsing: bool, interpreting: bool) -> tuple[str, ...]:
    found = []
    if (kind == "cuda" or rehearsing) and _installed("triton") and not interpreting:
        found.append("triton")
    if kind == "cpu" and has_numba():
        found.append("cpu")
    found += [name for name, other in _others.items() if kind in other.devices and other.is_available()]
    found.append("torch")
    if _installed("triton") and interpreting:
        found.append("interpret")
    return tuple(found)


def current_backend() -> str:
    """The requested backend: the innermost :func:`use_backend`, else ``QGNN_BACKEND``, else
    ``"auto"``.
    """
    return _requested.get() or (os.environ[_ENV] if _variables.get(_KEY) else "auto")


_HINTS = {
    "cpu": "; it takes tensors of the CPU, and needs numba with NUMBA_DISABLE_JIT unset",
    "interpret": "; set TRITON_INTERPRET=1 before importing qgnn_plugin",
}


def backend_for(device: torch.device | str) -> str:
    """Resolve the requested backend for ``device``.

    Raises:
        ValueError: if the request is not a backend's name.
        RuntimeError: if it cannot run on ``device`` here; the message lists what can.
    """
    name = current_backend()
    if name == "auto" and device == _CPU and has_numba() and not _rehearsing.get():
        return "cpu"
    found = available_backends(device)
    if name == "auto":
        return found[0]
    _check_name(name)
    if name not in found:
        hint = _HINTS.get(name, "")
        raise RuntimeError(f"Backend {name!r} is not available for device '{device}', available: {found}{hint}")
    return name


def is_direct() -> bool:
    """Whether kernels of the CPU may be run past the dispatcher: they are asked for, and nobody looks at what passes
    there, such as a compiler, a mode or a profiler.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None  # of torch.func
        and forward_ad._current_level < 0  # of derivatives that run forwards
        and not torch.autograd._profiler_enabled()
        and backend_for(_CPU) == "cpu"
    )


def _check_name(name: str) -> None:
    names = (*BACKENDS, *_others)
    if name not in names:
        raise ValueError(f"Expected a backend out of {('auto', *names)} (got {name!r})")


def add_backend(name: str, package: str, devices: tuple[str, ...], is_available: Callable[[], bool]) -> None:
    """See :func:`.library.register_backend`."""
    if name in ("auto", *BACKENDS, *_others):
        raise ValueError(f"Expected a name that no backend has (got {name!r})")
    _others[name] = _Other(package, devices, is_available)
    _available.cache_clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Request a backend for the ops called in this context (``"auto"``, one of :data:`BACKENDS`, or one
    that was registered).
    """
    if name != "auto":
        _check_name(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@contextmanager
def rehearsing() -> Iterator[None]:
    """Let the Triton backend take tensors of any device in this context (``tools/rehearsal.py``)."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def add_op(name: str, reference: Callable[..., Any]) -> None:
    """Say what ``name`` computes; its backends are in the modules ``cpu``, ``triton``, ... beside the reference."""
    _references[name] = reference


_references: dict[str, Callable[..., Any]] = {}


@cache
def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that executes ``op`` on ``backend``, of the op's own arguments; modules are imported on first use.

    Raises:
        TypeError: If it requires an argument that the op has not.
    """
    reference = _references[op]
    if backend == "torch":
        return reference
    if backend in _others:
        module = f"{_others[backend].package}.{reference.__module__.rpartition('.')[2]}"
    else:
        module = f"{reference.__module__}.{_MODULE[backend]}"
    function = getattr(importlib.import_module(module), op)
    return selecting(function, inspect.signature(reference).parameters)


def onnx_forms() -> dict[str, Callable[..., Any]]:
    """What ops are in operations that ONNX has, by name: of those whose folder tells it, in ``onnx.py``."""
    forms = {}
    for op, reference in _references.items():
        package = sys.modules[reference.__module__]
        is_told = hasattr(package, "__path__") and importlib.util.find_spec(f"{package.__name__}.onnx") is not None
        if is_told and hasattr(importlib.import_module(f"{package.__name__}.onnx"), op):
            forms[op] = implementation(op, "onnx")
    return forms


def dispatch(op: str, device: torch.device) -> Callable[..., Any]:
    """What the registered ops call: the implementation of ``op`` for ``device``."""
    return implementation(op, backend_for(device))


def check_devices(*tensors: Tensor | None) -> torch.device:
    """The one device of all tensors.

    Raises:
        ValueError: If there are several.
    """
    found = {t.device for t in tensors if t is not None}
    if len(found) != 1:
        names = sorted(str(d) for d in found)
        raise ValueError(f"Expected all tensors on one device (got {names}); move them with '.to'")
    return found.pop()
