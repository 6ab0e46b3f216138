r"""GATConv and GATv2Conv: quantized messages, quantized unnormalized attention, integer weighted sums.

With edge logits ``e_ij`` and their row maximum ``m_i``, the numerator ``exp(e_ij - m_i)`` in ``(0, 1]`` is quantized to
the code ``k_ij`` and the row is normalized by its own sum:

.. math:: y_i = \frac{(\sum_j k_{ij} c_j)\, s}{\sum_j k_{ij}} + l

``k_ij`` is the number of thresholds ``log((q - 1/2) / Q)``, ``q = 1 .. Q``, that ``e_ij - m_i`` reaches: no exponential
is evaluated, so the codes agree between every implementation.  The gradient of ``k_ij / sum_j k_ij`` is that of the
softmax.  In eval mode the kernel of packed layers computes logits
and means, wherever these run it, so that their order of float operations is the same.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import GATConv, GATv2Conv
from torch_geometric.utils import add_self_loops, remove_self_loops, to_edge_index
from torch_geometric.utils.sparse import set_sparse_value

from ..config import OFF
from ..kernels.attention_aggregate import attention_aggregate
from ..kernels.head_dots import head_dots
from ..kernels.layout import pack_codes
from ..kernels.plan import GraphPlan
from ..kernels.spmm import segment_max, segment_sum, spmm
from ..layers import compressed
from ..layers.arithmetic import with_gradient_of
from ..layers.base import SiteFactory
from ..layers.dropout import dropout
from ..layers.errors import names_layer
from ..layers.graph import edges_of, graph_size, is_sparse, looped_plan, plain_graph
from ..layers.message_passing import QuantizedConv
from ..layers.numerators import attention_codes, attention_thresholds
from ..layers.registry import register_layer
from ..layers.samples import layer_name
from ..layers.watched import is_watched, quantized_attention, source_side, through_pyg
from ..quantizers import QLRQuantizer, QuantizedTensor
from ..quantizers.autocast import full_precision
from ..quantizers.functional import HALF
from ..smp.constraint import attach_constraint

__all__ = [
    "QuantizedGATConv",
    "QuantizedGATv2Conv",
    "attention_codes",
    "attention_numerators",
    "attention_thresholds",
]


class _SoftmaxGradient(torch.autograd.Function):
    """``codes``, with a gradient for ``shifted`` that makes ``codes / total`` the softmax in the backward pass."""

    @staticmethod
    def forward(shifted: Tensor, codes: Tensor, total: Tensor, plan: GraphPlan) -> Tensor:
        return codes.view_as(codes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        shifted, _, total, ctx.plan = inputs
        ctx.save_for_backward(shifted, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        shifted, total = ctx.saved_tensors
        numerator = shifted.exp()
        softmax = numerator / segment_sum(ctx.plan, numerator)[ctx.plan.dst]
        grad = softmax * grad * total[ctx.plan.dst]
        return grad - softmax * segment_sum(ctx.plan, grad)[ctx.plan.dst], None, None, None


def attention_numerators(shifted: Tensor, plan: GraphPlan, bits: int) -> tuple[Tensor, Tensor]:
    """Numerators ``[E, H]`` and their sums ``[num_dst, H]`` for ``shifted`` ``[E, H]``, logits less their row maximum.

    The gradient of their ratio is that of the softmax.  The straight-through gradient of the codes alone would be too
    long by ``Q sum_j exp(e_ij - m_i) / sum_j k_ij``: without bound for a node many of whose numerators round to zero.
    """
    if bits == OFF:
        numerator = shifted.exp()
        return numerator, segment_sum(plan, numerator)
    codes = attention_codes(shifted, bits)
    total = segment_sum(plan, codes)
    return _SoftmaxGradient.apply(shifted, codes, total, plan), total


class StaticGraphError(ValueError, AssertionError):
    """Features of several samples on one graph, which attention layers do not take; PyG asserts that there are none."""


class AttentionGraph(NamedTuple):
    """A graph as an attention layer walks it.

    Args:
        plan: Its edges, self-loops included where the layer adds them.
        edge_attr: Their features, in CSR order.
        adjacency: The edges in the caller's form, where attention weights are returned.
    """

    plan: GraphPlan
    edge_attr: Tensor | None
    adjacency: Any


def one_sample(layer: Any, x: Any) -> tuple[Tensor, Tensor | None]:
    """Source and target features of an attention layer.

    Raises:
        StaticGraphError: If these are no matrices.
    """
    x_src, x_dst = (x, x) if isinstance(x, Tensor) else x
    for value in (x_src, x_dst):
        if value is not None and value.dim() != 2:
            raise StaticGraphError(
                f"Expected node features of shape [N, F] in '{layer_name(layer)}' (got {list(value.shape)}): static "
                f"graphs, many samples on one graph, are not supported in attention layers; batch the samples with "
                f"their graphs, by torch_geometric.data.Batch"
            )
    return x_src, x_dst


def refuse_features(layer: Any, edge_attr: Tensor | None) -> None:
    """Raise where a GATv2Conv is given edge features that it has no map for, as PyG does."""
    if edge_attr is not None and layer.lin_edge is None:
        raise ValueError(
            f"Expected no edge features in '{layer_name(layer)}', a GATv2Conv without 'edge_dim' (got features of "
            f"shape {list(edge_attr.shape)}); make it with edge_dim"
        )


_same_nodes: ContextVar[bool] = ContextVar("qgnn_same_nodes", default=False)


class WatchedAttention:
    """What PyG's own forward of GATConv and GATv2Conv calls, converted or packed, where somebody looks into it."""

    def quantized_propagate(self: Any, edge_index: Any, size: Any = None, **kwargs: Any) -> Tensor:
        """``propagate`` with quantized messages and attention."""
        if self.is_off:
            return super().quantized_propagate(edge_index, size=size, **kwargs)  # type: ignore[misc]
        x = kwargs["x"]
        x = x if isinstance(x, (tuple, list)) else (x, x)
        sends, shared = source_side(self), x[0] is x[1]
        num_nodes = max(n for n in (*(v.size(0) for v in x if v is not None), *(size or ())) if n is not None)
        z, values = x[sends], list(x)
        values[sends] = site_values(self.message_quantizer, z)
        if shared:
            values[1 - sends] = values[sends]
        alpha = quantized_attention(kwargs["alpha"], edge_index, num_nodes, self)
        out = through_pyg(self, edge_index, size, **kwargs | {"x": tuple(values), "alpha": alpha})
        if not (shared or _same_nodes.get()) or self._smp is None:
            return out
        edges = edges_of(edge_index, None, self.flow)
        plan = GraphPlan.from_edges(edges.src, edges.dst, num_nodes, num_nodes)
        return _QuantizedAttention._smoothed(self, z, out, plan.sort(alpha.detach()), plan)


