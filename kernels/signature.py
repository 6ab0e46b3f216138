"""Functions that name some of an op's arguments, called with all of them; with ``**rest`` they have the others by
name, to hand these on.

They are written once, at import, as calls by position: binding names in every call would cost as much as a small
kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

__all__ = ["checked", "selecting"]

Parameters = Mapping[str, inspect.Parameter]


def selecting(function: Callable[..., Any], parameters: Parameters) -> Callable[..., Any]:
    """``function`` as one of all ``parameters``, of which it names some (``**rest`` has the others); as it is, where it
    begins with all of them and their defaults.

    Raises:
        TypeError: If it requires another.
    """
    first = list(inspect.signature(function).parameters.values())[: len(parameters)]
    if [(p.name, p.default) for p in first] == [(p.name, p.default) for p in parameters.values()]:
        return function
    return eval(f"lambda {_declared(parameters)}: f({_passed(function, parameters)})", {"f": function})


def checked(
    check: Callable[..., None], find: Callable[[], Callable[..., Any]], parameters: Parameters
) -> Callable[..., Any]:
    """A function of ``parameters`` that calls ``check`` with those that it names, and returns what the function that
    ``find`` returns makes of all of them.
    """
    source = f"lambda {_declared(parameters)}: check({_passed(check, parameters)}) or find()({', '.join(parameters)})"
    return eval(source, {"check": check, "find": find})


def _declared(parameters: Parameters) -> str:
    """The parameters as source."""
    return ", ".join(
        name if parameter.default is inspect.Parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in parameters.items()
    )


def _passed(function: Callable[..., Any], parameters: Parameters) -> str:
    """The arguments of a call of ``function`` as source."""
    signature = inspect.signature(function).parameters
    own = {n: p for n, p in signature.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    others = [n for n, p in own.items() if n not in parameters and p.default is inspect.Parameter.empty]
    if others:
        where = f"{function.__module__}.{function.__qualname__}"
        raise TypeError(f"Expected '{where}' to take arguments of its op, {', '.join(parameters)} (got {others})")
    first = takewhile(lambda p: p.name in parameters and p.kind is not inspect.Parameter.KEYWORD_ONLY, own.values())
    by_place = [parameter.name for parameter in first]
    by_name = [name for name in own if name in parameters and name not in by_place]
    if len(own) < len(signature):
        by_name += [name for name in parameters if name not in own]
    return ", ".join(by_place + [f"{name}={name}" for name in by_name])
