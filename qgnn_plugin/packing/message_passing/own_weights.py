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
from ..layers.matrix import PackedMatrix
from ..layers.weights import PackedWeights
from ..lazy.of_nodes import held_for_blocks, is_held_for_blocks, mapped_nodes
from ..lazy.weight import FrozenWeight, is_transforming
from .generic import PackedMessagePassing
from .row_checks import TOLERANCE

__all__ = ["PackedOwnConv", "PackedOwnModule", "PackedOwnWeights"]


class FrozenFactor(FactorTensor, FrozenWeight):  # type: ignore[misc]
    """A packed weight while its layer's code runs: products with it are of integers, its values are dequantized."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and not kwargs and (found := _product_of_nodes(*args)) is not None:
            return found
        return super().__torch_function__(func, types, args, kwargs)

    def _values(self) -> Tensor:
        return self.materialized() if is_transforming() else self

    def _viewed(self, view: Callable[[Tensor], Any], own: Factor | list[Factor]) -> Any:
        if isinstance(own, list):
            return tuple(self._viewed(partial(_item, view, i), part) for i, part in enumerate(own))
        weight = FrozenFactor(
            self._layer, lambda: view(self.materialized()), torch.Size(own.shape), self.device, owner=self._owner
        )
        weight._factor = own
        return weight


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def _product_of_nodes(x: Any, weight: Any) -> Tensor | None:
    """``x @ W`` in floats, with the values of a matrix that is no factor, of features that a block has gathered."""
    if not isinstance(weight, FrozenFactor) or weight._factor is not None or weight.dim() != 2:
        return None
    values = weight.materialized()
    if not is_held_for_blocks(values):
        return None
    key = (values.data_ptr(), values.shape, values.stride())
    return mapped_nodes(key, x, lambda rows: torch.matmul(rows, values), TOLERANCE)


def _item(view: Callable[[Tensor], Any], place: int, weight: Tensor) -> Tensor:
    return view(weight)[place]


class PackedOwnWeights(WeightsAsRows, PackedWeights):
    """What such modules have in common: their code runs as it is."""

    @classmethod
    def _read_by(cls, float_class: type[nn.Module]) -> Iterable[str]:
        return reads_of(float_class).methods

    def _stand_in(self, name: str) -> Tensor:
        frozen: Any = super()._stand_in(name)
        value = partial(held_for_blocks, (id(self), name), frozen._value)
        weight = FrozenFactor(frozen._layer, value, frozen.shape, frozen.device, owner=frozen._owner)
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
            multiply = super()._times_features
            # A part of a weight is another matrix.
            key = (id(self), name, matrix.words.data_ptr()) if isinstance(matrix, PackedMatrix) else None
            of_nodes = None if key is None else mapped_nodes(key, x, lambda rows: multiply(rows, name, matrix))
            return multiply(x, name, matrix) if of_nodes is None else of_nodes


class PackedOwnModule(PackedOwnWeights):
    """Packed form of any module that is no ``MessagePassing``."""

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        if type(layer).quantizes_output:
            return "its output is quantized"
        return super().refuses(layer) if own_weights(layer) else None


class PackedOwnConv(PackedOwnWeights, PackedMessagePassing):
    """Packed form of any ``MessagePassing`` that multiplies by weights of its own."""

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        return PackedMessagePassing.refuses.__func__(cls, layer) or super().refuses(layer)  # type: ignore[attr-defined]


register_packed(QuantizedOwnModule, PackedOwnModule)
register_packed(QuantizedOwnConv, PackedOwnConv)
