"""What the ops check in every call: dtypes and shapes, by comparing attributes; index arrays: see :mod:`.indices`."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import GraphPlan

__all__ = ["check_float", "check_matrix", "check_plan", "check_tensor"]


def check_float(value: Tensor | None, name: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Raise unless ``value`` is :obj:`None`, or a tensor of ``dtype`` and one of ``shapes``."""
    if value is None:
        return
    found = getattr(value, "dtype", type(value))
    if found is not dtype:
        raise TypeError(f"Expected '{name}' to be a {_name(dtype)} tensor (got {_name(found)})")
    if value.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"Expected '{name}' of shape {expected} (got {list(value.shape)})")


def check_matrix(value: Tensor, name: str, *dtypes: torch.dtype) -> None:
    """Raise unless ``value`` is a matrix of one of ``dtypes``, by default float32."""
    dtypes = dtypes or (torch.float32,)
    if value.dim() != 2 or value.dtype not in dtypes:
        expected = " or ".join(_name(dtype) for dtype in dtypes)
        error = TypeError if value.dtype not in dtypes else ValueError
        raise error(f"Expected '{name}' to be a {expected} matrix (got {_name(value.dtype)}, {list(value.shape)})")


def check_tensor(value: Tensor, name: str) -> None:
    """Raise unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected '{name}' to be a tensor (got {type(value).__name__})")


def _name(kind: torch.dtype | type) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("torch.")


def check_plan(plan: GraphPlan, rows: Tensor, what: str = "row") -> None:
    """Raise unless ``plan`` is a plan, and ``rows`` a tensor with one ``what`` for each of its sources."""
    if not isinstance(plan, GraphPlan):
        raise TypeError(f"Expected 'plan' to be a GraphPlan (got {type(plan).__name__})")
    if not isinstance(rows, Tensor) or rows.dim() == 0:
        raise TypeError(f"Expected a tensor of one {what} per source node (got {type(rows).__name__})")
    if rows.size(0) != plan.num_src:
        raise ValueError(f"Expected one {what} per source node, {plan.num_src} (got {rows.size(0)})")
