"""Packed GATConv and GATv2Conv: attention over packed messages, nothing of size ``E x H`` written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import OFF
from ..convs.attention import (
    QuantizedGATConv,
    QuantizedGATv2Conv,
    WatchedAttention,
    WatchedPairs,
    _QuantizedAttention,
    one_sample,
    refuse_features,
)
from ..kernels.attention_aggregate import attention_aggregate
from ..kernels.head_dots import head_dots
from ..kernels.plan import GraphPlan
from ..layers.samples import layer_name
from ..layers.watched import is_watched
from ..quantizers import QuantizedTensor
from .base import LayerSpec, PackedConv, inference, register_packed
from .deferred import Producer, conclude
from .direct_attention import direct_gat
from .linear import PackedLinear
from .ranges import PackedRange, PackedTensor, joined

__all__ = ["PackedGATConv", "PackedGATv2Conv"]

Logits = dict[str, Any]  # arguments of `attention_aggregate`

LAYER = _QuantizedAttention  # what both executions share is taken from there


class _PackedAttention(WatchedAttention, PackedConv):
    """What the two layers share."""

    is_off = False

    message_quantizer: PackedRange
    heads: int
    out_channels: int
    concat: bool
    dropout: float
    negative_slope: float
    share_weights: bool
    bias: Tensor | None
    lin: Any
    lin_src: Any
    lin_dst: Any
    lin_l: Any
    lin_r: Any
    lin_edge: Any
    res: Any

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        self.attention_bits = spec.attention_bits

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        message = layer.message_quantizer
        if layer.explain:
            return "explain mode"
        if message.bits == OFF:
            return "messages in 32 bits"
        if message.log_scale.dtype != torch.float32:
            return "its ranges are not float32"
        return None

    def _attended(
        self, sent: PackedTensor, plan: GraphPlan, residual: Tensor | None, by_target: Callable[[slice], Logits]
    ) -> Producer:
        """Weighted means ``[N, H C]``, or ``[N, C]`` where heads are averaged, with residual and bias.

        ``by_target`` gives the kernel's terms of the logits for some targets.
        """

        def run(start: int, stop: int, **out: Any) -> Tensor:
            fused: dict[str, Any] = {"bias": self.bias, **out} if residual is None else {}
            y = attention_aggregate(
                sent.words, plan.rows(start, stop), sent.scale, sent.lower, sent.num_features, sent.bits,
                multiplier=sent.multiplier, heads=self.heads, attention_bits=self.attention_bits,
                negative_slope=self.negative_slope, concat=self.concat, **by_target(slice(start, stop)), **fused,
            )  # fmt: skip
            if residual is None:
                return y
            y = y + residual[start:stop]
            return conclude(y if self.bias is None else y + self.bias, **out)

        width = sent.num_features if self.concat else self.out_channels
        return Producer(plan.num_dst, width, sent.words.device, run, is_fused=residual is None)

    def _expect_finite(self, site: PackedRange, lin: Any, x: Tensor | None) -> None:
        """Refuse what a ``lin`` that is not packed, and so has not looked at its input, gives or takes."""
        if x is not None and not isinstance(lin, PackedLinear):
            site.expect_finite(x)

    def _edge_terms(self: Any, edge_attr: Tensor) -> Tensor:
        self._expect_finite(self.message_quantizer, self.lin_edge, edge_attr)
        return LAYER._edge_features(self, edge_attr)

    def _spelled_out(self, z: Tensor | None, sent: PackedTensor, logits: Tensor, plan: GraphPlan) -> Any:
        """Edge by edge, as the converted layer: where attention weights or the correction are asked for."""
        shape = (-1, self.heads, self.out_channels)
        quantized = sent.quantized()
        if sent.multiplier is not None:
            scale, lower, rows = quantized.scale.unsqueeze(2), quantized.lower.unsqueeze(2), quantized.rows
            assert rows is not None
            rows = rows._replace(multiplier=rows.multiplier.unsqueeze(2))
            messages = replace(quantized, codes=quantized.codes.view(shape), scale=scale, lower=lower, rows=rows)
        elif sent.scale.numel() != 1:  # none where there are no nodes
            messages = QuantizedTensor.identity(sent.dequantize().view(shape))
        else:
            messages = replace(quantized, codes=quantized.codes.view(shape))
        out, alpha = LAYER._attend(self, logits, messages, plan)
        if z is not None:
            out = LAYER._smoothed(self, z, out, alpha, plan)
        return out, alpha


class PackedGATConv(_PackedAttention):
    """Packed :class:`torch_geometric.nn.GATConv`."""

    att_src: Tensor
    att_dst: Tensor
    att_edge: Tensor

    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Any = None,
        size: Any = None,
        return_attention_weights: Any = None,
    ) -> Any:
        """``[N, in_channels]`` to ``[N, H C]`` (``[N, C]`` without ``concat``); ``x`` may be a pair."""
        args = (x, edge_index, edge_attr, size, return_attention_weights)
        few = direct_gat(self, *args)
        return self._convolved(*args) if few is None else few

    @inference
    def _convolved(self, x: Any, edge_index: Any, edge_attr: Any, size: Any, return_attention_weights: Any) -> Any:
        if is_watched(self):
            return type(self).float_class.forward(self, x, edge_index, edge_attr, size, return_attention_weights)
        x_src, x_dst = one_sample(self, x)
        residual = self.res(x_dst) if self.res is not None and x_dst is not None else None
        square = x_dst is x_src and self.lin is not None
        sent, z_src, alpha_src, alpha_dst = self._messages(x_src, x_dst, square)
        num_dst = None if alpha_dst is None else alpha_dst.size(0)
        sizes = LAYER._sizes(self, edge_index, alpha_src.size(0), num_dst, size)
        returned = bool(return_attention_weights)
        graph = LAYER._graph(self, edge_index, edge_attr, sizes, returned)
        plan, edge_attr = graph.plan, graph.edge_attr
        alpha_edge = None
        if edge_attr is not None and self.lin_edge is not None:
            alpha_edge = (self._edge_terms(edge_attr) * self.att_edge).sum(-1)
        smooth = self._smp is not None and square
        if not (returned or smooth):
            target = alpha_src.new_zeros((sizes[1], self.heads)) if alpha_dst is None else alpha_dst

            def by_target(rows: slice) -> Logits:
                edge = None if alpha_edge is None else alpha_edge[plan.edges(rows.start, rows.stop)]
                return {"alpha_src": alpha_src, "alpha_dst": target[rows], "alpha_edge": edge}

            return self.deferred(self._attended(sent, plan, residual, by_target))
        logits = alpha_src[plan.col.long()]
        for term in (None if alpha_dst is None else alpha_dst[plan.dst], alpha_edge):
            logits = logits if term is None else logits + term
        logits = F.leaky_relu(logits, self.negative_slope)
        out, alpha = self._spelled_out(z_src if smooth else None, sent, logits, plan)
        return LAYER._returned(self, LAYER._finish(self, out, residual), alpha, graph, returned)

    def _messages(
        self, x_src: Tensor, x_dst: Tensor | None, square: bool
    ) -> tuple[PackedTensor, Tensor | None, Tensor, Tensor | None]:
        """What is sent, the floats it comes from where they are needed, and the logits' terms of both ends."""
        if square and self._smp is None and isinstance(self.lin, PackedLinear):
            x, vectors = self.lin.quantize(x_src), torch.cat([self.att_src, self.att_dst]).flatten(1)
            fused = self.lin.with_head_dots(x, self.message_quantizer, vectors, self.heads)
            if fused is not None:
                sent, (alpha_src, alpha_dst) = fused
                return sent, None, alpha_src, alpha_dst
            product = self.lin.fusible(x, self.lin.bias, self.message_quantizer)
            if product is not None:
                return self._messages_by_blocks(product, vectors)
        z_src, z_dst = QuantizedGATConv._transformed(self, x_src, x_dst)
        self._expect_finite(self.message_quantizer, self.lin or self.lin_src, z_src)
        self._expect_finite(self.message_quantizer, self.lin or self.lin_dst, z_dst)
        alpha_src = LAYER._head_terms(self, z_src, self.att_src)
        alpha_dst = None if z_dst is None else LAYER._head_terms(self, z_dst, self.att_dst)
        return self.message_quantizer.quantize_heads(z_src), z_src, alpha_src, alpha_dst

    def _messages_by_blocks(self, product: Producer, vectors: Tensor) -> tuple[PackedTensor, None, Tensor, Tensor]:
        """The same without a float matrix of transformed features."""
        sent, dots = [], []
        for _, rows in product.blocks():
            sent.append(self.message_quantizer.quantize_heads(rows.view(-1, self.heads, self.out_channels)))
            dots.append(head_dots(rows, vectors, self.heads, is_checked=True))
        alpha_src, alpha_dst = dots[0] if len(dots) == 1 else torch.cat(dots, 1)
        return joined(sent), None, alpha_src, alpha_dst