def site_values(site: Any, z: Tensor) -> Tensor:
    """Values ``[N, H, C]`` that the codes of ``z`` stand for, at the site of a converted or a packed layer."""
    if isinstance(site, QLRQuantizer):
        return site(z).dequantize()
    return site.quantize_heads(z).dequantize().view_as(z)


class WatchedPairs(WatchedAttention):
    """Of GATv2Conv, whose logits are read from the messages."""

    def watched_forward(self: Any, x: Any, *args: Any) -> Any:
        """PyG's own forward, which maps sources and targets apart even where these are the same nodes."""
        token = _same_nodes.set(isinstance(x, Tensor) or x[0] is x[1])
        try:
            return type(self).float_class.forward(self, x, *args)
        finally:
            _same_nodes.reset(token)

    def quantized_edge_updater(self: Any, edge_index: Any, **kwargs: Any) -> Tensor:
        """``edge_updater`` with quantized messages."""
        x_src, x_dst = kwargs["x"]
        if not self.is_off:
            sent = site_values(self.message_quantizer, x_src)
            kwargs["x"] = sent, sent if x_dst is x_src else site_values(self.target_quantizer, x_dst)
        return type(self).float_class.edge_updater(self, edge_index, **kwargs)


class _QuantizedAttention(WatchedAttention, QuantizedConv):
    """What GATConv and GATv2Conv share."""

    message_quantizer: QLRQuantizer
    attention_bits: int

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.message_quantizer = sites.message("message", row_dims=2)
        layer.attention_bits = sites.config.bits_for("attention")
        attach_constraint(layer, sites.config.smp, sites.device)

    @property
    def is_off(self) -> bool:
        return self.attention_bits == OFF and super().is_off

    def _sizes(self: Any, edge_index: Any, num_src: int, num_dst: int | None, size: Any = None) -> tuple[int, int]:
        """Numbers of sources and targets (see :func:`graph_size`)."""
        sizes = graph_size(self, edge_index, num_src, num_dst, size)
        if num_dst is None and self.add_self_loops and isinstance(edge_index, EdgeIndex):
            return num_src, max(sizes)  # as in PyG, the self-loop of every source is within the graph
        return sizes

    def _graph(self: Any, edge_index: Any, edge_attr: Any, size: tuple[int, int], returned: bool) -> AttentionGraph:
        """The graph with self-loops as the layer wants them; in the caller's form if weights are to be ``returned``.

        Raises:
            ValueError: If edge features are given beside a matrix that gets self-loops.
        """
        sparse = is_sparse(edge_index)
        if sparse and self.add_self_loops and edge_attr is not None:
            raise ValueError(
                f"Expected the edge features of '{layer_name(self)}' as the values of its sparse adjacency, as it "
                f"adds self-loops (got both 'edge_attr' and a matrix); pass an edge_index, or add_self_loops=False"
            )
        matrix = sparse and isinstance(edge_index, Tensor)
        as_pyg = returned or edge_attr is not None or (matrix and edge_index.dense_dim() > 0)
        adjacency = edge_index
        if self.add_self_loops and as_pyg:
            adjacency, edge_attr = remove_self_loops(adjacency, edge_attr)
            options = {"fill_value": self.fill_value, "num_nodes": min(size)}
            adjacency, edge_attr = add_self_loops(adjacency, edge_attr, **options)
        if matrix and as_pyg:  # in the order of its entries
            (dst, src), values = to_edge_index(adjacency)
            plan = GraphPlan.from_edges(src, dst, *size)
            edge_attr = values if edge_attr is None and values.dim() > 1 else edge_attr
        elif as_pyg and torch.compiler.is_compiling():  # a traced plan of the caller's edges numbers these
            plan = plain_graph(adjacency, size, self.flow).plan
        elif self.add_self_loops:
            plan = looped_plan(edge_index, size, self.flow)
        else:
            plan = plain_graph(edge_index, size, self.flow).plan
        return AttentionGraph(plan, None if edge_attr is None else plan.sort(edge_attr), adjacency)

    def _head_terms(self: Any, z: Tensor, vector: Tensor) -> Tensor:
        """``<z_nh, a_h>`` ``[N, H]`` of ``z`` ``[N, H, C]`` and ``vector`` ``[1, H, C]``; the kernel's in eval mode."""
        if self.training or z.dtype != torch.float32:
            return compressed.head_products(z, vector)
        value = head_dots(z.detach().flatten(1), vector.detach().flatten(1), self.heads, is_checked=True).squeeze(0)
        if not torch.is_grad_enabled():
            return value
        return with_gradient_of(lambda: compressed.head_products(z, vector), value.clone())  # which it writes to

    def _edge_features(self: Any, edge_attr: Tensor) -> Tensor:
        edge_attr = edge_attr.view(-1, 1) if edge_attr.dim() == 1 else edge_attr
        return self.lin_edge(edge_attr).view(-1, self.heads, self.out_channels)

    def _attend(self: Any, logits: Tensor, messages: QuantizedTensor, plan: GraphPlan) -> tuple[Tensor, Tensor]:
        """Mean of ``messages`` [N, H, C], weighted under ``logits`` [E, H]; also the attention weights [E, H]."""
        if (dtype := logits.dtype) in HALF:
            out, alpha = self._attend(logits.float(), messages.to(torch.float32), plan)
            return out.to(dtype), alpha.to(dtype)
        peak = segment_max(plan, logits)
        shifted = logits - peak[plan.dst]
        numerator, total = attention_numerators(shifted, plan, self.attention_bits)
        # An isolated node has an empty sum; any positive divisor gives it the zero that PyG gives.
        divisor = torch.where(total > 0, total, torch.ones_like(total))
        kept = dropout(numerator, self.dropout, self.training)
        return _weighted_mean(messages, plan, kept, divisor), kept / divisor[plan.dst]

    def _finish(self: Any, out: Tensor, residual: Tensor | None) -> Tensor:
        out = out.flatten(1) if self.concat else out.mean(dim=1)
        if residual is not None:
            out = out + residual
        return out if self.bias is None else out + self.bias

    def _returned(self: Any, out: Tensor, alpha: Tensor, graph: AttentionGraph, returned: bool) -> Any:
        """``out``, and the attention weights of the edges in the caller's form and order where these are wanted."""
        if not returned:
            return out
        alpha = graph.plan.unsort(alpha)
        matrix = is_sparse(graph.adjacency)
        return out, (set_sparse_value(graph.adjacency, alpha) if matrix else graph.adjacency, alpha)

    def _is_fused(self: Any, sent: QuantizedTensor, square: bool, returned: bool) -> bool:
        """Whether the packed layer runs its kernel here: not for attention weights, nor where the correction acts."""
        smooth = square and self._smp is not None and self._is_smoothing
        packs = sent.qmax is not None and sent.codes.dtype == torch.float32
        return packs and (sent.scale.numel() == 1 or sent.per_node) and not (self.training or smooth or returned)

    @torch.no_grad()
    def _fused(self: Any, sent: QuantizedTensor, plan: GraphPlan, residual: Tensor | None, **logits: Any) -> Tensor:
        """The layer's result by the kernel that packed layers run; ``logits`` are its terms of them."""
        codes, bits = sent.codes.flatten(1), sent.bits
        multiplier = None
        if sent.rows is None:
            scale, lower = (v if v.numel() == 1 else v.squeeze(-1) for v in (sent.scale, sent.lower))
        else:
            scale, lower, multiplier = sent.rows.scale, sent.rows.lower, sent.rows.integers()
        out = attention_aggregate(
            pack_codes(codes, bits), plan, scale, lower, codes.size(1), bits, multiplier=multiplier, heads=self.heads,
            attention_bits=self.attention_bits, negative_slope=self.negative_slope, concat=self.concat, **logits,
        )  # fmt: skip
        out = out if residual is None else out + residual
        return out if self.bias is None else out + self.bias

    def _smoothed(self: Any, z: Tensor, out: Tensor, alpha: Tensor, plan: GraphPlan) -> Tensor:
        if not self._minds_change:
            return out
        return self._smooth(z, out, lambda v: spmm(plan, v, alpha.to(v.dtype)), plan.num_edges, averaged=True)


