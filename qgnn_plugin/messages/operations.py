"""Operations of a record number by number, and what does them in a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .shadow import NotTraceable

__all__ = ["OPERATIONS", "Handle"]

aten = torch.ops.aten
Dims = tuple[int, ...]


@dataclass(frozen=True)
class Handle:
    """A node of the program, and the dimensions after the first that the record gives it."""

    index: int
    dims: Dims


Do = Callable[..., Handle]
Arg = Callable[..., Any]


def _plain(op: str, count: int) -> Callable[[Do, Arg, fx.Node], Handle]:
    return lambda do, arg, node: do(op, *(arg(k) for k in range(count)))


def _scaled(op: str) -> Callable[[Do, Arg, fx.Node], Handle]:
    def make(do: Do, arg: Arg, node: fx.Node) -> Handle:
        alpha: Any = node.kwargs.get("alpha", 1)
        second = arg(1)
        if alpha != 1:
            second = do("mul", second, float(alpha)) if isinstance(second, Handle) else second * float(alpha)
        return do(op, arg(0), second)

    return make


def _power(do: Do, arg: Arg, node: fx.Node) -> Handle:
    x, exponent = arg(0), node.args[1]
    if exponent == 1:
        return x
    if exponent == 2:
        return do("mul", x, x)
    if exponent == 3:
        return do("mul", do("mul", x, x), x)
    if exponent == 0.5:
        return do("sqrt", x)
    if exponent == -0.5:
        return do("div", 1.0, do("sqrt", x))
    if exponent == -1:
        return do("div", 1.0, x)
    raise NotTraceable(f"powers of {exponent}")


def _clamp(do: Do, arg: Arg, node: fx.Node) -> Handle:
    x, low, high = arg(0), arg(1), arg(2)
    low = node.kwargs.get("min") if low is None else low
    high = node.kwargs.get("max") if high is None else high
    # NaN stays: kernels give the second where either is.
    x = x if low is None else do("maximum", low, x)
    return x if high is None else do("minimum", high, x)


def _hardtanh(do: Do, arg: Arg, node: fx.Node) -> Handle:
    return do("minimum", float(arg(2, 1)), do("maximum", float(arg(1, -1)), arg(0)))


def _elu(do: Do, arg: Arg, node: fx.Node) -> Handle:
    alpha, scale, inner = (float(arg(k, 1.0)) for k in (1, 2, 3))
    x = arg(0)
    below = x if inner == 1 else do("mul", x, inner)
    below = do("expm1", below)
    below = below if alpha == 1 else do("mul", below, alpha)
    y = do("where", do("greater", x, 0.0), x, below)
    return y if scale == 1 else do("mul", y, scale)


def _softplus(do: Do, arg: Arg, node: fx.Node) -> Handle:
    if (arg(1, 1), arg(2, 20)) != (1, 20):
        raise NotTraceable("a softplus of another slope")
    return do("softplus", arg(0))


def _comparison(op: str, swapped: bool) -> Callable[[Do, Arg, fx.Node], Handle]:
    return lambda do, arg, node: do(op, arg(1), arg(0)) if swapped else do(op, arg(0), arg(1))


OPERATIONS: dict[Any, Callable[[Do, Arg, fx.Node], Handle]] = {
    aten.add.Tensor: _scaled("add"),
    aten.add.Scalar: _scaled("add"),
    aten.sub.Tensor: _scaled("sub"),
    aten.sub.Scalar: _scaled("sub"),
    aten.rsub.Scalar: lambda do, arg, node: do("sub", arg(1), arg(0)),
    aten.mul.Tensor: _plain("mul", 2),
    aten.mul.Scalar: _plain("mul", 2),
    aten.div.Tensor: _plain("div", 2),
    aten.div.Scalar: _plain("div", 2),
    aten.maximum.default: _plain("maximum", 2),
    aten.minimum.default: _plain("minimum", 2),
    aten.neg.default: _plain("neg", 1),
    aten.abs.default: _plain("abs", 1),
    aten.relu.default: _plain("relu", 1),
    aten.exp.default: _plain("exp", 1),
    aten.expm1.default: _plain("expm1", 1),
    aten.log.default: _plain("log", 1),
    aten.log1p.default: _plain("log1p", 1),
    aten.sqrt.default: _plain("sqrt", 1),
    aten.rsqrt.default: lambda do, arg, node: do("div", 1.0, do("sqrt", arg(0))),
    aten.reciprocal.default: lambda do, arg, node: do("div", 1.0, arg(0)),
    aten.square.default: lambda do, arg, node: do("mul", arg(0), arg(0)),
    aten.sigmoid.default: _plain("sigmoid", 1),
    aten.tanh.default: _plain("tanh", 1),
    aten.silu.default: lambda do, arg, node: do("mul", arg(0), do("sigmoid", arg(0))),
    aten.softplus.default: _softplus,
    aten.elu.default: _elu,
    aten.leaky_relu.default: lambda do, arg, node: do("leaky_relu", arg(0), value=float(arg(1, 0.01))),
    aten.pow.Tensor_Scalar: _power,
    aten.clamp.default: _clamp,
    aten.hardtanh.default: _hardtanh,
    aten.clamp_min.default: lambda do, arg, node: do("maximum", arg(1), arg(0)),
    aten.gt.Scalar: _comparison("greater", False),
    aten.gt.Tensor: _comparison("greater", False),
    aten.ge.Scalar: _comparison("greater_equal", False),
    aten.ge.Tensor: _comparison("greater_equal", False),
    aten.lt.Scalar: _comparison("greater", True),
    aten.lt.Tensor: _comparison("greater", True),
    aten.le.Scalar: _comparison("greater_equal", True),
    aten.le.Tensor: _comparison("greater_equal", True),
    aten.where.self: _plain("where", 3),
    aten.masked_fill.Scalar: lambda do, arg, node: do("where", arg(1), float(arg(2)), arg(0)),
}
