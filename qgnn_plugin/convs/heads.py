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
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.typing import torch_sparse
from torch_geometric.utils import add_self_loops, remove_self_loops
from torch_geometric.utils.sparse import set_sparse_value

from ..config import OFF
from ..graph.adjacency import edges_of, graph_size, is_sparse, looped_plan, plain_graph
from ..graph.edges import entries_of
from ..graph.samples import layer_name
from ..kernels.autograd import with_signature
from ..kernels.head_dots import head_dots
from ..kernels.plan import GraphPlan
from ..kernels.spmm import segment_max, segment_sum, spmm
from ..layers import compressed
from ..layers.arithmetic import with_gradient_of
from ..layers.base import SiteFactory
from ..layers.dropout import dropout
from ..layers.numerators import attention_codes
from ..layers.watched import quantized_attention, source_side, through_pyg
from ..quantizers import QLRQuantizer, QuantizedTensor
from ..quantizers.functional import HALF
from ..smp.constraint import attach_constraint
from .base import Convolution

__all__ = ["Attention", "AttentionGraph", "WatchedPairs", "attention_numerators", "one_sample", "refuse_features"]


@with_signature
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
        return self._smoothed(z, out, plan.sort(alpha.detach()), plan)


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


class Attention(WatchedAttention, Convolution):
    """What GATConv and GATv2Conv share, converted or packed."""

    message_quantizer: Any
    attention_bits: int

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        layer.message_quantizer = sites.message("message", row_dims=2)
        layer.attention_bits = sites.config.bits_for("attention")
        attach_constraint(layer, sites.config.smp, sites.device)

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
        if sparse and not isinstance(edge_index, Tensor):
            return self._graph_of_sparse_tensor(edge_index, edge_attr, size, returned)
        if sparse and self.add_self_loops and edge_attr is not None:
            raise ValueError(
                f"Expected the edge features of '{layer_name(self)}' as the values of its sparse adjacency, as it "
                f"adds self-loops (got both 'edge_attr' and a matrix); pass an edge_index, or add_self_loops=False"
            )
        as_pyg = returned or edge_attr is not None or (sparse and edge_index.dense_dim() > 0)
        adjacency = edge_index
        if self.add_self_loops and as_pyg:
            adjacency, edge_attr = remove_self_loops(adjacency, edge_attr)
            options = {"fill_value": self.fill_value, "num_nodes": min(size)}
            adjacency, edge_attr = add_self_loops(adjacency, edge_attr, **options)
        if sparse and as_pyg:  # in the order of its entries
            (dst, src), values = entries_of(adjacency)
            plan = GraphPlan.from_edges(src, dst, *size)
            edge_attr = values if edge_attr is None and values.dim() > 1 else edge_attr
        elif as_pyg and torch.compiler.is_compiling():  # a traced plan of the caller's edges numbers these
            plan = plain_graph(adjacency, size, self.flow).plan
        elif self.add_self_loops:
            plan = looped_plan(edge_index, size, self.flow)
        else:
            plan = plain_graph(edge_index, size, self.flow).plan
        return AttentionGraph(plan, None if edge_attr is None else plan.sort(edge_attr), adjacency)

    def _graph_of_sparse_tensor(
        self: Any, adj_t: Any, edge_attr: Tensor | None, size: tuple[int, int], returned: bool
    ) -> AttentionGraph:
        """:meth:`_graph` of a ``SparseTensor``; values ``[E, D]`` are features of its edges.

        Raises:
            ValueError: If edges with features are to get self-loops, which would have none.
        """
        if self.add_self_loops and (self.edge_dim is not None or edge_attr is not None):
            found = "'edge_attr'" if edge_attr is not None else f"edge_dim={self.edge_dim}"
            raise ValueError(
                f"Expected '{layer_name(self)}', whose edges have features, not to add self-loops to a SparseTensor "
                f"(got {found}), as in PyG; pass an edge_index, or add_self_loops=False"
            )
        if self.add_self_loops and returned:
            adj_t = torch_sparse.set_diag(adj_t)
        elif self.add_self_loops:
            return AttentionGraph(looped_plan(adj_t, size, self.flow), None, adj_t)
        values = adj_t.coo()[2]
        if edge_attr is None and values is not None and values.dim() > 1:
            edge_attr = values
        plan = plain_graph(adj_t, size, self.flow).plan
        return AttentionGraph(plan, None if edge_attr is None else plan.sort(edge_attr), adj_t)

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
        alpha, adjacency = graph.plan.unsort(alpha), graph.adjacency
        if not isinstance(adjacency, Tensor):
            return out, adjacency.set_value(alpha, layout="coo")
        return out, (set_sparse_value(adjacency, alpha) if is_sparse(adjacency) else adjacency, alpha)

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
