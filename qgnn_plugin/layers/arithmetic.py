r"""Integer arithmetic of converted layers: sums run over codes, one affine step follows (docs/arithmetic.md).

In eval mode the float operations and their order are those of the packed kernels, so that both executions agree bit for
bit; sums over codes are exact because they stay below ``2^24`` in float32; where they may not, products run in float64
and sums over neighbours digit by digit (:func:`exact_sum`).  Sums that round (edge weights, a range per node) depend on
the order that a kernel adds in: in eval mode that kernel itself computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.aggregate import aggregate
from ..kernels.arithmetic import LARGEST_MULTIPLIER
from ..kernels.autograd import with_signature
from ..kernels.plan import GraphPlan
from ..kernels.spmm import segment_sum, spmm
from ..quantizers import QuantizedTensor
from ..quantizers.functional import HALF
from ..quantizers.packed import PackedTensor
from . import compressed

__all__ = ["aggregate_sum", "exact_sum", "linear", "own_copy", "row_sum", "with_gradient_of"]

EXACT_FLOAT32 = 2**24


def _code_sums(x: QuantizedTensor, weight: QuantizedTensor, exact: bool) -> tuple[Tensor, Tensor | None]:
    """``sum_k cx_k cw_ok`` [N, O] and ``sum_k cx_k`` [N, 1] (where needed); exact integers if ``exact``."""
    cx, cw = x.codes, weight.codes
    wide = False
    if exact and x.qmax is not None and weight.qmax is not None:
        wide = cw.dtype == torch.float32 and cw.size(1) * x.qmax * weight.qmax >= EXACT_FLOAT32
    if x.pattern is None:
        if wide:
            cx, cw = cx.double(), cw.double()
        acc = F.linear(cx, cw)
        rows = None if weight.unsigned else cx.sum(-1, keepdim=True)
        return acc.to(x.codes.dtype), None if rows is None else rows.to(x.codes.dtype)
    assert x.qmax is not None or not wide
    acc = _wide_product(x.pattern, cw.t(), cx, x.qmax or 0) if wide else spmm(x.pattern, cw.t().contiguous(), cx)
    rows = None if weight.unsigned else segment_sum(x.pattern, cx.double() if wide else cx).unsqueeze(1)
    return acc, None if rows is None else rows.to(x.codes.dtype)


def _wide_product(pattern: GraphPlan, codes: Tensor, values: Tensor, largest: int) -> Tensor:
    """``spmm(pattern, codes, values)``, rounded once, of ``codes`` [K, O] and ``values`` up to ``largest``.

    Two digits of the codes, whose sums are exact in float32, take a tenth of the time that float64 takes.
    """
    most = (EXACT_FLOAT32 - 1) // max(1, codes.size(0) * largest)
    if most < 16:  # a code of 8 bits has more than two such digits
        return spmm(pattern, codes.double().contiguous(), values.double()).to(values.dtype)
    base = 1 << (most.bit_length() - 1)
    high = (codes / base).floor().detach()
    low = codes - base * high  # takes the gradient of both
    sums = [spmm(pattern, digit.contiguous(), values).double() for digit in (high, low)]
    return (base * sums[0] + sums[1]).to(values.dtype)


def linear(x: QuantizedTensor, weight: QuantizedTensor, bias: Tensor | None, exact: bool) -> Tensor:
    r"""``x^ W^T + b`` from codes.

    .. math::
        y_{no} = \big((\mathrm{acc}_{no}\, s^w_o) + (\mathrm{rowsum}_n\, l^w_o)\big) s^x_n
            + \big((\mathrm{colsum}_o\, s^w_o) + K l^w_o\big) l^x_n + b_o

    Args:
        x: ``[*, K]``, range per tensor or node (a range per channel is dequantized first).
        weight: ``[O, K]``, range per tensor or output channel.
        bias: ``[O]`` or :obj:`None`.
        exact: Keep code sums exact (the eval arithmetic); training needs no more than float32.

    Returns:
        ``[*, O]``.
    """
    if x.qmax is None and weight.qmax is None and x.pattern is None:
        return F.linear(x.codes, weight.codes, bias)
    if x.packed is not None:
        y = _compressed_linear(x, x.packed, weight, exact)
        return y if bias is None else y + bias
    if (dtype := weight.codes.dtype) in HALF:
        wide = linear(x.to(torch.float32), weight.to(torch.float32), None, exact).to(dtype)
        return wide if bias is None else wide + bias
    if x.pattern is None and x.scale.dim() == 1 and x.scale.numel() > 1:
        return F.linear(x.dequantize(), weight.dequantize(), bias)
    scale_w, lower_w = weight.scale.reshape(-1), weight.lower.reshape(-1)
    acc, rows = _code_sums(x, weight, exact)
    y = acc * scale_w
    if not weight.unsigned:
        assert rows is not None
        y = y + rows * lower_w
    y = y * x.scale
    if not x.unsigned:
        column = weight.codes.sum(1) * scale_w + weight.codes.size(1) * lower_w
        y = y + column * x.lower
    return y if bias is None else y + bias


def _compressed_linear(x: QuantizedTensor, packed: PackedTensor, weight: QuantizedTensor, exact: bool) -> Tensor:
    """:func:`linear` without bias that keeps packed factors, from which it can be computed again."""
    packed_weight = PackedTensor.of(weight.codes, weight.scale, weight.lower, weight.bits, weight.unsigned)
    values = weight.codes
    if weight.qmax is not None:
        values = compressed.weight_values(values, weight.scale, weight.lower, packed_weight)
    factors = (x.detached(), weight.detached())

    def again(x: PackedTensor, w: PackedTensor) -> Tensor:
        return linear(QuantizedTensor.unpacked(x), QuantizedTensor.unpacked(w), None, exact)

    return compressed.linear(x.codes, values, packed, packed_weight, lambda: linear(*factors, None, exact), again)


@torch.no_grad()
def exact_sum(plan: GraphPlan, codes: Tensor, qmax: int) -> Tensor:
    r"""``sum_j c_j`` rounded to float32 once, for degrees below ``2^24``.

    Codes are split into digits :math:`c = \sum_k B^k d_k` whose sums stay below ``2^24``, hence exact in float32.

    Args:
        plan: The graph.
        codes: ``[num_src, *]`` float32, integers in ``[0, qmax]``.
        qmax: The largest code.

    Raises:
        ValueError: If a node has ``2^24`` neighbours or more.
    """
    if plan.max_degree >= EXACT_FLOAT32:
        raise ValueError(f"Expected fewer than {EXACT_FLOAT32} edges into a node (got {plan.max_degree})")
    base = 2
    while plan.max_degree * (2 * base - 1) < EXACT_FLOAT32:
        base *= 2
    total = torch.zeros((), dtype=torch.float64, device=codes.device)
    place = 1
    while place <= qmax:
        digits = torch.remainder(codes, base)
        total = total + place * spmm(plan, digits).double()
        codes, place = (codes - digits) / base, place * base
    return total.to(torch.float32)


def aggregate_sum(x: QuantizedTensor, plan: GraphPlan, weight: Tensor | None = None, exact: bool = False) -> Tensor:
    r"""``sum_j w_ij x^_j`` over the edges of ``plan``, from codes.

    .. math:: y_i = \Big(\sum_j w_{ij} c_j\Big) s + \Big(\sum_j w_{ij}\Big) l

    Args:
        x: ``[num_src, F]`` or ``[num_src, H, C]``.
        plan: The graph.
        weight: ``[E]`` or ``[E, H]`` in CSR order, or :obj:`None` for ones: then code sums are exact integers.
        exact: Bit for bit what packed layers compute (the eval arithmetic), also where the sums round: with weights or
            a range per node.  For ``[num_src, F]`` in float32.

    Returns:
        ``[num_dst, F]`` or ``[num_dst, H, C]``.
    """
    if (dtype := x.codes.dtype) in HALF and x.qmax is not None:
        wide_weight = None if weight is None else weight.to(torch.float32)
        return aggregate_sum(x.to(torch.float32), plan, wide_weight, exact).to(dtype)
    x = x.dense()
    if x.packed is not None:
        return compressed.aggregate_sum(x.codes, weight, plan, x.packed, lambda: _forward_sum(x, plan, weight, exact))
    if exact and weight is None and x.rows is not None:
        return with_gradient_of(lambda: _float_sum(x, plan, weight), row_sum(x, plan))
    rounds = weight is not None or x.per_node
    if not (exact and rounds and x.qmax is not None and x.codes.dtype == torch.float32 and x.codes.dim() == 2):
        return _float_sum(x, plan, weight)
    return with_gradient_of(lambda: _float_sum(x, plan, weight), _kernel_sum(x, plan, weight))


@torch.no_grad()
def row_sum(x: QuantizedTensor, plan: GraphPlan) -> Tensor:
    r"""``sum_j x^_j`` of rows that are integer multiples of one range, from sums of integers.

    .. math:: y_i = \Big(\sum_j m_j c_j\Big) s + \Big(\sum_j m_j\Big) l
    """
    assert x.rows is not None
    assert x.qmax is not None
    multiplier, scale, lower = x.rows
    y = _integer_sum(plan, x.codes * multiplier, LARGEST_MULTIPLIER * x.qmax) * scale
    return y if x.unsigned else y + _integer_sum(plan, multiplier, LARGEST_MULTIPLIER) * lower


def _integer_sum(plan: GraphPlan, values: Tensor, largest: int) -> Tensor:
    """The sum of integers in ``[0, largest]``, rounded once to their dtype."""
    if values.dtype == torch.float32 and plan.is_traced:
        return spmm(plan, values.double()).to(torch.float32)  # whatever the degrees, which are not known yet
    if values.dtype == torch.float32 and plan.max_degree * largest >= EXACT_FLOAT32:
        return exact_sum(plan, values, largest)
    return spmm(plan, values)


def _float_sum(x: QuantizedTensor, plan: GraphPlan, weight: Tensor | None) -> Tensor:
    """:func:`aggregate_sum` by differentiable products."""
    if x.per_node:
        return spmm(plan, x.dequantize(), weight)
    if plan.is_traced and weight is None and x.qmax is not None and x.codes.dtype == torch.float32:
        acc = spmm(plan, x.codes.double()).to(torch.float32)  # exact whatever the degrees, which are not known yet
    else:
        acc = spmm(plan, x.codes, weight)
    if x.qmax is None:
        return acc
    counted = weight is None and not plan.is_traced and acc.dtype == torch.float32
    if counted and plan.max_degree * x.qmax >= EXACT_FLOAT32:
        # The correction is exact in float32 (the two are neighbours), and leaves the gradient alone.
        acc = acc + (exact_sum(plan, x.codes, x.qmax) - acc).detach()
    y = acc * x.scale
    if x.unsigned:
        return y
    mass = plan.degree.to(acc.dtype) if weight is None else segment_sum(plan, weight)
    return y + mass.view(*mass.shape, *([1] * (acc.dim() - mass.dim()))) * x.lower


@with_signature
class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(differentiable: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value) if torch.compiler.is_compiling() else value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not torch.compiler.is_compiling():
            ctx.mark_dirty(inputs[1])  # not a view: what is returned may be written to

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def own_copy(x: Tensor) -> Tensor:
    """``x`` for a site that keeps it until its backward pass: a copy, as its owner may write to it before then.

    Sums over neighbours keep nothing of what they add, so that models may update states in place.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or compressed.compressing():
        return x
    return x.clone() if x.layout == torch.strided else x


