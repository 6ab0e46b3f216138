"""Packed linear maps: integer products of packed activations and packed weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...config import OFF
from ...kernels.layout import row_words
from ...layers.base import WEIGHT
from ...layers.linear import QuantizedLinear
from ...layers.normalized import effective_weight, is_recomputed, without_sources
from ...quantizers import QuantizedTensor
from ..lazy.producers import Producer
from ..lazy.weight import FrozenWeight, read_only
from .base import LayerSpec, PackedLayer, register_packed
from .conv import Activation
from .few_rows import direct_product
from .guard import inference
from .held_codes import HeldCodes
from .matrix import PackedMatrix, wide_product
from .ranges import PackedRange, PackedTensor, SiteSpec

__all__ = ["PackedLinear"]


class PackedLinear(PackedLayer):
    """``y = x^ W^T + b`` with ``W`` in packed words ``[O, row_words(K, bits)]``.

    A 32-bit weight stays a float matrix; everything around it is as in the converted layer.
    """

    packs = ("weight",)
    adds = ("words", "float_weight", "weight_scale", "weight_lower_end")
    input_quantizer: PackedRange | None
    bias: Tensor | None
    words: Tensor | None
    float_weight: Tensor | None
    weight_scale: Tensor
    weight_lower_end: Tensor | None
    _site: SiteSpec
    _num_out: int
    _num_in: int

    @classmethod
    def kept(cls, layer: Any) -> dict[str, Any]:
        state = super().kept(layer)
        without_sources(state)
        return state

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        if "input_quantizer" not in spec.sites:
            self.input_quantizer = None
        weight = layer.weight.detach()
        self._num_out, self._num_in = weight.shape
        self._site = site = spec.sites[WEIGHT]
        words = full = scale = lower = None
        if site.bits == OFF:
            full = nn.Parameter(effective_weight(layer).detach().clone(), requires_grad=False)
        else:
            words, scale, lower = HeldCodes.empty(site, self._num_out, self._num_in, weight.device)
        self.register_buffer("words", words)
        self.register_parameter("float_weight", full)
        self.register_parameter("weight_scale", scale)
        self.register_buffer("weight_lower_end", lower)

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        if layer.weight.dtype != torch.float32:
            return f"its weight is {str(layer.weight.dtype).removeprefix('torch.')}"
        if is_recomputed(layer):
            return "several hooks compute its weight"
        return "32 bits" if layer.is_off else None

    @property
    def weight(self) -> Tensor:
        """``W`` as the float matrix that the words stand for, read only; dequantized where its values are touched."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._dequantized()
        shape = torch.Size((self._num_out, self._num_in))
        state = self._packed
        return FrozenWeight(state.spec.name, self._dequantized, shape, self._weight_device, state.is_read)

    @property
    def _weight_device(self) -> torch.device:
        return (self.float_weight if self.words is None else self.words).device  # type: ignore[union-attr]

    def _dequantized(self) -> Tensor:
        return self._weight_codes().dequantize().detach()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise read_only(self._qualified_name, "an assignment")
        super().__setattr__(name, value)

    def as_float(self) -> nn.Module:
        view = super().as_float()
        view.__dict__["weight"] = self.weight
        return view

    @torch.no_grad()
    def fill(self, layer: Any) -> None:
        super().fill(layer)
        if self.words is None:
            return
        weight = layer.weight_quantizer(effective_weight(layer))
        HeldCodes(self.words, self.weight_scale, self.weight_lower_end).fill(weight, self._site.bits)

    def _packed_weights(self) -> dict[str, tuple[None, int, int]]:
        """Size of the weight and bits of its codes, by the name of the site."""
        return {WEIGHT: (None, self._num_out * self._num_in, self._site.bits)}

    @property
    def weight_lower(self: Any) -> Tensor:
        """Lower end of the weight's range, one element or ``[O]``."""
        if self.weight_lower_end is not None:
            return self.weight_lower_end
        assert self._site.zero_code is not None
        return self._packed.last.lower.of(self._scale, -self._site.zero_code)

    def upgrade(self, state: dict[str, Any]) -> None:
        for name, old in {"_num_out": "out_features", "_num_in": "in_features", "_site": "site"}.items():
            state[name] = state[old]

    def forward(self, x: Any = None, *, input: Any = None) -> Tensor:
        """``[*, K]`` float32 (or ``torch.sparse_csr`` ``[N, K]``) to ``[*, O]`` float32."""
        x = input if x is None else x
        few = direct_product(self, x)
        return self._mapped_rows(x) if few is None else few

    @partial(inference, short=direct_product)
    def _mapped_rows(self, x: Tensor) -> Tensor:
        if x.layout != torch.strided or x.dim() == 2:
            taken = self.quantize(x)
            producer = self.product(taken, self.bias)
            return self.apply_to(taken, self.bias) if producer is None else self.deferred(producer)
        rows = x.reshape(-1, x.size(-1))
        y = self.apply_to(self.quantize(rows), self.bias)
        return y.view(*x.shape[:-1], self._num_out)

    def unbiased(self, x: Tensor) -> Tensor:
        """The linear map of ``[N, K]`` without its bias."""
        return self.apply_to(self.quantize(x), None)

    def quantize(self, x: Tensor) -> Activation:
        """The input as this layer takes it."""
        if self.input_quantizer is None:
            return QuantizedTensor.identity(x)
        return self.input_quantizer(x)

    def apply_to(self, x: Activation, bias: Tensor | None) -> Tensor:
        """The linear map of quantized input ``[N, K]`` with another bias, or none: ``[N, O]``."""
        product = self.product(x, bias)
        return wide_product(x, self._weight_codes(), bias) if product is None else product()

    def packed_to(
        self, x: Activation, target: PackedRange, bias: Tensor | None = None, row_scale: Tensor | None = None
    ) -> PackedTensor | None:
        """The linear map, by a factor ``[N]`` per row, quantized to ``target`` without a float matrix.

        Returns:
            :obj:`None` where it is no integer product, its floats are asked for elsewhere, or the range depends on
            the whole matrix.
        """
        product = self.fusible(x, bias, target, row_scale)
        return None if product is None else cast(PackedTensor, target.of(product))

    def fusible(
        self, x: Activation, bias: Tensor | None, target: PackedRange, row_scale: Tensor | None = None
    ) -> Producer | None:
        """The integer product of :meth:`packed_to`, :obj:`None` where there is none."""
        return None if self._is_seen or not target.spec.is_row_local else self.product(x, bias, row_scale)

    def with_head_dots(
        self, x: Activation, target: PackedRange, vectors: Tensor, heads: int
    ) -> tuple[PackedTensor, Tensor] | None:
        """The linear map quantized to ``target``, and what :func:`~qgnn_plugin.kernels.head_dots.head_dots` gives of
        its floats; :obj:`None` where one kernel does not compute both.
        """
        self._expect_width(x)
        if self._is_seen or self.words is None:
            return None
        return self._matrix.with_head_dots(x, self.bias, target, vectors, heads)

    @property
    def _is_seen(self) -> bool:
        """Whether the result is asked for as floats, by a site, by hooks, or by a forward around this one."""
        if self.extended or self._forward_hooks or self._forward_pre_hooks:
            return True
        return self.output_quantizer is not None

    def product(self, x: Activation, bias: Tensor | None, row_scale: Tensor | None = None) -> Producer | None:
        """The linear map, by a factor ``[N]`` per row, as integer products; :obj:`None` where it is none.

        That takes packed weights, and input whose range factors out of the product.
        """
        self._expect_width(x)
        return None if self.words is None else self._matrix.product(x, bias, row_scale)

    @property
    def _scale(self: Any) -> Tensor:
        scale = self._parameters.get("weight_scale")
        return self._buffers["weight_scale"] if scale is None else scale  # as pickles of version 1 have it

    @property
    def _matrix(self: Any) -> PackedMatrix:
        words, scale, lower = self._buffers["words"], self._scale, self.weight_lower
        last = self._packed.last
        known = last.matrix
        if known is not None and known.words is words and known.scale is scale and known.lower is lower:
            return known
        assert words is not None
        assert scale is not None
        site, shape = self._site, (self._num_out, row_words(self._num_in, self._site.bits))
        fits = words.shape == shape and scale.numel() == lower.numel() and scale.numel() in (1, self._num_out)
        made = PackedMatrix.of(words, scale, lower, self._num_in, site.bits, site.zero_code == 0)
        made = replace(made, is_checked=fits)
        if not torch.compiler.is_compiling():
            last.matrix = made
        return made

    def _expect_width(self: Any, x: Activation) -> None:
        if x.shape[-1] != self._num_in:
            raise ValueError(
                f"Expected {self._num_in} features at '{self._qualified_name}' (got {list(x.shape)}); check that "
                f"the features are those of the model"
            )

    def _weight_codes(self) -> QuantizedTensor:
        if self.words is None:
            assert self.float_weight is not None
            return QuantizedTensor.identity(self.float_weight)
        return self._matrix.codes()


register_packed(QuantizedLinear, PackedLinear)
