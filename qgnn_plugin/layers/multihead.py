"""``torch.nn.MultiheadAttention`` on quantized projections; scores, softmax and the weighted sum stay float."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers.autocast import full_precision
from .products import INPUT, MultipliesWeights, QuantizedWeights

__all__ = ["QuantizedMultiheadAttention", "RunsMultiheadAttention"]

PROJECTIONS = ("query", "key", "value")


class RunsMultiheadAttention(MultipliesWeights):
    """The forward of :class:`torch.nn.MultiheadAttention` on projections that are integer products."""

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    training: bool
    out_proj: nn.Linear
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None

    @classmethod
    def _weight_names(cls, layer: Any) -> tuple[str, ...]:
        if layer._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return tuple(f"{name[0]}_proj_weight" for name in PROJECTIONS)

    @full_precision
    def _attended(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError(
                f"Expected dense queries, keys and values at '{self._qualified_name}' while it is quantized (got "
                f"nested tensors); pad them (.to_padded_tensor(0.0)) and pass key_padding_mask"
            )
        if is_causal and attn_mask is None:
            raise ValueError(f"Expected an 'attn_mask' with is_causal=True at '{self._qualified_name}' (got None)")
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        q, k, v = (self._heads(t) for t in (q, k, v))
        if is_causal and key_padding_mask is None and not need_weights:  # the mask is a hint then, as in torch
            out, weights = F.scaled_dot_product_attention(q, k, v, None, self._dropout, is_causal=True), None
        else:
            out, weights = self._attend(q, k, v, self._mask(attn_mask, key_padding_mask, q, k), need_weights)
        out = out.transpose(1, 2).flatten(2)
        if batched and not self.batch_first:
            out = out.transpose(0, 1)
        out = self.out_proj(out if batched else out.squeeze(0))
        if weights is None:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def _projected(self: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values after their projections; an input that is given twice is quantized once."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        if not self._qkv_same_embed_dim:
            named = zip(PROJECTIONS, inputs, biases, strict=True)
            q, k, v = (self._mapped(x, f"{name}_quantizer", f"{name[0]}_proj_weight", bias) for name, x, bias in named)
            return q, k, v
        if key is query and value is query:
            q, k, v = self._mapped(query, INPUT, "in_proj_weight", self.in_proj_bias).chunk(3, -1)
            return q, k, v
        weight, width = self._quantized_weight("in_proj_weight"), self.embed_dim
        taken = {id(x): self._taken(x.reshape(-1, x.size(-1)), INPUT) for x in inputs}
        q, k, v = (
            self._times(taken[id(x)], self._part(weight, i * width, (i + 1) * width), bias).view(*x.shape[:-1], width)
            for i, (x, bias) in enumerate(zip(inputs, biases, strict=True))
        )
        return q, k, v

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values ``[B, S, E]`` with the learned one and a zero one, where the layer has them."""
        if bias is not None:
            x = torch.cat([x, bias.expand(x.size(0), 1, -1)], 1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, L, E]`` to ``[B, H, L, E / H]``."""
        return x.reshape(x.size(0), x.size(1), self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores, broadcastable to ``[B, H, L, S]``; nothing to the layer's own keys."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            mask = F.pad(mask, (0, k.size(2) - mask.size(-1)))
            if mask.dim() == 3:
                mask = mask.view(-1, self.num_heads, *mask.shape[1:]) if mask.size(0) > 1 else mask.unsqueeze(0)
        if padding is not None:
            rows = F.pad(_additive(padding, q.dtype), (0, k.size(2) - padding.size(-1))).view(-1, 1, 1, k.size(2))
            mask = rows if mask is None else mask + rows
        return mask

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, self._dropout), None
        scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, self._dropout, training=self.training)
        return weights @ v, weights


class QuantizedMultiheadAttention(RunsMultiheadAttention, QuantizedWeights):
    """Quantized :class:`torch.nn.MultiheadAttention`.

    Sites: ``input`` for queries, keys and values of one width (three where widths differ), and the weights of their
    projections.  The projection of the result, ``out_proj``, is a linear layer of its own.
    """

    @classmethod
    def _input_widths(cls, layer: Any) -> dict[str, int]:
        if layer._qkv_same_embed_dim:
            return {INPUT: layer.embed_dim}
        widths = (layer.embed_dim, layer.kdim, layer.vdim)
        return {f"{name}_quantizer": width for name, width in zip(PROJECTIONS, widths, strict=True)}

    @property
    def follows_autocast(self) -> bool:
        return self.is_off and getattr(self.out_proj, "is_off", True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.follows_autocast:  # nothing is quantized
            return super().forward(query, key, value, *args, **kwargs)  # type: ignore[misc]
        return self._attended(query, key, value, *args, **kwargs)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
