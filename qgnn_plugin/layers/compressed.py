r"""Products and sums of :func:`qgnn_plugin.compressed_activations`: their backward passes read packed codes.

Codes from :func:`~qgnn_plugin.quantizers.compressed.quantize` have the gradient of values.  A node whose result can be
computed again from what it keeps has an attribute ``again``, a function of the node; other nodes ask for it by
:func:`~qgnn_plugin.quantizers.compressed.recipe` instead of keeping that result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.plan import GraphPlan
from ..kernels.spmm import edge_products, segment_sum, spmm
from ..quantizers.autocast import backward_without_autocast
from ..quantizers.compressed import Recipe, compressing, recipe
from ..quantizers.first_order import first_order
from ..quantizers.packed import PackedTensor

__all__ = [
    "aggregate_sum",
    "head_products",
    "linear",
    "multiple",
    "pair_logits",
    "row_scaled",
    "weight_values",
    "weighted_mean",
]


class _RowScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, again: Recipe) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.again = lambda node: again() * node.saved_tensors[0]
        return x * factor

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None, None


def row_scaled(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor`` with a constant ``[N, 1]``; a quantizer can compute it again where it can do so with ``x``."""
    again = recipe(x) if compressing() else None
    return x * factor if again is None else _RowScaled.apply(x, factor, again)


class _HeadProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, again: Recipe) -> Tensor:
        ctx.save_for_backward(vector)
        ctx.recipe = again
        return (x * vector).sum(-1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (vector,) = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        grad_vector = (grad * ctx.recipe()).sum_to_size(vector.shape) if ctx.needs_input_grad[1] else None
        return grad * vector if ctx.needs_input_grad[0] else None, grad_vector, None


def head_products(x: Tensor, vector: Tensor) -> Tensor:
    """``<x_nh, a_h>`` ``[N, H]`` of ``x`` ``[N, H, C]`` and ``vector`` ``[1, H, C]``, keeping nothing it can avoid."""
    again = recipe(x) if compressing() else None
    return (x * vector).sum(-1) if again is None else _HeadProducts.apply(x, vector, again)


class _Multiple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, factor: Tensor, packed: PackedTensor) -> Tensor:
        ctx.layout = packed.layout
        ctx.save_for_backward(factor, *(packed.tensors if ctx.needs_input_grad[1] else ()))
        return (codes * packed.scale + packed.lower) * factor

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, *rest = ctx.saved_tensors
        grad_factor = None
        if ctx.needs_input_grad[1]:
            grad_factor = (grad * PackedTensor(*rest, *ctx.layout).dequantize()).sum_to_size(factor.shape)
        return grad * factor, grad_factor, None


def multiple(codes: Tensor, factor: Tensor, packed: PackedTensor) -> Tensor:
    """``t (c s + l)`` of codes from ``quantize``, which are also ``packed``, and a factor that may be trained."""
    return _Multiple.apply(codes, factor, packed)


class _WeightValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, lower: Tensor, packed: PackedTensor) -> Tensor:
        ctx.save_for_backward(*packed.tensors)
        ctx.layout, ctx.lower_shape = packed.layout, lower.shape
        return codes * scale + lower

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed = PackedTensor(*ctx.saved_tensors, *ctx.layout)
        grad_scale = (grad * packed.codes()).sum_to_size(packed.scale.shape) if ctx.needs_input_grad[1] else None
        grad_lower = grad.sum_to_size(ctx.lower_shape) if ctx.needs_input_grad[2] else None
        return grad * packed.scale, grad_scale, grad_lower, None


