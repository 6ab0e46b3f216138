"""Checks of the values of a configuration, and what their errors say."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

__all__ = ["check_levels", "check_number", "check_one_of", "did_you_mean", "known_fields"]


def check_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise ValueError(f"Expected '{name}' to be one of {', '.join(map(repr, allowed))} (got {value!r}){hint}")


def check_number(name: str, value: Any, *, positive: bool | None) -> None:
    """Raise unless ``value`` is a finite number: above zero, at least zero, or, with :obj:`None`, any."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (positive is not None and value < 0) or (positive and value == 0):
        bound = "" if positive is None else " > 0" if positive else " >= 0"
        raise ValueError(f"Expected {name!r}{bound}, a finite number (got {value!r})")


def check_levels(name: str, levels: str, bits: int) -> None:
    """Raise where ``levels`` are symmetric around zero as a level, and there are but two of them."""
    if bits == 1 and levels == "symmetric":
        raise ValueError(
            f"Expected '{name}' other than 'symmetric' at 1 bit, whose two levels cannot lie around zero and hold it "
            f"(got 'symmetric'); use 'half' for -1/2 and 1/2 steps, or 'affine'"
        )


def did_you_mean(value: str, allowed: tuple[Any, ...] | list[str]) -> str:
    """The end of an error about ``value`` that names the closest of ``allowed``, empty where none is close."""
    close = difflib.get_close_matches(value, [a for a in allowed if isinstance(a, str)], n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def known_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` as a dictionary of fields of the dataclass ``cls``.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If it names a field that ``cls`` has not.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"Expected the fields of a {cls.__name__} as a mapping (got {type(data).__name__})")
    known = [f.name for f in fields(cls)]
    for name in data:
        if name not in known:
            raise ValueError(f"Unknown {cls.__name__} field {name!r}{did_you_mean(name, known)}")
    return dict(data)
