"""Quantized ``torch.nn.Linear`` and ``torch_geometric.nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import OFF
from ..quantizers import QLRQuantizer, QuantizedTensor
from ..quantizers.autocast import full_precision
from .arithmetic import linear
from .base import QuantizedLayer, SiteFactory
from .errors import expect_features, names_layer
from .factors import not_reading, readings
from .normalized import compute_weight

__all__ = ["QuantizedLinear"]


class QuantizedLinear(QuantizedLayer):
    """Linear map on quantized input and weight; accumulation, affine step and bias are wider."""

    input_quantizer: QLRQuantizer | None
    weight_quantizer: QLRQuantizer
    weight: Tensor
    bias: Tensor | None
    training: bool

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory, own_input: bool = True) -> None:
        """Add quantizers; ``own_input=False`` for a layer whose owner quantizes the input it shares."""
        layer.input_quantizer = sites.features("input", layer.weight.size(1)) if own_input else None
        layer.weight_quantizer = sites.weight("weight", layer.weight)

    @names_layer
    def forward(self, x: Any = None, *, input: Any = None) -> Tensor:
        """``[*, K]``, or codes of it, to ``[*, O]``; PyG's class calls its argument ``x``, torch's ``input``."""
        x = input if x is None else x
        if x is None:
            expect_features(x)
        return self._mapped(x, self.bias)

    def unbiased(self, x: Tensor) -> Tensor:
        """The linear map without its bias."""
        return self.apply_to(x, None)

    def apply_to(self, x: Tensor | QuantizedTensor, bias: Tensor | None) -> Tensor:
        """The linear map with another bias (or none)."""
        compute_weight(self)
        return self._mapped(x, bias)

    @full_precision
    def _mapped(self, x: Tensor | QuantizedTensor, bias: Tensor | None) -> Tensor:
        if isinstance(x, QuantizedTensor):
            quantized = x
        elif self.input_quantizer is not None:
            if self.is_off and bias is self.bias:
                return super().forward(x)  # type: ignore[misc]
            quantized = self.input_quantizer(x, codes_kept=True)
        else:
            quantized = QuantizedTensor.identity(x)
        return linear(quantized, self.weight_quantizer(self._own_weight()), bias, exact=not self.training)

    def _own_weight(self) -> Tensor:
        """The weight as it is, also where others read it quantized."""
        if torch.compiler.is_compiling() or readings(self) is None:
            return self.weight
        with not_reading(self):
            return self.weight

    def _is_called(self) -> bool:
        """Whether data have come to the layer itself; one whose weight is only read stays float, packed too."""
        site = self.input_quantizer
        return site is None or site.bits == OFF or site.is_set

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        found = None if name != "weight" or torch.compiler.is_compiling() else readings(self)
        if found is None or self.weight_quantizer.bits == OFF or not self._is_called():
            return value
        if name not in found:  # what stands in the packed layer
            found[name] = self.weight_quantizer(value).dequantize()
        return found[name]
