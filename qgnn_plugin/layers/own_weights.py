"""Layers and models whose own code multiplies by parameters of theirs, or reads the tables inside them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import Linear as PyGLinear

from ..config import OFF
from ..quantizers.autocast import full_precision
from .base import SiteFactory
from .embedding import QuantizedEmbedding
from .factors import Factor, UsedWeight, reading, readings
from .linear import QuantizedLinear
from .message_passing import QuantizedMessagePassing
from .naming import float_class_of
from .products import QuantizedWeights
from .reads import reads_of, with_reading

__all__ = ["OwnWeights", "QuantizedOwnConv", "QuantizedOwnModule", "WeightsAsRows", "own_tables", "own_weights"]


def own_weights(layer: nn.Module) -> dict[str, int]:
    """The parameters of ``layer`` that its code multiplies features by, with the dimension that is summed over."""
    names = reads_of(float_class_of(layer)).weights
    shapes = {name: _shape(layer, name) for name in names}
    return {name: dim for name, dim in names.items() if is_matrix(shapes[name]) and -dim <= len(shapes[name])}


def own_tables(layer: nn.Module) -> list[nn.Module]:
    """The tables and linear maps inside ``layer`` whose weights its code reads past them."""
    reads = reads_of(float_class_of(layer))
    if reads.deep:
        return [inner for inner in layer.modules() if inner is not layer and isinstance(inner, (nn.Embedding, *LINEAR))]
    children = ((name, layer._modules.get(name)) for name in sorted(reads.tables))
    kinds = {name: (nn.Embedding, *LINEAR) if name in reads.maps else nn.Embedding for name in reads.tables}
    return [child for name, child in children if child is not None and isinstance(child, kinds[name])]


LINEAR = (nn.Linear, PyGLinear)


def _shape(layer: Any, name: str) -> tuple[int, ...]:
    parameter = layer._parameters.get(name)
    if parameter is None:
        return tuple(layer.__dict__.get("_shapes", {}).get(name, ()))  # of a packed one
    return () if isinstance(parameter, nn.parameter.UninitializedParameter) else tuple(parameter.shape)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of ``shape`` has rows, and more than one, of more than one number."""
    return len(shape) >= 2 and min(shape[-2:]) > 1


class WeightsAsRows:
    """Mixin of such layers, converted and packed: their weights, whichever dimension is summed over, as rows."""

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

    @full_precision
    def _times_features(self: Any, x: Tensor, name: str, matrix: Any) -> Tensor:
        """``x`` ``[*, K]`` by the weight ``name``, as ``matrix``: ``[*, O]``."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.size(-1))
        y: Tensor = self._times(self._taken(rows, f"{name}_input_quantizer"), matrix)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.size(-1))


class OwnWeights(WeightsAsRows, QuantizedWeights):
    """What converted layers of this kind have in common.

    Sites: of each weight ``W`` one for it and one for the features that it is multiplied by, ``W_input``.
    """

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        for name, summed in own_weights(layer).items():
            weight = layer._parameters[name].detach()
            setattr(layer, f"{name}_input_quantizer", sites.features(f"{name}_input", weight.size(summed)))
            setattr(layer, f"{name}_quantizer", sites.weight(name, rows_of(weight, summed)))

    def _weight_sites(self: Any) -> dict[str, Tensor]:
        return {f"{name}_quantizer": self._parameters[name] for name in own_weights(self)}

    @classmethod
    def _own_methods(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        """The methods and properties of ``float_class`` that read weights, as those of its quantized form."""
        found = reads_of(float_class).methods
        return {name: with_reading(getattr(float_class, name), _reading_weights) for name in found}

    def __getattr__(self: Any, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if not isinstance(value, nn.Parameter) or not self._is_quantized(name):
            return value
        found = None if torch.compiler.is_compiling() else readings(self)
        if found is None:
            return value
        if name not in found:
            found[name] = self._used(name, value)
        return found[name]

    def _is_quantized(self: Any, name: str) -> bool:
        """Whether anything is, of the weight ``name`` or of what it is multiplied by."""
        sites = (self._modules.get(f"{name}{suffix}") for suffix in ("_quantizer", "_input_quantizer"))
        return any(site is not None and site.bits != OFF for site in sites)

    def _used(self: Any, name: str, weight: Tensor) -> Tensor:
        """What stands for a weight in the layer's own code."""
        site = self._modules[f"{name}_quantizer"]
        summed = own_weights(self)[name]
        matrix = site(rows_of(weight, summed))
        values = weight_of(matrix.dequantize(), weight.shape, summed).contiguous()
        return UsedWeight.of(values, factor(self, name, matrix, weight.shape))


def factor(layer: Any, name: str, matrix: Any, shape: tuple[int, ...]) -> Factor:
    """The weight ``name`` of ``layer`` as a factor of products."""
    summed = own_weights(layer)[name]
    *lead, num_out = (size for dim, size in enumerate(shape) if dim != len(shape) + summed)
    return Factor(layer, name, matrix, tuple(lead), num_out, shape[summed], summed)


def rows_of(weight: Tensor, summed: int) -> Tensor:
    """A weight, the dimension ``summed`` of which is ``K``, as rows ``[O, K]``."""
    return weight.movedim(summed, -1).reshape(-1, weight.size(summed))


def weight_of(rows: Tensor, shape: Any, summed: int) -> Tensor:
    """The weight of a shape that has these rows."""
    sizes = [size for dim, size in enumerate(shape) if dim != len(shape) + summed]
    return rows.view(*sizes, shape[summed]).movedim(-1, summed)


def _reading_weights(method: Any) -> Any:
    @functools.wraps(method)
    def reads(self: Any, *args: Any, **kwargs: Any) -> Any:
        tables = [child for child in own_tables(self) if isinstance(child, (QuantizedEmbedding, QuantizedLinear))]
        if all(layer.is_off for layer in (self, *tables)):
            return method(self, *args, **kwargs)
        return own(self, tables, *args, **kwargs)

    def read(self: Any, tables: list[Any], *args: Any, **kwargs: Any) -> Any:
        with reading(self, *tables):
            return method(self, *args, **kwargs)

    own = outside_compiler(read)
    return reads


def outside_compiler(method: Any) -> Any:
    """``method`` run as it is where a compiler comes to it: what stands for a weight there is told by its type."""
    eager = torch.compiler.disable(
        method, reason="products with parameters that a layer's own code reads are not compiled; use Linear layers"
    )

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (eager if torch.compiler.is_compiling() else method)(self, *args, **kwargs)

    return run


class QuantizedOwnConv(OwnWeights, QuantizedMessagePassing):
    """Any ``MessagePassing`` that multiplies by weights of its own."""

    @classmethod
    def attach(cls, layer: Any, sites: SiteFactory) -> None:
        QuantizedMessagePassing.attach.__func__(cls, layer, sites)  # type: ignore[attr-defined]
        OwnWeights.attach.__func__(cls, layer, sites)  # type: ignore[attr-defined]


class QuantizedOwnModule(OwnWeights):
    """Any other module that multiplies by weights of its own, or reads the rows of a table inside it."""