def _weighted_mean(messages: QuantizedTensor, plan: GraphPlan, weight: Tensor, divisor: Tensor) -> Tensor:
    r"""``(sum_j w_ij c_j) s (1 / t_i) + (sum_j w_ij / t_i) l``, ``[num_dst, H, C]``, for divisors ``t`` [num_dst, H].

    Where ranges differ by node or channel, values take the place of codes; multiples that rows have of one range join
    codes and weights.
    """
    if messages.packed is not None:
        fixed = (messages.detached(), plan, weight.detach(), divisor.detach())
        return compressed.weighted_mean(
            messages.codes, weight, divisor, plan, messages.packed, lambda: _weighted_mean(*fixed)
        )
    inverse = 1 / divisor  # once per row and head, as kernels have it
    if messages.rows is not None and messages.qmax is not None:
        multiplier, scale, lower = messages.rows
        out = spmm(plan, messages.codes * multiplier, weight) * scale * inverse.unsqueeze(-1)
        if messages.unsigned:
            return out
        mass = segment_sum(plan, weight * multiplier.view(-1, 1)[plan.col.long()])
        return out + lower * (mass * inverse).unsqueeze(-1)
    if messages.scale.numel() > 1:
        messages = QuantizedTensor.identity(messages.dequantize())
    out = spmm(plan, messages.codes, weight) * messages.scale * inverse.unsqueeze(-1)
    if messages.unsigned:
        return out
    share = segment_sum(plan, weight) / divisor  # exactly 1 where nothing is dropped
    return out + share.unsqueeze(-1) * messages.lower


