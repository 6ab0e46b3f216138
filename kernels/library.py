"""Registration of the ops with ``torch.library``, namespace ``qgnn``: an op is told once, by the signature of its
reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backend import add_backend, add_op, check_devices, dispatch
from .signature import checked, selecting

__all__ = ["register", "register_backend", "register_fake"]

_CPU = torch.device("cpu")
_library = torch.library.Library("qgnn", "DEF")
_kinds = {"cuda"}  # of devices, beside the CPU
_on_device: dict[str, Callable[..., Any]] = {}


def register_fake(op: str, fake: Callable[..., Any], library: torch.library.Library) -> None:
    """:func:`torch.library.register_fake` for ``qgnn::<op>``, without its cost at import.

    To name the registering file in messages, torch asks :func:`inspect.getmodule` for the module of the calling frame,
    which resolves the path of every module that is loaded: half of the import of this package.  The answer is put into
    the cache that is asked first; if that is ever elsewhere, only time is lost.
    """
    known: dict[str, str] = getattr(inspect, "modulesbyfile", {})
    known[inspect.getabsfile(register_fake)] = __name__
    torch.library.register_fake(f"qgnn::{op}", fake, lib=library)


def register(
    reference: Callable[..., Any], fake: Callable[..., Any], check: Callable[..., None], *, rows: str | None = None
) -> Callable[..., None]:
    """Define ``qgnn::<op>`` by its reference, ``<op>_reference``; devices dispatch through :mod:`.backend`.

    Args:
        reference: What the op computes, in torch.  Its annotated signature is the op's: the schema follows from it, and
            functions of the op name what they need of it, by the same names in any order.
        fake: Empty results of the shapes and dtypes of the op's.
        check: Raises on arguments with which a kernel would read or write out of bounds, or answer something else than
            the reference.
        rows: The last parameter, where the op has an overload ``rows``: given, the result is a pair, packed words and
            the multipliers of their rows, else one tensor.

    Returns:
        ``check`` as a function of all arguments in their order.

    Raises:
        TypeError: If ``fake`` or ``check`` names what the op has not.
    """
    name = reference.__name__.removesuffix("_reference")
    signature = inspect.signature(reference, eval_str=True)
    parameters = signature.parameters
    add_op(name, reference)
    fake = selecting(fake, parameters)
    on_cpu = checked(check, lambda: dispatch(name, _CPU), parameters)
    check = selecting(check, parameters)

    def on_device(*args: Any, **kwargs: Any) -> Any:
        device = _device_of(args, kwargs)
        check(*args, **kwargs)
        return dispatch(name, device)(*args, **kwargs)

    if rows is None:
        _define(name + _schema(signature), fake, on_cpu, on_device)
        return check
    *others, last = parameters.values()
    assert last.name == rows
    one = signature.replace(parameters=others, return_annotation=Tensor)
    # Behind parameters with defaults one that is required can be had by its name only.
    has_defaults = any(parameter.default is not inspect.Parameter.empty for parameter in others)
    kind = inspect.Parameter.KEYWORD_ONLY if has_defaults else last.kind
    required = inspect.Parameter(rows, kind, annotation=Tensor)
    pair = signature.replace(parameters=[*others, required], return_annotation=tuple[Tensor, Tensor])
    _define(name + _schema(one), fake, on_cpu, on_device)
    _define(f"{name}.rows" + _schema(pair), fake, on_cpu, on_device)
    return check


def _device_of(args: Any, kwargs: Any) -> torch.device:
    return check_devices(*(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))


def register_backend(
    name: str, package: str, devices: tuple[str, ...], is_available: Callable[[], bool] = lambda: True
) -> None:
    """Add a backend from elsewhere, for :func:`.backend.use_backend` and ``QGNN_BACKEND``.

    Args:
        name: What it is requested by.
        package: A package with a module ``<op>`` for the folder of each op; an op's function has its name and takes
            what it needs of the arguments of ``<op>_reference``, by their names.  It is imported on first use; an op
            that is missing is an error, when it is run.
        devices: Types of devices that it runs on, as of :class:`torch.device`.  There ``"auto"`` prefers it to the
            references, not to the kernels of this package.
        is_available: Whether it can run here; asked once.

    Raises:
        ValueError: If the name is taken.
    """
    add_backend(name, package, devices, is_available)
    for kind in set(devices) - _kinds - {"cpu"}:
        for op, on_device in _on_device.items():
            _library.impl(op, on_device, kind.upper())
        _kinds.add(kind)


def _schema(signature: inspect.Signature) -> str:
    def prototype() -> None: ...

    prototype.__signature__ = signature  # type: ignore[attr-defined]
    # Numbers are constants of an op: widths, heads and sizes of a model, never those of a graph.
    return torch.library.infer_schema(prototype, mutates_args=()).replace("SymInt", "int")


def _define(schema: str, fake: Callable[..., Any], on_cpu: Callable[..., Any], on_device: Callable[..., Any]) -> None:
    def run_fake(*args: Any, **kwargs: Any) -> Any:
        _device_of(args, kwargs)
        return fake(*args, **kwargs)

    op = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # On the CPU all tensors are there: of several devices torch takes the implementation of another one.
    _library.impl(op, on_cpu, "CPU")
    for kind in _kinds:
        _library.impl(op, on_device, kind.upper())
    _on_device[op] = on_device
    register_fake(op, run_fake, _library)
