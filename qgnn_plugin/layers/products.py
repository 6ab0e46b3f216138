"""Layers that multiply by several weights of their own, or by one that is no ``[O, K]`` matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..quantizers import QuantizedTensor
from .arithmetic import linear
from .base import QuantizedLayer, SiteFactory

__all__ = ["INPUT", "MultipliesWeights", "QuantizedWeights", "weight_rows"]

INPUT = "input_quantizer"  # the site of the features that a weight multiplies


class MultipliesWeights:
    """What the converted and the packed form of such a layer share: its forward is written once, by these methods."""

    training: bool

    @classmethod
    def _weight_names(cls, layer: Any) -> tuple[str, ...]:
        """Names of the parameters that ``layer`` multiplies by."""
        del layer
        return ("weight",)

    @classmethod
    def _as_matrix(cls, layer: Any, name: str, weight: Tensor) -> Tensor:
        """The weight ``name`` as ``[O, K]``: rows that features are multiplied by."""
        del layer, name
        return weight.flatten(1)

    @classmethod
    def _of_matrix(cls, layer: Any, name: str, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The weight of a shape that is such a matrix."""
        del layer, name
        return matrix.view(shape)

    def _taken(self, x: Tensor, site: str) -> Any:
        """``[N, K]`` as the site takes it."""
        raise NotImplementedError

    def _quantized_weight(self, name: str) -> Any:
        """A weight, to be multiplied by."""
        raise NotImplementedError

    def _part(self, weight: Any, start: int, stop: int) -> Any:
        """The rows ``[start, stop)`` of what :meth:`_quantized_weight` gives."""
        raise NotImplementedError

    def _times(self, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b``, of what :meth:`_taken` and :meth:`_quantized_weight` give."""
        raise NotImplementedError

    def _mapped(self, x: Tensor, site: str, name: str, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b`` of ``[*, K]``."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.size(-1))
        weight = self._quantized_weight(name)
        y = self._times(self._taken(rows, site), weight, bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.size(-1))


class QuantizedWeights(MultipliesWeights, QuantizedLayer):
    """Base of converted layers with weights of their own: the sites ``<weight>_quantizer`` and those of inputs."""

    @classmethod
    def _input_widths(cls, layer: Any) -> dict[str, int]:
        """Widths of the inputs that are multiplied, by the names of their sites."""
        raise NotImplementedError

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        for site, width in cls._input_widths(layer).items():
            setattr(layer, site, sites.features(site.removesuffix("_quantizer"), width))
        for name in cls._weight_names(layer):
            matrix = cls._as_matrix(layer, name, getattr(layer, name).detach())
            setattr(layer, f"{name}_quantizer", sites.weight(name, matrix))

    def _weight_sites(self: Any) -> dict[str, Tensor]:
        return {f"{name}_quantizer": getattr(self, name) for name in self._weight_names(self)}

    def _weight_matrices(self) -> dict[str, Tensor]:
        named = ((site.removesuffix("_quantizer"), weight) for site, weight in self._weight_sites().items())
        return {f"{name}_quantizer": self._as_matrix(self, name, weight) for name, weight in named}

    def _taken(self, x: Tensor, site: str) -> QuantizedTensor:
        return getattr(self, site)(x, codes_kept=True)

    def _quantized_weight(self, name: str) -> QuantizedTensor:
        return getattr(self, f"{name}_quantizer")(self._as_matrix(self, name, getattr(self, name)))

    def _part(self, weight: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
        return weight_rows(weight, start, stop)

    def _times(self, x: QuantizedTensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias, exact=not self.training)

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the state of a version that left such layers as they were: it has no sites."""
        for site, quantizer in self.own_quantizers():
            for name, tensor in quantizer.state_dict().items():
                state_dict.setdefault(f"{prefix}{site}.{name}", tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def weight_rows(weight: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """The rows ``[start, stop)`` of a matrix, whose range is one or one per row."""
    rows = weight.codes.size(0)

    def cut(values: Tensor) -> Tensor:
        return values[start:stop] if values.dim() and values.size(0) == rows else values

    return QuantizedTensor(cut(weight.codes), cut(weight.scale), cut(weight.lower), weight.qmax, weight.unsigned)


def is_computed(layer: Any, names: tuple[str, ...]) -> bool:
    """Whether one of the weights ``names`` is computed from others: by a parametrization, or a hook."""
    return parametrize.is_parametrized(layer) or any(not isinstance(_own(layer, name), nn.Parameter) for name in names)


def _own(layer: nn.Module, name: str) -> Tensor | None:
    return layer._parameters.get(name)