class QuantizedGATConv(_QuantizedAttention):
    """Quantized :class:`torch_geometric.nn.GATConv`; logits come from accumulators, before messages are quantized."""

    @names_layer
    @full_precision
    def forward(
        self: Any,
        x: Any,
        edge_index: Any,
        edge_attr: Any = None,
        size: Any = None,
        return_attention_weights: Any = None,
    ) -> Any:
        if self.is_off or is_watched(self):
            return super().forward(x, edge_index, edge_attr, size, return_attention_weights)  # type: ignore[misc]
        x_src, x_dst = one_sample(self, x)
        residual = self.res(x_dst) if self.res is not None and x_dst is not None else None
        z_src, z_dst = self._transformed(x_src, x_dst)
        sizes = self._sizes(edge_index, z_src.size(0), None if z_dst is None else z_dst.size(0), size)
        returned = bool(return_attention_weights)
        graph = self._graph(edge_index, edge_attr, sizes, returned)
        plan, edge_attr = graph.plan, graph.edge_attr
        sent = self.message_quantizer(z_src, codes_kept=True)
        alpha_src = self._head_terms(z_src, self.att_src)
        alpha_dst = None if z_dst is None else self._head_terms(z_dst, self.att_dst)
        alpha_edge = None
        if edge_attr is not None and self.lin_edge is not None:
            alpha_edge = (self._edge_features(edge_attr) * self.att_edge).sum(-1)

        def spelled_out() -> tuple[Tensor, Tensor]:
            logits = alpha_src[plan.col.long()]
            for term in (None if alpha_dst is None else alpha_dst[plan.dst], alpha_edge):
                logits = logits if term is None else logits + term
            out, alpha = self._attend(F.leaky_relu(logits, self.negative_slope), sent, plan)
            if z_dst is z_src:
                out = self._smoothed(z_src, out, alpha.detach(), plan)
            return self._finish(out, residual), alpha

        if self._is_fused(sent, z_dst is z_src, returned):
            target = alpha_src.new_zeros((sizes[1], self.heads)) if alpha_dst is None else alpha_dst
            terms = {"alpha_src": alpha_src, "alpha_dst": target, "alpha_edge": alpha_edge}
            return with_gradient_of(lambda: spelled_out()[0], self._fused(sent, plan, residual, **terms))
        return self._returned(*spelled_out(), graph, returned)

    def _transformed(self: Any, x_src: Tensor, x_dst: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shape = (-1, self.heads, self.out_channels)
        if self.lin is not None:
            z_src = self.lin(x_src).view(shape)
            if x_dst is x_src:
                return z_src, z_src
            return z_src, None if x_dst is None else self.lin(x_dst).view(shape)
        return self.lin_src(x_src).view(shape), None if x_dst is None else self.lin_dst(x_dst).view(shape)


class QuantizedGATv2Conv(WatchedPairs, _QuantizedAttention):
    """Quantized :class:`torch_geometric.nn.GATv2Conv`; logits are read from the quantized messages themselves."""

    target_quantizer: QLRQuantizer

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        super().attach(layer, sites)
        layer.target_quantizer = sites.message("target", row_dims=2)

    @names_layer
    @full_precision
    def forward(self: Any, x: Any, edge_index: Any, edge_attr: Any = None, return_attention_weights: Any = None) -> Any:
        if self.is_off or is_watched(self):
            return self.watched_forward(x, edge_index, edge_attr, return_attention_weights)
        x_src, x_dst = one_sample(self, x)
        if x_dst is None:
            raise ValueError(f"Expected target features in '{layer_name(self)}', a GATv2Conv (got None)")
        shape = (-1, self.heads, self.out_channels)
        residual = None if self.res is None else self.res(x_dst)
        z_src = self.lin_l(x_src).view(shape)
        if self.share_weights and x_dst is x_src:
            z_dst = z_src
        else:
            z_dst = (self.lin_l if self.share_weights else self.lin_r)(x_dst).view(shape)
        returned = bool(return_attention_weights)
        sizes = self._sizes(edge_index, z_src.size(0), z_dst.size(0))
        graph = self._graph(edge_index, edge_attr, sizes, returned)
        plan, edge_attr = graph.plan, graph.edge_attr
        refuse_features(self, edge_attr)
        sent = self.message_quantizer(z_src, codes_kept=True)
        target = sent if z_dst is z_src else self.target_quantizer(z_dst)

        def spelled_out() -> tuple[Tensor, Tensor]:
            out, alpha = self._attend(self._logits(sent, target, edge_attr, plan), sent, plan)
            if x_dst is x_src:
                out = self._smoothed(z_src, out, alpha.detach(), plan)
            return self._finish(out, residual), alpha

        if edge_attr is None and self._is_fused(sent, x_dst is x_src, returned):
            terms = {"att": self.att.view(self.heads, -1), "x_dst": target.dequantize().flatten(1)}
            return with_gradient_of(lambda: spelled_out()[0], self._fused(sent, plan, residual, **terms))
        return self._returned(*spelled_out(), graph, returned)

    def _logits(
        self: Any, sent: QuantizedTensor, target: QuantizedTensor, edge_attr: Tensor | None, plan: GraphPlan
    ) -> Tensor:
        """Logits of the edges, ``[E, H]``."""
        edge = None if edge_attr is None or self.lin_edge is None else self._edge_features(edge_attr)
        if sent.packed is not None and target.packed is not None and edge is None:
            return compressed.pair_logits(
                sent.codes, target.codes, self.att, sent.packed, target.packed, plan, self.negative_slope
            )
        hidden = sent.dequantize()[plan.col.long()] + target.dequantize()[plan.dst]
        hidden = hidden if edge is None else hidden + edge
        return (F.leaky_relu(hidden, self.negative_slope) * self.att).sum(-1)


register_layer(GATConv, QuantizedGATConv)
register_layer(GATv2Conv, QuantizedGATv2Conv)
