"""GATConv and GATv2Conv, each told once; what attention is made of is in :mod:`.heads`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import GATConv, GATv2Conv

from ..config import OFF
from ..graph.samples import layer_name
from ..kernels.attention_aggregate import attention_aggregate
from ..kernels.head_dots import head_dots
from ..kernels.layout import pack_codes
from ..kernels.plan import GraphPlan
from ..layers import compressed
from ..layers.arithmetic import with_gradient_of
from ..layers.base import SiteFactory
from ..layers.message_passing import SUM
from ..layers.numerators import attention_codes, attention_thresholds
from ..layers.registry import register_layer
from ..layers.watched import is_watched
from ..packing.direct.attention import direct_gat
from ..packing.layers.base import LayerSpec, register_packed
from ..packing.layers.guard import inference
from ..packing.layers.linear import PackedLinear
from ..packing.layers.ranges import PackedRange, PackedTensor, joined
from ..packing.lazy.producers import Producer, with_epilogue
from ..quantizers import QLRQuantizer, QuantizedTensor
from .base import Codes, Frozen, Trainable, trainable
from .gcn import refusal
from .heads import Attention, AttentionGraph, WatchedPairs, attention_numerators, one_sample, refuse_features

__all__ = [
    "GAT",
    "GATv2",
    "PackedGATConv",
    "PackedGATv2Conv",
    "QuantizedGATConv",
    "QuantizedGATv2Conv",
    "attention_codes",
    "attention_numerators",
    "attention_thresholds",
]

Terms = Callable[[slice], dict[str, Any]]  # of some targets: arguments of `attention_aggregate` that make the logits
Messages = tuple[Codes, Tensor | None, Tensor, Tensor | None]  # codes, their floats, terms of sources and of targets


class GAT(Attention):
    """Logits come from accumulators, before messages are quantized."""

    att_src: Tensor
    att_dst: Tensor
    att_edge: Tensor

    def forward(
        self: Any, x: Any, edge_index: Any, edge_attr: Any = None, size: Any = None,
        return_attention_weights: Any = None,
    ) -> Any:  # fmt: skip
        """``[N, in_channels]`` to ``[N, H C]`` (``[N, C]`` without ``concat``); ``x`` may be a pair."""
        if self.is_off or is_watched(self):
            return type(self).float_class.forward(self, x, edge_index, edge_attr, size, return_attention_weights)
        x_src, x_dst = one_sample(self, x)
        residual = self.res(x_dst) if self.res is not None and x_dst is not None else None
        square = x_dst is x_src and self.lin is not None
        sent, z_src, alpha_src, alpha_dst = self._messages(x_src, x_dst, square)
        num_dst = None if alpha_dst is None else alpha_dst.size(0)
        sizes = self._sizes(edge_index, alpha_src.size(0), num_dst, size)
        graph = self._graph(edge_index, edge_attr, sizes, bool(return_attention_weights))
        plan, alpha_edge = graph.plan, None
        target = alpha_src.new_zeros((sizes[1], self.heads)) if alpha_dst is None else alpha_dst
        if graph.edge_attr is not None and self.lin_edge is not None:
            alpha_edge = (self._edge_features(graph.edge_attr) * self.att_edge).sum(-1)

        def logits() -> Tensor:
            total = alpha_src[plan.col.long()]
            for term in (None if alpha_dst is None else alpha_dst[plan.dst], alpha_edge):
                total = total if term is None else total + term
            return F.leaky_relu(total, self.negative_slope)

        def terms(rows: slice) -> dict[str, Any]:
            edge = None if alpha_edge is None else alpha_edge[plan.edges(rows.start, rows.stop)]
            return {"alpha_src": alpha_src, "alpha_dst": target[rows], "alpha_edge": edge}

        returned = bool(return_attention_weights)
        return self._attention(sent, z_src if square else None, graph, residual, logits, terms, returned)

    def _messages(self, x_src: Tensor, x_dst: Tensor | None, square: bool) -> Messages:
        """What is sent, the floats it comes from where they are needed, and the logits' terms of both ends."""
        raise NotImplementedError

    def _transformed(self: Any, x_src: Tensor, x_dst: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shape = (-1, self.heads, self.out_channels)
        if self.lin is not None:
            z_src = self.lin(x_src).view(shape)
            if x_dst is x_src:
                return z_src, z_src
            return z_src, None if x_dst is None else self.lin(x_dst).view(shape)
        return self.lin_src(x_src).view(shape), None if x_dst is None else self.lin_dst(x_dst).view(shape)


class GATv2(WatchedPairs, Attention):
    """Logits are read from the quantized messages themselves."""

    target_quantizer: Any
    att: Tensor

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        super().attach(layer, sites)
        layer.target_quantizer = sites.message("target", row_dims=2)

    def forward(self: Any, x: Any, edge_index: Any, edge_attr: Any = None, return_attention_weights: Any = None) -> Any:
        """``[N, in_channels]`` to ``[N, H C]`` (``[N, C]`` without ``concat``); ``x`` may be a pair."""
        if self.is_off or is_watched(self):
            return self.watched_forward(x, edge_index, edge_attr, return_attention_weights)
        x_src, x_dst = one_sample(self, x)
        if x_dst is None:
            raise ValueError(f"Expected target features in '{layer_name(self)}', a GATv2Conv (got None)")
        same, returned = x_dst is x_src, bool(return_attention_weights)
        residual = None if self.res is None else self.res(x_dst)
        sent, z = self._mapped(self.lin_l, x_src, self.message_quantizer, codes_kept=True)
        target = sent
        if not (self.share_weights and same):
            target, _ = self._mapped(self.lin_l if self.share_weights else self.lin_r, x_dst, self.target_quantizer)
        graph = self._graph(edge_index, edge_attr, self._sizes(edge_index, x_src.size(0), x_dst.size(0)), returned)
        refuse_features(self, graph.edge_attr)

        def logits() -> Tensor:
            return self._logits(sent, target, graph.edge_attr, graph.plan)

        def terms(rows: slice) -> dict[str, Any]:
            return {"att": self.att.view(self.heads, self.out_channels), "x_dst": self._targets(target, rows)}

        by_kernel = terms if graph.edge_attr is None else None
        return self._attention(sent, z if same else None, graph, residual, logits, by_kernel, returned)

    def _mapped(self, lin: Any, x: Tensor, site: Any, codes_kept: bool = False) -> tuple[Codes, Tensor | None]:
        """The result of ``lin`` in the range of ``site``, and the floats ``[N, H, C]`` it comes from where written."""
        raise NotImplementedError

    def _targets(self, codes: Codes, rows: slice) -> Tensor:
        """Values of some targets, ``[n, H C]``."""
        raise NotImplementedError

    def _logits(self: Any, sent: Codes, target: Codes, edge_attr: Tensor | None, plan: GraphPlan) -> Tensor:
        """Logits of the edges, ``[E, H]``."""
        shape = (-1, self.heads, self.out_channels)
        hidden = sent.dequantize().view(shape)[plan.col.long()] + target.dequantize().view(shape)[plan.dst]
        if edge_attr is not None and self.lin_edge is not None:
            hidden = hidden + self._edge_features(edge_attr)
        return (F.leaky_relu(hidden, self.negative_slope) * self.att).sum(-1)


class TrainableAttention(Attention, Trainable):
    """The end of converted attention layers; in eval mode by the kernel that packed ones run."""

    aggregations = SUM

    @property
    def is_off(self) -> bool:
        return self.attention_bits == OFF and super().is_off

    def _runs_floats(self, x: Any) -> bool:
        return False  # where it does, hooks are still asked for

    def _attention(
        self: Any, sent: QuantizedTensor, z: Tensor | None, graph: AttentionGraph, residual: Tensor | None,
        logits: Callable[[], Tensor], terms: Terms | None, returned: bool,
    ) -> Any:  # fmt: skip
        """The layer's result from its messages, of floats ``z`` where its change has a constraint."""

        def spelled_out() -> tuple[Tensor, Tensor]:
            out, alpha = self._attend(logits(), sent, graph.plan)
            if z is not None:
                out = self._smoothed(z, out, alpha.detach(), graph.plan)
            return self._finish(out, residual), alpha

        if terms is not None and self._is_fused(sent, z is not None, returned):
            every = terms(slice(0, graph.plan.num_dst))
            return with_gradient_of(lambda: spelled_out()[0], self._fused(sent, graph.plan, residual, **every))
        return self._returned(*spelled_out(), graph, returned)

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


class FrozenAttention(Attention, Frozen):
    """The end of packed attention layers: nothing of size ``E x H`` is written."""

    is_off = False

    message_quantizer: PackedRange
    heads: int
    out_channels: int
    concat: bool
    negative_slope: float
    bias: Tensor | None

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        self.attention_bits = spec.attention_bits

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        return refusal(layer)

    def _attention(
        self: Any, sent: PackedTensor, z: Tensor | None, graph: AttentionGraph, residual: Tensor | None,
        logits: Callable[[], Tensor], terms: Terms | None, returned: bool,
    ) -> Any:  # fmt: skip
        """The same, edge by edge only where attention weights or the correction are asked for."""
        smooth = z is not None and self._minds_change
        if terms is not None and not (returned or smooth):
            return self.deferred(self._attended(sent, graph.plan, residual, terms))
        out, alpha = self._attend(logits(), self._by_heads(sent), graph.plan)
        if smooth:
            out = self._smoothed(z, out, alpha, graph.plan)
        return self._returned(self._finish(out, residual), alpha, graph, returned)

    def _attended(
        self, sent: PackedTensor, plan: GraphPlan, residual: Tensor | None, terms: Terms
    ) -> Producer:
        """Weighted means ``[N, H C]``, or ``[N, C]`` where heads are averaged, with residual and bias.

        ``terms`` gives the kernel's terms of the logits for some targets.
        """

        def run(start: int, stop: int, **out: Any) -> Tensor:
            fused: dict[str, Any] = {"bias": self.bias, **out} if residual is None else {}
            y = attention_aggregate(
                sent.words, plan.rows(start, stop), sent.scale, sent.lower, sent.num_features, sent.bits,
                multiplier=sent.multiplier, heads=self.heads, attention_bits=self.attention_bits,
                negative_slope=self.negative_slope, concat=self.concat, **terms(slice(start, stop)), **fused,
            )  # fmt: skip
            if residual is None:
                return y
            y = y + residual[start:stop]
            return with_epilogue(y if self.bias is None else y + self.bias, **out)

        width = sent.num_features if self.concat else self.out_channels
        return Producer(plan.num_dst, width, sent.words.device, run, is_fused=residual is None)

    def _by_heads(self, sent: PackedTensor) -> QuantizedTensor:
        """Packed messages as codes ``[N, H, C]``."""
        shape = (-1, self.heads, self.out_channels)
        quantized = QuantizedTensor.unpacked(sent)
        if sent.multiplier is not None:
            scale, lower, rows = quantized.scale.unsqueeze(2), quantized.lower.unsqueeze(2), quantized.rows
            assert rows is not None
            rows = rows._replace(multiplier=rows.multiplier.unsqueeze(2))
            return replace(quantized, codes=quantized.codes.view(shape), scale=scale, lower=lower, rows=rows)
        if sent.scale.numel() != 1:  # none where there are no nodes
            return QuantizedTensor.identity(sent.dequantize().view(shape))
        return replace(quantized, codes=quantized.codes.view(shape))

    def _expect_finite(self, site: PackedRange, lin: Any, x: Tensor | None) -> None:
        """Refuse what a ``lin`` that is not packed, and so has not looked at its input, gives or takes."""
        if x is not None and not isinstance(lin, PackedLinear):
            site.expect_finite(x)

    def _edge_features(self: Any, edge_attr: Tensor) -> Tensor:
        self._expect_finite(self.message_quantizer, self.lin_edge, edge_attr)
        return super()._edge_features(edge_attr)


class QuantizedGATConv(GAT, TrainableAttention):
    """Quantized :class:`torch_geometric.nn.GATConv`."""

    forward = trainable(GAT.forward)

    def _messages(self: Any, x_src: Tensor, x_dst: Tensor | None, square: bool) -> Messages:
        z_src, z_dst = self._transformed(x_src, x_dst)
        sent = self.message_quantizer(z_src, codes_kept=True)
        alpha_src = self._head_terms(z_src, self.att_src)
        return sent, z_src, alpha_src, None if z_dst is None else self._head_terms(z_dst, self.att_dst)


class PackedGATConv(GAT, FrozenAttention):
    """Packed :class:`torch_geometric.nn.GATConv`."""

    lin: Any
    lin_src: Any
    lin_dst: Any

    _convolved = inference(GAT.forward, direct_gat)

    def forward(
        self, x: Any, edge_index: Any, edge_attr: Any = None, size: Any = None, return_attention_weights: Any = None
    ) -> Any:
        args = (x, edge_index, edge_attr, size, return_attention_weights)
        few = direct_gat(self, *args)
        return self._convolved(*args) if few is None else few

    def _messages(self, x_src: Tensor, x_dst: Tensor | None, square: bool) -> Messages:
        if square and not self._minds_change and isinstance(self.lin, PackedLinear):
            x, vectors = self.lin.quantize(x_src), torch.cat([self.att_src, self.att_dst]).flatten(1)
            fused = self.lin.with_head_dots(x, self.message_quantizer, vectors, self.heads)
            if fused is not None:
                sent, (alpha_src, alpha_dst) = fused
                return sent, None, alpha_src, alpha_dst
            product = self.lin.fusible(x, self.lin.bias, self.message_quantizer)
            if product is not None:
                return self._messages_by_blocks(product, vectors)
        z_src, z_dst = self._transformed(x_src, x_dst)
        self._expect_finite(self.message_quantizer, self.lin or self.lin_src, z_src)
        self._expect_finite(self.message_quantizer, self.lin or self.lin_dst, z_dst)
        alpha_src = self._head_terms(z_src, self.att_src)
        alpha_dst = None if z_dst is None else self._head_terms(z_dst, self.att_dst)
        return self.message_quantizer.quantize_heads(z_src), z_src, alpha_src, alpha_dst

    def _messages_by_blocks(self, product: Producer, vectors: Tensor) -> tuple[PackedTensor, None, Tensor, Tensor]:
        """The same without a float matrix of transformed features."""
        sent, dots = [], []
        for _, rows in product.blocks():
            sent.append(self.message_quantizer.quantize_heads(rows.view(-1, self.heads, self.out_channels)))
            dots.append(head_dots(rows, vectors, self.heads, is_checked=True))
        alpha_src, alpha_dst = dots[0] if len(dots) == 1 else torch.cat(dots, 1)
        return joined(sent), None, alpha_src, alpha_dst

class QuantizedGATv2Conv(GATv2, TrainableAttention):
    """Quantized :class:`torch_geometric.nn.GATv2Conv`."""

    target_quantizer: QLRQuantizer
    forward = trainable(GATv2.forward)

    def _mapped(self: Any, lin: Any, x: Tensor, site: Any, codes_kept: bool = False) -> tuple[Codes, Tensor | None]:
        z = lin(x).view(-1, self.heads, self.out_channels)
        return site(z, codes_kept=codes_kept), z

    def _targets(self, codes: Codes, rows: slice) -> Tensor:
        return codes.dequantize().flatten(1)  # all of them

    def _logits(self: Any, sent: Any, target: Any, edge_attr: Tensor | None, plan: GraphPlan) -> Tensor:
        plain = edge_attr is None or self.lin_edge is None
        if plain and sent.packed is not None and target.packed is not None:
            return compressed.pair_logits(
                sent.codes, target.codes, self.att, sent.packed, target.packed, plan, self.negative_slope
            )
        return super()._logits(sent, target, edge_attr, plan)


class PackedGATv2Conv(GATv2, FrozenAttention):
    """Packed :class:`torch_geometric.nn.GATv2Conv`."""

    forward = inference(GATv2.forward)

    def _attended(self, sent: PackedTensor, plan: GraphPlan, residual: Tensor | None, terms: Terms) -> Producer:
        # The kernel reads targets as floats: by blocks, these are few at a time.
        return replace(super()._attended(sent, plan, residual, terms), is_fused=False)

    def _targets(self, codes: Any, rows: slice) -> Tensor:
        return codes.rows(rows.start, rows.stop).dequantize()

    def _mapped(self, lin: Any, x: Tensor, site: Any, codes_kept: bool = False) -> tuple[Codes, Tensor | None]:
        shape = (-1, self.heads, self.out_channels)
        if isinstance(lin, PackedLinear) and not self._minds_change and x.layout == torch.strided and x.dim() == 2:
            product = lin.fusible(lin.quantize(x), lin.bias, site)
            if product is not None and site.spec.is_fixed:
                return cast(PackedTensor, site.of(product)), None
            if product is not None:
                return joined([site.quantize_heads(rows.view(shape)) for _, rows in product.blocks()]), None
        z = lin(x).view(shape)
        self._expect_finite(site, lin, z)
        return site.quantize_heads(z), z


register_layer(GATConv, QuantizedGATConv)
register_layer(GATv2Conv, QuantizedGATv2Conv)
register_packed(QuantizedGATConv, PackedGATConv)
register_packed(QuantizedGATv2Conv, PackedGATv2Conv)