def with_gradient_of(differentiable: Callable[[], Tensor], value: Tensor) -> Tensor:
    """``value`` with the gradient of ``differentiable()``, the same but for rounding; not called where none is due."""
    if not torch.is_grad_enabled():
        return value
    if not torch.compiler.is_compiling() and value._is_view():  # large results lie in memory that is used again
        value = value.clone()
    return _Replaced.apply(differentiable(), value)


@torch.no_grad()
def _kernel_sum(x: QuantizedTensor, plan: GraphPlan, weight: Tensor | None) -> Tensor:
    """:func:`aggregate_sum` of ``[num_src, F]`` by the kernel that packed layers run."""
    packed = x.packed or PackedTensor.of(x.codes, x.scale, x.lower, x.bits)
    scale, lower, multiplier = (*packed.kernel_range(), None)
    if x.rows is not None:
        scale, lower, multiplier = x.rows.scale, x.rows.lower, x.rows.integers()
    return aggregate(
        packed.words, plan, scale, lower, x.codes.size(1), packed.bits, edge_weight=weight, multiplier=multiplier
    )


def _forward_sum(x: QuantizedTensor, plan: GraphPlan, weight: Tensor | None, exact: bool) -> Tensor:
    """:func:`aggregate_sum` outside the autograd graph; unweighted integer sums run on the packed codes."""
    if exact and weight is None and x.rows is not None:
        return row_sum(x.detached(), plan)
    rounds = weight is not None or x.per_node
    if (rounds and not exact) or x.codes.dim() != 2:
        return _float_sum(x.detached(), plan, None if weight is None else weight.detach())
    return _kernel_sum(x, plan, weight)
