"""Float sparse-dense products over a plan, for training: deterministic, differentiable, O(N F + E) memory.

.. math::
    y_i = \\sum_{e = (j, i)} w_e x_j
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import backend_for
from .cpu.float_sum import edge_dots, float_sum, float_sum_weighted, segment_largest
from .plan import GraphPlan

__all__ = ["edge_products", "segment_max", "segment_sum", "spmm"]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _rows(tensor: Tensor) -> np.ndarray:
    """``tensor`` [R, ...] as a matrix of R rows."""
    return _numpy(tensor).reshape(tensor.size(0), -1)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and not _on_triton(tensor)


def _on_triton(tensor: Tensor) -> bool:
    """Whether the requested backend is Triton's, on the device or interpreted."""
    return tensor.dtype == torch.float32 and backend_for(tensor.device) in ("triton", "interpret")


def _edge_ids(plan: GraphPlan) -> Tensor:
    ids = plan.__dict__.get("_edge_ids")
    if ids is None:
        ids = plan.perm if plan.perm is not None else torch.arange(plan.num_edges, device=plan.device)
        plan.__dict__["_edge_ids"] = ids
    return ids


def _forward(plan: GraphPlan, x: Tensor, weight: Tensor | None, edge: Tensor | None) -> Tensor:
    """``x`` is [num_src, H, C]; ``weight`` is [E, H], read at ``edge`` (CSR position -> row of ``weight``)."""
    out = x.new_empty((plan.num_dst, *x.shape[1:]))
    if out.numel() == 0:
        return out
    if _on_triton(x):
        from .triton.float_sum import float_sum as triton_sum

        return triton_sum(x.flatten(1), plan.rowptr, plan.col, weight=weight, edge=edge).view(out.shape)
    if not _on_cpu(x):
        gathered = x[plan.col.long()]
        if weight is not None:
            gathered = gathered * weight[edge].unsqueeze(-1)
        return torch.segment_reduce(gathered, "sum", offsets=plan.rowptr, axis=0, initial=0)
    rowptr, col = plan.rowptr.numpy(), plan.col.numpy()
    if weight is None:
        float_sum(rowptr, col, _rows(x), _rows(out))
    else:
        assert edge is not None
        float_sum_weighted(rowptr, col, edge.numpy(), _numpy(weight), _numpy(x), out.numpy())
    return out


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: GraphPlan, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.plan = plan
        needs_x = weight is not None and ctx.needs_input_grad[2]
        ctx.save_for_backward(x if needs_x else None, weight)
        edge = None if weight is None else _identity_edges(plan)
        return _forward(plan, x, weight, edge)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        plan: GraphPlan = ctx.plan
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            edge = None if weight is None else _edge_ids(plan.transpose)
            grad_x = _forward(plan.transpose, grad, weight, edge)
        if weight is not None and ctx.needs_input_grad[2]:
            grad_weight = edge_products(plan, grad, x)
        return None, grad_x, grad_weight


def edge_products(plan: GraphPlan, a: Tensor, b: Tensor) -> Tensor:
    """Inner products ``<a_i, b_j>`` per edge and head, ``[E, H]`` in CSR order.

    Args:
        plan: The graph.
        a: ``[num_dst, H, C]``.
        b: ``[num_src, H, C]``.
    """
    if _on_triton(a):
        from .triton.float_sum import edge_dots as triton_dots

        return triton_dots(a.flatten(1), b.flatten(1), plan.rowptr, plan.col, a.size(1))
    out = a.new_empty((plan.num_edges, a.size(1)))
    if _on_cpu(a) and out.numel():
        edge_dots(plan.rowptr.numpy(), plan.col.numpy(), _numpy(a), _numpy(b), out.numpy())
    elif out.numel():
        out = (a[plan.dst] * b[plan.col.long()]).sum(-1)
    return out


def _identity_edges(plan: GraphPlan) -> Tensor:
    ids = plan.__dict__.get("_identity_edges")
    if ids is None:
        ids = plan.__dict__["_identity_edges"] = torch.arange(plan.num_edges, device=plan.device)
    return ids


def spmm(plan: GraphPlan, x: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Sum the rows of ``x`` over the edges of ``plan``.

    Args:
        plan: The graph.
        x: ``[num_src, F]`` or ``[num_src, H, C]``, float32 or float64.
        weight: ``[E]`` or ``[E, H]`` in CSR order (see :meth:`GraphPlan.sort`), or :obj:`None` for ones.

    Returns:
        ``[num_dst, F]`` or ``[num_dst, H, C]``; differentiable in ``x`` and ``weight``.
    """
    if x.size(0) != plan.num_src:
        raise ValueError(f"Expected one row per source node, {plan.num_src} (got {x.size(0)})")
    flat = x.dim() == 2
    x3 = x.unsqueeze(1) if flat else x
    if weight is not None:
        weight = weight.unsqueeze(1) if weight.dim() == 1 else weight
        if weight.shape != (plan.num_edges, x3.size(1)):
            raise ValueError(
                f"Expected edge weights of shape [{plan.num_edges}, {x3.size(1)}] (got {list(weight.shape)})"
            )
    out = _Spmm.apply(plan, x3, weight)
    return out.squeeze(1) if flat else out


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: GraphPlan, per_edge: Tensor) -> Tensor:
        ctx.plan = plan
        out = per_edge.new_zeros((plan.num_dst, *per_edge.shape[1:]))
        if out.numel() and per_edge.numel() and _on_cpu(per_edge):
            # The edges of a destination stand together: a sum over the neighbours that each edge is its own source of.
            source = _identity_edges(plan).to(torch.int32)
            float_sum(plan.rowptr.numpy(), source.numpy(), _rows(per_edge), _rows(out))
            return out
        if out.numel() and per_edge.numel() and _on_triton(per_edge):
            from .triton.float_sum import float_sum as triton_sum

            edges = _identity_edges(plan).to(torch.int32)
            return triton_sum(per_edge.reshape(per_edge.size(0), -1), plan.rowptr, edges).view(out.shape)
        return out.index_add_(0, plan.dst, per_edge)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[ctx.plan.dst]


def segment_sum(plan: GraphPlan, per_edge: Tensor) -> Tensor:
    """Sum per-edge values ``[E, ...]`` (CSR order) into their destinations, ``[num_dst, ...]``."""
    return _SegmentSum.apply(plan, per_edge)


def segment_max(plan: GraphPlan, per_edge: Tensor, empty: float = 0.0) -> Tensor:
    """Largest per-edge value ``[E, H]`` (CSR order) of each destination, ``empty`` without edges; no gradient."""
    if per_edge.numel() and _on_cpu(per_edge):
        out = per_edge.new_empty((plan.num_dst, *per_edge.shape[1:]))
        segment_largest(plan.rowptr.numpy(), _rows(per_edge), empty, _rows(out))
        return out
    index = plan.dst.view(-1, *([1] * (per_edge.dim() - 1))).expand_as(per_edge)
    out = per_edge.new_full((plan.num_dst, *per_edge.shape[1:]), empty)
    return out.scatter_reduce_(0, index, per_edge.detach(), "amax", include_self=False)
