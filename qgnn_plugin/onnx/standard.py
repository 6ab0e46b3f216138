"""What operations become in a program that is spelled out: those of packed models and what exporters do not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.backend import onnx_forms

__all__ = ["standard_forms"]


def standard_forms() -> dict[Any, Callable[..., Any]]:
    """Functions of standard operations by overload, as :meth:`torch.export.ExportedProgram.run_decompositions` takes
    them.
    """
    ops = {**onnx_forms(), "inverse_root": inverse_root}
    packets = {name: getattr(torch.ops.qgnn, name) for name in ops}
    ours = {getattr(packets[name], overload): ops[name] for name in ops for overload in packets[name].overloads()}
    return {**ours, torch.ops.aten.amax.default: amax}


def inverse_root(degree: Tensor) -> Tensor:
    return torch.where(degree == 0, 0.0, 1 / torch.sqrt(degree))


def amax(x: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    """The largest of all values: exporters know that of some dimensions alone."""
    return NotImplemented if len(dim) or keepdim else torch.max(x.reshape(-1), 0).values