class PackedGATv2Conv(WatchedPairs, _PackedAttention):
    """Packed :class:`torch_geometric.nn.GATv2Conv`: logits come from the packed messages themselves."""

    target_quantizer: PackedRange
    att: Tensor

    @inference
    def forward(self, x: Any, edge_index: Any, edge_attr: Any = None, return_attention_weights: Any = None) -> Any:
        """``[N, in_channels]`` to ``[N, H C]`` (``[N, C]`` without ``concat``); ``x`` may be a pair."""
        if is_watched(self):
            return self.watched_forward(x, edge_index, edge_attr, return_attention_weights)
        x_src, x_dst = one_sample(self, x)
        if x_dst is None:
            raise ValueError(f"Expected target features in '{layer_name(self)}', a GATv2Conv (got None)")
        same = x_dst is x_src
        residual = self.res(x_dst) if self.res is not None else None
        sent, z = self._sent(self.lin_l, x_src, self.message_quantizer)
        target = sent
        if not (self.share_weights and same):
            lin = self.lin_l if self.share_weights else self.lin_r
            target, _ = self._sent(lin, x_dst, self.target_quantizer)
        sizes = LAYER._sizes(self, edge_index, sent.words.size(0), x_dst.size(0))
        returned = bool(return_attention_weights)
        graph = LAYER._graph(self, edge_index, edge_attr, sizes, returned)
        plan, edge_attr = graph.plan, graph.edge_attr
        refuse_features(self, edge_attr)
        smooth = self._smp is not None and same
        if edge_attr is None and not (returned or smooth):
            att = self.att.view(self.heads, self.out_channels)

            def by_target(rows: slice) -> Logits:
                return {"att": att, "x_dst": target.rows(rows.start, rows.stop).dequantize()}

            # The kernel reads targets as floats: by blocks, these are few at a time.
            return self.deferred(replace(self._attended(sent, plan, residual, by_target), is_fused=False))
        logits = self._logits(sent, target.dequantize(), edge_attr, plan)
        out, alpha = self._spelled_out(z if smooth else None, sent, logits, plan)
        return LAYER._returned(self, LAYER._finish(self, out, residual), alpha, graph, returned)

    def _sent(self, lin: Any, x: Tensor, site: PackedRange) -> tuple[PackedTensor, Tensor | None]:
        """The packed result of ``lin``, and the floats it comes from where those were written."""
        shape = (-1, self.heads, self.out_channels)
        if isinstance(lin, PackedLinear) and self._smp is None and x.layout == torch.strided and x.dim() == 2:
            product = lin.fusible(lin.quantize(x), lin.bias, site)
            if product is not None and site.spec.is_fixed:
                return cast(PackedTensor, site.of(product)), None
            if product is not None:
                return joined([site.quantize_heads(rows.view(shape)) for _, rows in product.blocks()]), None
        z = lin(x).view(shape)
        self._expect_finite(site, lin, z)
        return site.quantize_heads(z), z

    def _logits(self, sent: PackedTensor, target: Tensor, edge_attr: Any, plan: GraphPlan) -> Tensor:
        shape = (-1, self.heads, self.out_channels)
        hidden = sent.dequantize().view(shape)[plan.col.long()] + target.view(shape)[plan.dst]
        if edge_attr is not None and self.lin_edge is not None:
            hidden = hidden + self._edge_terms(edge_attr)
        return (F.leaky_relu(hidden, self.negative_slope) * self.att).sum(-1)


register_packed(QuantizedGATConv, PackedGATConv)
register_packed(QuantizedGATv2Conv, PackedGATv2Conv)
