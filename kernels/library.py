"""Registration of the ops with ``torch.library``, namespace ``qgnn``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .backend import check_devices, dispatch

__all__ = ["register", "register_fake"]

_CPU = torch.device("cpu")
_library = torch.library.Library("qgnn", "DEF")


def register_fake(op: str, fake: Callable[..., Any], library: torch.library.Library) -> None:
    """:func:`torch.library.register_fake` for ``qgnn::<op>``, without its cost at import.

    To name the registering file in messages, torch asks :func:`inspect.getmodule` for the module of the calling frame,
    which resolves the path of every module that is loaded: half of the import of this package.  The answer is put into
    the cache that is asked first; if that is ever elsewhere, only time is lost.
    """
    known: dict[str, str] = getattr(inspect, "modulesbyfile", {})
    known[inspect.getabsfile(register_fake)] = __name__
    torch.library.register_fake(f"qgnn::{op}", fake, lib=library)


def register(op: str, schema: str, fake: Callable[..., Any], check: Callable[..., None]) -> None:
    """Define ``qgnn::<op>`` with its fake (meta) implementation; devices dispatch through
    :mod:`.backend`.  An overload, ``name.overload``, runs the implementation of its name.

    ``check`` takes the op's arguments and raises on those with which a kernel would read or write out of bounds, or
    answer something else than its reference.
    """
    name = op.partition(".")[0]
    _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def device_of(args: Any, kwargs: Any) -> torch.device:
        return check_devices(*(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)))

    def run_fake(*args: Any, **kwargs: Any) -> Any:
        device_of(args, kwargs)
        return fake(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        device = device_of(args, kwargs)
        check(*args, **kwargs)
        return dispatch(name, device)(*args, **kwargs)

    def run_on_cpu(*args: Any, **kwargs: Any) -> Any:
        # All tensors are on the CPU: of several devices torch takes the implementation of another one.
        check(*args, **kwargs)
        return dispatch(name, _CPU)(*args, **kwargs)

    _library.impl(op, run_on_cpu, "CPU")
    _library.impl(op, run, "CUDA")
    register_fake(op, run_fake, _library)
