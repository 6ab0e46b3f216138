"""Packed modules whose own code multiplies by weights of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.factors import Factor, FactorTensor
from ...layers.own_weights import QuantizedOwnConv, QuantizedOwnModule, WeightsAsRows, factor, own_weights
from ...layers.reads import reads_of
from ..layers.base import register_packed
from ..layers.weights import PackedWeights
from ..lazy.weight import FrozenWeight
from .generic import PackedMessagePassing

__all__ = ["PackedOwnConv", "PackedOwnModule", "PackedOwnWeights"]


class FrozenFactor(FactorTensor, FrozenWeight):  # type: ignore[misc]
    """A packed weight while its layer's code runs: products with it are of integers, its values are dequantized."""

    def _viewed(self, view: Callable[[Tensor], Any], own: Factor | list[Factor]) -> Any:
        if isinstance(own, list):
            return tuple(self._viewed(partial(_item, view, i), part) for i, part in enumerate(own))
        weight = FrozenFactor(self._layer, lambda: view(self.materialized()), torch.Size(own.shape), self.device)
        weight._factor = own
        return weight


def _item(view: Callable[[Tensor], Any], place: int, weight: Tensor) -> Tensor:
    return view(weight)[place]


class PackedOwnWeights(WeightsAsRows, PackedWeights):
    """What such modules have in common: their code runs as it is."""

    @classmethod
    def _read_by(cls, float_class: type[nn.Module]) -> Iterable[str]:
        return reads_of(float_class).methods

    def _stand_in(self, name: str) -> Tensor:
        frozen: Any = super()._stand_in(name)
        weight = FrozenFactor(frozen._layer, frozen._value, frozen.shape, frozen.device)
        weight._factor = factor(self, name, self._quantized_weight(name), self._shapes[name])
        return weight

    def _times_features(self: Any, x: Tensor, name: str, matrix: Any) -> Tensor:
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            what = "training mode" if self.training else "an input that requires a gradient"
            raise RuntimeError(
                f"Expected the packed '{self._qualified_name}' in eval mode and without gradients (got {what}): packed "
                f"models only run inference; take gradients, such as forces, of the quantized model, or call the "
                f"packed one under torch.no_grad()"
            )
        with torch.no_grad():
            return super()._times_features(x, name, matrix)


class PackedOwnModule(PackedOwnWeights):
    """Packed form of any module that is no ``MessagePassing``."""

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        return super().refuses(layer) if own_weights(layer) else None


class PackedOwnConv(PackedOwnWeights, PackedMessagePassing):
    """Packed form of any ``MessagePassing`` that multiplies by weights of its own."""

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        return PackedMessagePassing.refuses.__func__(cls, layer) or super().refuses(layer)  # type: ignore[attr-defined]


register_packed(QuantizedOwnModule, PackedOwnModule)
register_packed(QuantizedOwnConv, PackedOwnConv)