def weight_values(codes: Tensor, scale: Tensor, lower: Tensor, packed: PackedTensor) -> Tensor:
    """``c s + l`` of codes whose gradient is their own, as those of weights; keeps them packed."""
    return _WeightValues.apply(codes, scale, lower, packed)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, weight: Tensor, x: PackedTensor, w: PackedTensor, product: Recipe,
        again: Callable[[PackedTensor, PackedTensor], Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(*x.tensors, *w.tensors)
        ctx.layouts = x.layout, w.layout
        ctx.again = lambda node: again(*_factors(node))
        return product()

    @staticmethod
    @first_order
    @backward_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = _factors(ctx)
        grad_codes = grad @ w.dequantize() if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.reshape(-1, grad.size(-1)).t() @ x.dequantize().reshape(-1, x.shape[-1])
        return grad_codes, grad_weight, None, None, None, None


def _factors(node: Any) -> tuple[PackedTensor, PackedTensor]:
    """The packed factors that a node of :func:`linear` keeps."""
    saved, (x, w) = node.saved_tensors, node.layouts
    return PackedTensor(*saved[:3], *x), PackedTensor(*saved[3:], *w)


def linear(
    codes: Tensor,
    weight: Tensor,
    x: PackedTensor,
    w: PackedTensor,
    product: Recipe,
    again: Callable[[PackedTensor, PackedTensor], Tensor],
) -> Tensor:
    """``x^ W^^T``: ``product()`` computes it; the gradients are those of values.

    Args:
        codes: ``[*, K]``, from ``quantize``.
        weight: ``[O, K]``, the dequantized weight.
        x: The same codes, packed.
        w: The same weight, packed.
        product: The forward pass, without bias.
        again: The same from the packed factors; must hold neither codes nor values.
    """
    return _Linear.apply(codes, weight, x, w, product, again)


def _edge_gradient(plan: GraphPlan, grad: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weights of a sum of ``values`` whose gradient is ``grad``."""
    heads = weight.size(1) if weight.dim() == 2 else 1
    by_head = (v.reshape(v.size(0), heads, -1) for v in (grad, values))
    return edge_products(plan, *by_head).view_as(weight)


class _AggregateSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, weight: Tensor | None, plan: GraphPlan, packed: PackedTensor, total: Recipe
    ) -> Tensor:
        ctx.plan, ctx.layout = plan, packed.layout
        # The codes matter to the gradient of the weights alone.
        ctx.save_for_backward(weight, *(packed.tensors if ctx.needs_input_grad[1] else ()))
        return total()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, (weight, *rest) = ctx.plan, ctx.saved_tensors
        grad_codes = spmm(plan.transpose, grad, None if weight is None else plan.transpose.sort(weight))
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _edge_gradient(plan, grad, PackedTensor(*rest, *ctx.layout).dequantize(), weight)
        return grad_codes, grad_weight, None, None, None


def aggregate_sum(codes: Tensor, weight: Tensor | None, plan: GraphPlan, packed: PackedTensor, total: Recipe) -> Tensor:
    """``sum_j w_ij x^_j``, computed by ``total()``; the backward pass runs on the transposed plan.

    Args:
        codes: ``[num_src, F]`` or ``[num_src, H, C]``, from ``quantize``.
        weight: ``[E]`` or ``[E, H]`` in CSR order, or :obj:`None`.
        plan: The graph.
        packed: The same codes, packed.
        total: The forward pass.
    """
    return _AggregateSum.apply(codes, weight, plan, packed, total)


class _WeightedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, weight: Tensor, divisor: Tensor, plan: GraphPlan, packed: PackedTensor, mean: Recipe
    ) -> Tensor:
        ctx.plan, ctx.layout = plan, packed.layout
        ctx.save_for_backward(weight, divisor, *packed.tensors)
        return mean()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, (weight, divisor, *rest) = ctx.plan, ctx.saved_tensors
        grad = grad / divisor.unsqueeze(-1)
        grad_codes = spmm(plan.transpose, grad, plan.transpose.sort(weight)) if ctx.needs_input_grad[0] else None
        grad_weight = _edge_gradient(plan, grad, PackedTensor(*rest, *ctx.layout).dequantize(), weight)
        # <grad_i, sum_j w_ij x_j>, with the products per edge instead of the sums.
        grad_divisor = -segment_sum(plan, weight * grad_weight) / divisor
        return grad_codes, grad_weight, grad_divisor, None, None, None


def weighted_mean(
    codes: Tensor, weight: Tensor, divisor: Tensor, plan: GraphPlan, packed: PackedTensor, mean: Recipe
) -> Tensor:
    """``sum_j w_ij x^_j / t_i``, computed by ``mean()``; keeps no sums.

    Args:
        codes: ``[num_src, H, C]``, from ``quantize``.
        weight: ``[E, H]`` in CSR order.
        divisor: ``t`` ``[num_dst, H]``.
        plan: The graph.
        packed: The same codes, packed.
        mean: The forward pass.
    """
    return _WeightedMean.apply(codes, weight, divisor, plan, packed, mean)


def _hidden(source: Tensor, target: Tensor, plan: GraphPlan) -> Tensor:
    """``x_j + y_i`` per edge, ``[E, H, C]``."""
    return source[plan.col.long()] + target[plan.dst]


class _PairLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source_codes: Tensor, target_codes: Tensor, att: Tensor, source: PackedTensor, target: PackedTensor,
        plan: GraphPlan, slope: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(att, *source.tensors, *target.tensors)
        ctx.layouts, ctx.plan, ctx.slope = (source.layout, target.layout), plan, slope
        hidden = _hidden(source_codes * source.scale + source.lower, target_codes * target.scale + target.lower, plan)
        return (F.leaky_relu(hidden, slope) * att).sum(-1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        att, *rest = ctx.saved_tensors
        plan, (source, target) = ctx.plan, ctx.layouts
        source, target = PackedTensor(*rest[:3], *source), PackedTensor(*rest[3:], *target)
        hidden = _hidden(source.dequantize(), target.dequantize(), plan)
        grad = grad.unsqueeze(-1)
        grad_att = (grad * F.leaky_relu(hidden, ctx.slope)).sum_to_size(att.shape)
        grad_hidden = torch.where(hidden > 0, grad, grad * ctx.slope) * att
        grad_target = segment_sum(plan, grad_hidden)
        grad_source = segment_sum(plan.transpose, plan.transpose.sort(grad_hidden))
        return grad_source, grad_target, grad_att, None, None, None, None


def pair_logits(
    source_codes: Tensor,
    target_codes: Tensor,
    att: Tensor,
    source: PackedTensor,
    target: PackedTensor,
    plan: GraphPlan,
    slope: float,
) -> Tensor:
    """``<a_h, LeakyReLU(x^_j + y^_i)>`` ``[E, H]``; what is as large as the edges' features is computed again.

    Args:
        source_codes: ``[num_src, H, C]``, from :func:`~qgnn_plugin.quantizers.compressed.quantize`.
        target_codes: ``[num_dst, H, C]``, likewise.
        att: ``[1, H, C]``.
        source: The codes of sources, packed.
        target: Those of targets.
        plan: The graph.
        slope: Of LeakyReLU.
    """
    return _PairLogits.apply(source_codes, target_codes, att, source, target, plan, slope)
