"""What autograd functions share."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

__all__ = ["one_by_one", "with_signature"]

Function = type[torch.autograd.Function]


def with_signature(function: Function) -> Function:
    """Keep the signature of ``forward`` where :mod:`inspect` looks first.

    Of a function with ``setup_context`` torch asks for it in every call: to find it anew takes as long as a sum over a
    small graph.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def one_by_one(function: Function) -> Function:
    """Let ``vmap`` run a function for each sample: :func:`torch.func.jacrev` has it map over backward passes."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        def sample(index: int) -> Tensor:
            taken = (a if dim is None else a.select(dim, index) for a, dim in zip(args, in_dims, strict=True))
            return function.apply(*taken)

        return torch.stack([sample(index) for index in range(info.batch_size)]), 0

    function.vmap = staticmethod(vmap)  # type: ignore[method-assign]
    return function
