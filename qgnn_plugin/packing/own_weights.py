"""Packed modules whose own code multiplies by weights of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.factors import Factor, FactorTensor
from ..layers.own_weights import QuantizedOwnConv, QuantizedOwnModule, factor, own_weights, rows_of, weight_of
from ..layers.reads import reads_of
from ..quantizers.autocast import full_precision
from .base import register_packed
from .generic import PackedMessagePassing
from .weight import FrozenWeight
from .weights import PackedWeights

__all__ = ["PackedOwnConv", "PackedOwnModule", "PackedOwnWeights"]


class FrozenFactor(FactorTensor, FrozenWeight):
    """A packed weight while its layer's code runs: products with it are of integers, its values are dequantized."""

    def _viewed(self, view: Callable[[Tensor], Any], own: Factor | list[Factor]) -> Any:
        if isinstance(own, list):
            return tuple(self._viewed(partial(_item, view, i), part) for i, part in enumerate(own))
        weight = FrozenFactor(self._layer, lambda: view(self.materialized()), torch.Size(own.shape), self.device)
        weight._factor = own
        return weight


def _item(view: Callable[[Tensor], Any], place: int, weight: Tensor) -> Tensor:
    return view(weight)[place]


class PackedOwnWeights(PackedWeights):
    """What such modules have in common: their code runs as it is."""

    has_others = True

    @classmethod
    def _weight_names(cls, layer: Any) -> tuple[str, ...]:
        return tuple(own_weights(layer))

    @classmethod
    def _as_matrix(cls, layer: Any, name: str, weight: Tensor) -> Tensor:
        return rows_of(weight, own_weights(layer)[name])

    @classmethod
    def _of_matrix(cls, layer: Any, name: str, matrix: Tensor, shape: torch.Size) -> Tensor:
        return weight_of(matrix, shape, own_weights(layer)[name])

    @classmethod
    def _read_by(cls, float_class: type[nn.Module]) -> Iterable[str]:
        return reads_of(float_class).methods

    def _stand_in(self, name: str) -> Tensor:
        frozen: Any = super()._stand_in(name)
        weight = FrozenFactor(frozen._layer, frozen._value, frozen.shape, frozen.device)
        weight._factor = factor(self, name, self._weight(name), self._shapes[name])
        return weight

    @full_precision
    def _times_features(self: Any, x: Tensor, name: str, matrix: Any) -> Tensor:
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            what = "training mode" if self.training else "an input that requires a gradient"
            raise RuntimeError(
                f"Expected the packed '{self._qualified_name}' in eval mode and without gradients (got {what}): packed "
                f"models only run inference; take gradients, such as forces, of the quantized model, or call the "
                f"packed one under torch.no_grad()"
            )
        with torch.no_grad():
            rows = x if x.dim() == 2 else x.reshape(-1, x.size(-1))
            y = self._times(self._taken(rows, f"{name}_input_quantizer"), matrix)
            return y if x.dim() == 2 else y.view(*x.shape[:-1], y.size(-1))


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
