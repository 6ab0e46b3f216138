"""Functions that name some of an op's arguments."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from qgnn_plugin.kernels.signature import checked, selecting


def op(a: int, b: int, c: str = "x", d: float | None = None) -> None: ...


PARAMETERS = inspect.signature(op).parameters


def test_what_takes_everything_is_called_itself() -> None:
    def whole(a: int, b: int, c: str = "x", d: float | None = None, extra: int = 0) -> None: ...

    assert selecting(whole, PARAMETERS) is whole


def _by_other_order(d: Any, a: Any) -> Any:
    return {"d": d, "a": a}


def _with_another_between(a: Any, extra: Any = "kept", c: Any = "own", *, d: Any) -> Any:
    return {"a": a, "c": c, "d": d} if extra == "kept" else None


def _without_defaults(a: Any, b: Any, c: Any, d: Any) -> Any:
    return {"a": a, "b": b, "c": c, "d": d}


def _handing_on(d: Any, b: Any = "own", **rest: Any) -> Any:
    assert set(rest) == {"a", "c"}
    return _without_defaults(d=d, b=b, **rest)


@pytest.mark.parametrize("function", [_by_other_order, _with_another_between, _without_defaults, _handing_on])
def test_every_argument_comes_under_its_name(function: Callable[..., Any]) -> None:
    call = selecting(function, PARAMETERS)
    for given, expected in (
        (call(1, 2), {"a": 1, "b": 2, "c": "x", "d": None}),
        (call(1, 2, "y", 0.5), {"a": 1, "b": 2, "c": "y", "d": 0.5}),
        (call(b=2, a=1, d=0.5), {"a": 1, "b": 2, "c": "x", "d": 0.5}),
    ):
        assert given == {name: expected[name] for name in given}
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'"):
        call(1)


def test_what_the_op_has_not_is_refused() -> None:
    def wrong(a: int, edges: int) -> None: ...

    with pytest.raises(TypeError, match=r"arguments of its op, a, b, c, d \(got \['edges'\]\)"):
        selecting(wrong, PARAMETERS)


def test_checks_come_first() -> None:
    seen: list[Any] = []

    def check(b: int, d: float | None) -> None:
        seen.append((b, d))
        if b < 0:
            raise ValueError("Expected b")

    run = checked(check, lambda: lambda a, b, c, d: (a, b, c, d), PARAMETERS)
    assert run(1, 2) == (1, 2, "x", None)
    with pytest.raises(ValueError, match="Expected b"):
        run(1, -1, d=2.0)
    assert seen == [(2, None), (-1, 2.0)]
