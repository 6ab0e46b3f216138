"""Packed GATConv and GATv2Conv: attention over packed messages, nothing of size ``E x H`` written."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import OFF
from ..kernels.attention_aggregate import attention_aggregate
from ..kernels.plan import GraphPlan
from ..layers.attention import QuantizedGATConv, QuantizedGATv2Conv, _QuantizedAttention
from ..quantizers import QuantizedTensor, RangeKind
from .base import LayerSpec, PackedConv, inference, register_packed
from .linear import PackedLinear
from .ranges import PackedRange, PackedTensor

__all__ = ["PackedGATConv", "PackedGATv2Conv"]

LAYER = _QuantizedAttention  # what both executions share is taken from there


class _PackedAttention(PackedConv):
    """What the two layers share."""

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

    def __init__(self, layer: Any, spec: LayerSpec, memo: dict[int, Any]) -> None:
        super().__init__(layer, spec, memo)
        self.attention_bits = spec.attention_bits
        self.fill_value = layer.fill_value

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        message = layer.message_quantizer
        if layer.explain:
            return "explain mode"
        if message.bits == OFF:
            return "messages in 32 bits"
        if message.log_scale.dtype != torch.float32:
            return "its ranges are not float32"
        rows = message.granularity == "node" or message.range_kind == RangeKind.ONE_BIT_ROWS
        return "a range per node and head" if rows and layer.heads > 1 else None

    def _attended(self, sent: PackedTensor, plan: GraphPlan, residual: Tensor | None, **logits: Any) -> Tensor:
        """Weighted means ``[N, H C]``, or ``[N, C]`` where heads are averaged, with residual and bias."""
        out = attention_aggregate(
            sent.words, plan, sent.scale, sent.lower, sent.num_features, sent.bits,
            heads=self.heads, attention_bits=self.attention_bits, negative_slope=self.negative_slope,
            concat=self.concat, bias=self.bias if residual is None else None, **logits,
        )  # fmt: skip
        if residual is None:
            return out
        out = out + residual
        return out if self.bias is None else out + self.bias

    def _spelled_out(self, z: Tensor | None, sent: PackedTensor, logits: Tensor, plan: GraphPlan) -> Any:
        """Edge by edge, as the converted layer: where attention weights or the correction are asked for."""
        heads = sent.quantized()
        messages = QuantizedTensor(
            heads.codes.view(-1, self.heads, self.out_channels), heads.scale, heads.lower, heads.qmax, heads.unsigned
        )
        if messages.scale.numel() > 1:
            values = heads.dequantize().view(-1, self.heads, self.out_channels)
            messages = QuantizedTensor.identity(values)
        out, alpha = LAYER._attend(self, logits, messages, plan)
        if z is not None:
            out = LAYER._smoothed(self, z, out, alpha, plan)
        return out, alpha


class PackedGATConv(_PackedAttention):
    """Packed :class:`torch_geometric.nn.GATConv`."""

    children_kept = ("lin", "lin_src", "lin_dst", "lin_edge", "res")
    tensors_kept = ("att_src", "att_dst", "att_edge", "bias")
    att_src: Tensor
    att_dst: Tensor
    att_edge: Tensor

    @inference
    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Any = None,
        size: Any = None,
        return_attention_weights: Any = None,
    ) -> Any:
        """``[N, in_channels]`` to ``[N, H C]`` (``[N, C]`` without ``concat``); ``x`` may be a pair."""
        x_src, x_dst = (x, x) if isinstance(x, Tensor) else x
        residual = self.res(x_dst) if self.res is not None and x_dst is not None else None
        z_src, z_dst = QuantizedGATConv._transformed(self, x_src, x_dst)
        num_src = z_src.size(0)
        num_dst = z_dst.size(0) if z_dst is not None else (num_src if size is None else size[1])
        plan, edge_attr, _ = LAYER._plan(self, edge_index, edge_attr, (num_src, num_dst))
        alpha_src = (z_src * self.att_src).sum(-1)
        alpha_dst = None if z_dst is None else (z_dst * self.att_dst).sum(-1)
        alpha_edge = None
        if edge_attr is not None and self.lin_edge is not None:
            alpha_edge = (LAYER._edge_features(self, edge_attr) * self.att_edge).sum(-1)
        sent = self.message_quantizer(z_src.flatten(1))
        square = z_dst is z_src
        if return_attention_weights is None and (self.smp is None or not square):
            if alpha_dst is None:
                alpha_dst = alpha_src.new_zeros((num_dst, self.heads))
            terms = {"alpha_src": alpha_src, "alpha_dst": alpha_dst, "alpha_edge": alpha_edge}
            return self._attended(sent, plan, residual, **terms)
        logits = alpha_src[plan.col.long()]
        for term in (None if alpha_dst is None else alpha_dst[plan.dst], alpha_edge):
            logits = logits if term is None else logits + term
        logits = F.leaky_relu(logits, self.negative_slope)
        out, alpha = self._spelled_out(z_src if square else None, sent, logits, plan)
        return LAYER._returned(self, LAYER._finish(self, out, residual), alpha, plan, return_attention_weights)


class PackedGATv2Conv(_PackedAttention):
    """Packed :class:`torch_geometric.nn.GATv2Conv`: logits come from the packed messages themselves."""

    children_kept = ("lin_l", "lin_r", "lin_edge", "res")
    tensors_kept = ("att", "bias")
    target_quantizer: PackedRange
    att: Tensor

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        target = layer.target_quantizer
        rows = target.granularity == "node" or target.range_kind == RangeKind.ONE_BIT_ROWS
        per_head = "a range per node and head" if rows and layer.heads > 1 else None
        return super().refuses(layer) or per_head

    @classmethod
    def idle_sites(cls, layer: Any) -> tuple[str, ...]:
        return ("target_quantizer",) if layer.share_weights else ()

    @inference
    def forward(self, x: Any, edge_index: Any, edge_attr: Any = None, return_attention_weights: Any = None) -> Any:
        """``[N, in_channels]`` to ``[N, H C]`` (``[N, C]`` without ``concat``); ``x`` may be a pair."""
        x_src, x_dst = (x, x) if isinstance(x, Tensor) else x
        if x_dst is None:
            raise ValueError("Expected target features in a bipartite GATv2Conv (got None)")
        same = x_dst is x_src
        residual = self.res(x_dst) if self.res is not None else None
        sent, z = self._sent(x_src)
        target = sent
        if not (self.share_weights and same):
            z_dst = (self.lin_l if self.share_weights else self.lin_r)(x_dst)
            target = self.target_quantizer(z_dst)
        sizes = sent.words.size(0), x_dst.size(0)
        plan, edge_attr, _ = LAYER._plan(self, edge_index, edge_attr, sizes)
        x_target = target.dequantize()
        smooth = self.smp is not None and same
        if edge_attr is None and return_attention_weights is None and not smooth:
            att = self.att.view(self.heads, self.out_channels)
            return self._attended(sent, plan, residual, att=att, x_dst=x_target)
        logits = self._logits(sent, x_target, edge_attr, plan)
        values = None if z is None or not same else z.view(-1, self.heads, self.out_channels)
        out, alpha = self._spelled_out(values, sent, logits, plan)
        return LAYER._returned(self, LAYER._finish(self, out, residual), alpha, plan, return_attention_weights)

    def _sent(self, x: Tensor) -> tuple[PackedTensor, Tensor | None]:
        """Packed messages, and the floats they come from where those were written."""
        lin = self.lin_l
        if isinstance(lin, PackedLinear) and self.smp is None and x.layout == torch.strided and x.dim() == 2:
            fused = lin.packed_to(lin.quantize(x), self.message_quantizer, lin.bias)
            if fused is not None:
                return fused, None
        z = lin(x)
        return self.message_quantizer(z), z

    def _logits(self, sent: PackedTensor, target: Tensor, edge_attr: Any, plan: GraphPlan) -> Tensor:
        shape = (-1, self.heads, self.out_channels)
        hidden = sent.dequantize().view(shape)[plan.col.long()] + target.view(shape)[plan.dst]
        if edge_attr is not None and self.lin_edge is not None:
            hidden = hidden + LAYER._edge_features(self, edge_attr)
        return (F.leaky_relu(hidden, self.negative_slope) * self.att).sum(-1)


register_packed(QuantizedGATConv, PackedGATConv)
register_packed(QuantizedGATv2Conv, PackedGATv2Conv)
