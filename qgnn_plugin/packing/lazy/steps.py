"""What follows a kernel row by row: activations, norms and numbers that are noted on results not computed yet.

A step takes floats that nobody else holds, may write over them, and gives what the operation of torch gives, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...kernels.quantize_pack import pack_mapped, quantize_pack

__all__ = ["IN_PLACE", "Affine", "Step", "as_now", "batch_norm", "finished", "step_of", "with_epilogue"]

Step = Callable[[Tensor], Tensor]
Rows = Any  # floats or packed words of a matrix; or words and the multipliers of their rows, a pair

aten = torch.ops.aten

# Operations that treat every number for itself, by their in-place form.
ROW_WISE = {
    getattr(aten, name).default: getattr(aten, f"{name}_").default
    for name in (
        "relu", "elu", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "mish",
        "celu",
    )
}  # fmt: skip
# The same with a number.
BY_NUMBER = {
    aten.mul.Tensor: aten.mul_.Tensor, aten.div.Tensor: aten.div_.Tensor, aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
}  # fmt: skip
IN_PLACE = {in_place: func for func, in_place in (ROW_WISE | BY_NUMBER).items()}
OF_ROWS = (aten._softmax.default, aten._log_softmax.default)  # which treat every row for itself


def step_of(func: Any, args: Any, kwargs: Any) -> Step | None:
    """``func(y, *args, **kwargs)`` as a step; :obj:`None` where it is none."""
    if func is aten.relu.default:
        return torch.relu
    if func in ROW_WISE:
        in_place = ROW_WISE[func]
    elif func in BY_NUMBER and len(args) == 1 and type(args[0]) in (int, float) and not kwargs:
        in_place = BY_NUMBER[func]
    elif func in OF_ROWS and args[0] in (1, -1):
        return lambda y: func(y, *args, **kwargs)
    elif func is aten.softplus.default:
        return lambda y: aten.softplus.out(y, *args, **kwargs, out=y)
    else:
        return None
    return lambda y: in_place(y, *args, **kwargs)


class Affine:
    """``y * factor + term`` by column, two roundings: a batch norm with its statistics fixed."""

    def __init__(self, factor: Tensor, term: Tensor) -> None:
        self.factor, self.term = factor, term

    def __call__(self, y: Tensor) -> Tensor:
        return y.mul_(self.factor).add_(self.term)


def as_now(*values: Any) -> tuple[Any, ...]:
    """Copies of the tensors among ``values``: a model may write to its own before a result is computed."""
    return tuple(value.detach().clone() if isinstance(value, Tensor) else value for value in values)


def batch_norm(weight: Any, bias: Any, mean: Tensor, var: Tensor, *rest: Any) -> Step:
    """The batch norm of ``torch.native_batch_norm`` outside of training."""

    def norm(y: Tensor, bias: Any, mean: Tensor) -> Tensor:
        return aten.native_batch_norm.default(y, weight, bias, mean, var, *rest)[0]

    if not (mean.is_cpu and _is_affine()) or mean.dtype is not torch.float32:
        weight, bias, mean, var = as_now(weight, bias, mean, var)
        return lambda y: norm(y, bias, mean)
    nothing = mean.new_zeros((1, mean.numel()))
    return Affine(norm(nothing + 1, None, nothing[0])[0], norm(nothing, bias, mean)[0])


@cache
def _is_affine() -> bool:
    """Whether torch's kernel multiplies by column, rounds, and adds: others subtract the mean first, or round once."""
    own = torch.Generator().manual_seed(0)
    x, (weight, bias, mean, var) = torch.randn(67, 53, generator=own), torch.rand(4, 53, generator=own) + 0.1
    options = (weight, bias, mean, var, False, 0.1, 1e-5)
    nothing = torch.zeros(1, 53)
    factor = aten.native_batch_norm.default(nothing + 1, weight, None, nothing[0], *options[3:])[0]
    term = aten.native_batch_norm.default(nothing, *options)[0]
    return torch.equal(x * factor + term, aten.native_batch_norm.default(x, *options)[0])


def with_epilogue(
    y: Tensor,
    *,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    out_unit: Tensor | None = None,
    affine: Affine | None = None,
) -> Rows:
    """What the epilogue of a kernel does, to floats: an affine step by column, ReLU, in place, and packed codes where a
    range is given.
    """
    if out_bits == 0:
        y = y if affine is None else affine(y)
        return y.relu_() if relu else y
    assert out_scale is not None
    assert out_offset is not None
    if affine is not None or relu:
        factor, term = (None, None) if affine is None else (affine.factor, affine.term)
        return pack_mapped(y, out_scale, out_offset, out_bits, out_unit, factor, term, relu)
    return quantize_pack(y, out_scale, out_offset, out_bits, out_unit, is_checked=True)


def finished(y: Tensor, steps: tuple[Step, ...], **out: Any) -> Rows:
    """``steps`` of floats, and their epilogue; an affine step and ReLU before codes are part of the pass that packs."""
    relu = bool(steps) and steps[-1] is torch.relu and not out.get("relu")
    if relu:
        steps, out = steps[:-1], out | {"relu": True}
    affine = steps[-1] if steps and isinstance(steps[-1], Affine) else None
    for step in steps if affine is None else steps[:-1]:
        y = y.relu_() if step is torch.relu else step(y)
    return with_epilogue(y, affine=affine, **out)
