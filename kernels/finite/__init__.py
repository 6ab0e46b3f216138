"""Whether all values of a tensor are finite: asked of whatever enters a packed model."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..backend import has_numba

__all__ = ["is_finite"]

FEW = 1 << 20  # values: more are shared among torch's threads


@cache
def _compiled() -> Any:
    return importlib.import_module(f"{__package__}.cpu").all_finite if has_numba() else None


def is_finite(x: Tensor) -> bool:
    """Whether a strided tensor of floats holds neither NaN nor infinity; waits for its device."""
    few = x.numel() <= FEW and x.dtype is torch.float32 and x.is_cpu and type(x) is Tensor and x.is_contiguous()
    if few and torch._C._len_torch_dispatch_stack() == 0 and (compiled := _compiled()) is not None:
        return compiled(x.data_ptr(), x.numel())
    # One sum decides in all but the overflowing case.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
