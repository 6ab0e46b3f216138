"""Float sparse-dense products over a plan, for training: deterministic, differentiable, O(N F + E) memory.

.. math::
    y_i = \\sum_{e = (j, i)} w_e x_j
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import float_sum as _ops  # noqa: F401 (registers them)
from .autograd import one_by_one, with_signature
from .checks import check_plan, check_tensor
from .plan import GraphPlan

__all__ = ["edge_products", "segment_max", "segment_sum", "spmm"]


def _forward(plan: GraphPlan, x: Tensor, weight: Tensor | None, edge: Tensor | None) -> Tensor:
    """``x`` is [num_src, H, C]; ``weight`` is [E, H], read at ``edge`` (CSR position -> row of ``weight``)."""
    rows = x.reshape(x.size(0), x.size(1) * x.size(2))
    out = torch.ops.qgnn.float_sum(rows, plan.rowptr, plan.col, weight=weight, edge=edge)
    return out.view(plan.num_dst, *x.shape[1:])


def _differentiable() -> bool:
    """Whether a backward pass is to be differentiated in turn."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


@with_signature
@one_by_one
class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(plan: GraphPlan, x: Tensor, weight: Tensor | None) -> Tensor:
        return _forward(plan, x, weight, None if weight is None else plan.positions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan, x, weight = inputs
        needs_x = weight is not None and ctx.needs_input_grad[2]
        ctx.save_for_backward(x if needs_x else None, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        plan: GraphPlan = ctx.plan
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1] and _differentiable():
            grad_x = _Spmm.apply(plan.transpose, grad, None if weight is None else plan.transpose.sort(weight))
        elif ctx.needs_input_grad[1]:
            edge = None if weight is None else plan.transpose.edge_ids
            grad_x = _forward(plan.transpose, grad, weight, edge)
        if weight is not None and ctx.needs_input_grad[2]:
            grad_weight = _EdgeProducts.apply(plan, grad, x) if _differentiable() else edge_products(plan, grad, x)
        return None, grad_x, grad_weight


@with_signature
@one_by_one
class _EdgeProducts(torch.autograd.Function):
    """:func:`edge_products`, differentiable: its gradients are sums with the gradient for weights."""

    @staticmethod
    def forward(plan: GraphPlan, a: Tensor, b: Tensor) -> Tensor:
        return edge_products(plan, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan, *factors = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        plan: GraphPlan = ctx.plan
        a, b = ctx.saved_tensors
        _, needs_a, needs_b = ctx.needs_input_grad
        grad_a = _Spmm.apply(plan, b, grad) if needs_a else None
        grad_b = _Spmm.apply(plan.transpose, a, plan.transpose.sort(grad)) if needs_b else None
        return None, grad_a, grad_b


def edge_products(plan: GraphPlan, a: Tensor, b: Tensor) -> Tensor:
    """Inner products ``<a_i, b_j>`` per edge and head, ``[E, H]`` in CSR order; no gradient.

    Args:
        plan: The graph.
        a: ``[num_dst, H, C]``.
        b: ``[num_src, H, C]``.
    """
    check_plan(plan, b)
    check_tensor(a, "a")
    if a.dim() != 3 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"Expected 'a' and 'b' of shape [*, H, C] (got {list(a.shape)} and {list(b.shape)})")
    a2, b2 = (v.reshape(v.size(0), v.size(1) * v.size(2)) for v in (a, b))
    return torch.ops.qgnn.edge_dots(a2, b2, plan.rowptr, plan.col, a.size(1))


def spmm(plan: GraphPlan, x: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Sum the rows of ``x`` over the edges of ``plan``.

    Args:
        plan: The graph.
        x: ``[num_src, F]`` or ``[num_src, H, C]``, float32 or float64.
        weight: ``[E]`` or ``[E, H]`` in CSR order (see :meth:`GraphPlan.sort`), or :obj:`None` for ones.

    Returns:
        ``[num_dst, F]`` or ``[num_dst, H, C]``; differentiable in ``x`` and ``weight``.
    """
    check_plan(plan, x)
    if x.dim() not in (2, 3):
        raise ValueError(f"Expected 'x' of shape [num_src, F] or [num_src, H, C] (got {list(x.shape)})")
    flat = x.dim() == 2
    x3 = x.unsqueeze(1) if flat else x
    if weight is not None:
        check_tensor(weight, "weight")
        if not weight.is_floating_point():
            raise TypeError(f"Expected 'weight' to be a float tensor (got {weight.dtype})")
        weight = (weight.unsqueeze(1) if weight.dim() == 1 else weight).to(x.dtype)
        if weight.shape != (plan.num_edges, x3.size(1)):
            raise ValueError(
                f"Expected edge weights of shape [{plan.num_edges}, {x3.size(1)}] (got {list(weight.shape)})"
            )
    out = _Spmm.apply(plan, x3, weight)
    return out.squeeze(1) if flat else out


def _check_per_edge(plan: GraphPlan, per_edge: Tensor) -> None:
    if not isinstance(plan, GraphPlan):
        raise TypeError(f"Expected 'plan' to be a GraphPlan (got {type(plan).__name__})")
    if not isinstance(per_edge, Tensor) or per_edge.dim() == 0 or per_edge.size(0) != plan.num_edges:
        found = list(per_edge.shape) if isinstance(per_edge, Tensor) else type(per_edge).__name__
        raise ValueError(f"Expected one value per edge, {plan.num_edges} (got {found})")


@with_signature
@one_by_one
class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(plan: GraphPlan, per_edge: Tensor) -> Tensor:
        # The edges of a destination stand together: a sum over the neighbours that each edge is its own source of.
        rows = per_edge.reshape(plan.num_edges, math.prod(per_edge.shape[1:]))
        out = torch.ops.qgnn.float_sum(rows, plan.rowptr, plan.own_sources)
        return out.view(plan.num_dst, *per_edge.shape[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[ctx.plan.dst]


def segment_sum(plan: GraphPlan, per_edge: Tensor) -> Tensor:
    """Sum per-edge values ``[E, ...]`` (CSR order) into their destinations, ``[num_dst, ...]``."""
    _check_per_edge(plan, per_edge)
    return _SegmentSum.apply(plan, per_edge)


def segment_max(plan: GraphPlan, per_edge: Tensor, empty: float = 0.0) -> Tensor:
    """Largest per-edge value ``[E, H]`` (CSR order) of each destination, ``empty`` without edges; no gradient."""
    _check_per_edge(plan, per_edge)
    rows = per_edge.detach().reshape(plan.num_edges, math.prod(per_edge.shape[1:]))
    return torch.ops.qgnn.segment_largest(rows, plan.rowptr, empty).view(plan.num_dst, *per_edge.shape[1:])
