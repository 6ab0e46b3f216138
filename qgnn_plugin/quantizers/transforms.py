"""What transforms of functions and forward-mode derivatives bring to a layer: codes or kernels do not have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["FORWARD", "FUNCTIONAL", "VMAP", "is_vmapping", "transform_of"]

VMAP, FORWARD, FUNCTIONAL = "torch.func.vmap", "forward-mode derivative", "torch.func.functionalize"


def transform_of(values: Iterable[Any]) -> str | None:
    """The transform that one of ``values``, also in tuples and lists, is of; :obj:`None` where there is none."""
    if torch.compiler.is_compiling():
        return None
    differentiates = forward_ad._current_level >= 0  # torch.func.jvp enters a level as well
    if not differentiates and torch._C._functorch.peek_interpreter_stack() is None:
        return None
    for value in values:
        if isinstance(value, (tuple, list)):
            if (found := transform_of(value)) is not None:
                return found
        elif isinstance(value, Tensor):
            if _is_batched(value):
                return VMAP
            if torch._is_functional_tensor(value):
                return FUNCTIONAL
            if differentiates and forward_ad.unpack_dual(value).tangent is not None:
                return FORWARD
    return None


def is_vmapping() -> bool:
    """Whether :func:`torch.func.vmap` runs what is called here, of whatever it makes batches."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def _is_batched(value: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            return True
        value = torch._C._functorch.get_unwrapped(value)
    return False
