"""Packed layers with several weights of their own, or with one that is no ``[O, K]`` matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...config import OFF
from ...kernels.checksum import checksum
from ...layers.products import MultipliesWeights, is_computed
from ...quantizers import QuantizedTensor
from ..lazy.weight import FrozenWeight, read_only
from .base import LayerSpec, PackedLayer
from .held_codes import HeldCodes
from .matrix import Activation, PackedMatrix, wide_product
from .ranges import UNSET, SiteSpec

__all__ = ["PackedWeight", "PackedWeights"]


class PackedWeight(nn.Module):
    """A weight ``[O, K]``, frozen: packed words and their range, or at 32 bits the matrix itself.

    Args:
        spec: The site that quantized it.
        num_out: ``O``.
        num_in: ``K``.
        device: Where it is.
    """

    words: Tensor | None
    values: Tensor | None
    scale: Tensor
    lower_end: Tensor | None

    def __init__(self, spec: SiteSpec, num_out: int, num_in: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec, self.num_out, self.num_in = spec, num_out, num_in
        words = values = lower = None
        scale: Any = None
        if spec.bits in (OFF, UNSET):  # a parameter, as the weight was: it tells device and dtype
            values = nn.Parameter(torch.zeros(num_out, num_in, dtype=torch.float32, device=device), requires_grad=False)
        else:
            words, scale, lower = HeldCodes.empty(spec, num_out, num_in, device)
        self.register_buffer("words", words)
        self.register_parameter("values", values)
        self.register_parameter("scale", scale)
        self.register_buffer("lower_end", lower)

    @torch.no_grad()
    def fill(self, weight: Tensor, quantized: QuantizedTensor | None) -> None:
        """Take the values of a weight, or its codes where they are packed."""
        if self.values is not None:
            self.values.copy_(weight)
            return
        assert quantized is not None
        assert self.words is not None
        HeldCodes(self.words, self.scale, self.lower_end).fill(quantized, self.spec.bits)

    @property
    def lower(self) -> Tensor:
        """Lower end of the range, shaped as ``scale``."""
        if self.lower_end is not None:
            return self.lower_end
        assert self.spec.zero_code is not None
        return self.scale * -self.spec.zero_code

    @property
    def matrix(self) -> PackedMatrix | Tensor:
        """What products take: the words with their range, or the matrix itself."""
        if self.values is not None:
            return self.values
        assert self.words is not None
        spec = self.spec
        return PackedMatrix.of(self.words, self.scale, self.lower, self.num_in, spec.bits, spec.zero_code == 0)

    def dequantize(self) -> Tensor:
        """``[O, K]`` float32."""
        return self.values.detach() if self.values is not None else self.matrix.codes().dequantize().detach()  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"{self.num_out}, {self.num_in}, bits={self.spec.bits}"


class PackedWeights(MultipliesWeights, PackedLayer):
    """Base of packed layers whose weights are :class:`PackedWeight` in the place of the quantizers they had.

    Each may still be read by its name as the float tensor that it stands for.
    """

    _shapes: dict[str, torch.Size]  # of the weights, by name

    @classmethod
    def kept(cls, layer: Any) -> dict[str, Any]:
        state = super().kept(layer)
        for name in cls._weight_names(layer):
            state["_parameters"].pop(name, None)
        return state

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        names = self._weight_names(layer)
        self.__dict__["_shapes"] = {name: getattr(layer, name).shape for name in names}
        super().freeze(layer, spec)
        for name in names:
            shape = self._as_matrix(layer, name, getattr(layer, name).detach()).shape
            site = f"{name}_quantizer"
            self.add_module(site, PackedWeight(spec.sites[site], shape[0], shape[1], getattr(layer, name).device))

    def _holds_range(self, site: str) -> bool:
        return site.removesuffix("_quantizer") not in self._shapes

    @torch.no_grad()
    def fill(self: Any, layer: Any) -> None:
        super().fill(layer)
        sites = dict(layer.own_quantizers())
        for site, matrix in layer._weight_matrices().items():
            target = self.get_submodule(site)
            target.fill(matrix, sites[site](matrix) if target.words is not None else None)

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        names = cls._weight_names(layer)
        if is_computed(layer, names):
            return "its weights are computed from others"
        others = {getattr(layer, name).dtype for name in names} - {torch.float32}
        if others:
            return f"its weights are {str(others.pop()).removeprefix('torch.')}"
        if type(layer).quantizes_output and cls._returns_tuples(layer):
            return "its output, a tuple, is quantized"
        return "32 bits" if layer.is_off else None

    @classmethod
    def _returns_tuples(cls, layer: Any) -> bool:
        del layer
        return False

    def _equal_parts(self: Any, name: str, count: int) -> list[PackedMatrix | Tensor]:
        """The rows of the weight ``name`` in ``count`` parts of as many each, to be multiplied by one by one.

        They are made once for as long as the weight is the same and its range holds the same.
        """
        site, known = self._modules[f"{name}_quantizer"], self._packed.last.parts.get(name)
        held = [t for t in (site.scale, site.lower_end) if t is not None]
        key = (count, site.words, site.values, *(checksum(t) for t in held))
        if known is None or len(known[0]) != len(key) or any(map(_differ, known[0], key)):
            weight, num_rows = self._quantized_weight(name), site.num_out // count
            parts = [self._part(weight, k * num_rows, (k + 1) * num_rows) for k in range(count)]
            parts = [replace(part, is_checked=True) if isinstance(part, PackedMatrix) else part for part in parts]
            self._packed.last.parts[name] = known = (key, parts)
        return known[1]

    # The weights by name ##############################################################################################

    def __getattr__(self, name: str) -> Any:
        shapes = self.__dict__.get("_shapes", {})
        if name not in shapes:
            return super().__getattr__(name)  # type: ignore[misc]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._dequantized(name)
        return self._stand_in(name)

    def _dequantized(self, name: str) -> Tensor:
        """The values of the weight ``name``."""
        matrix = self._modules[f"{name}_quantizer"].dequantize()
        return self._of_matrix(self, name, matrix, self._shapes[name]).contiguous()

    def _stand_in(self, name: str) -> Tensor:
        """The weight ``name``, dequantized where its values are touched."""
        site = self._modules[f"{name}_quantizer"]
        device = (site.values if site.words is None else site.words).device
        label = f"{self._qualified_name}.{name}"
        shape, is_read = self._shapes[name], self._packed.is_read
        owner = self._qualified_name
        return FrozenWeight(label, lambda: self._dequantized(name), shape, device, is_read, owner)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_shapes", {}):
            raise read_only(self._qualified_name, f"an assignment to {name}")
        super().__setattr__(name, value)

    def as_float(self) -> nn.Module:
        view = super().as_float()
        view.__dict__ |= {name: getattr(self, name) for name in self._shapes}
        return view

    def added_names(self) -> Iterable[str]:
        return (*super().added_names(), "_shapes")

    def _packed_weights(self) -> dict[str, tuple[None, int, int]]:
        """Size of each weight and bits of its codes, by the name of the site."""
        sites = self._packed.spec.sites
        return {f"{n}_quantizer": (None, s.numel(), sites[f"{n}_quantizer"].bits) for n, s in self._shapes.items()}

    # Products #########################################################################################################

    def _taken(self: Any, x: Tensor, site: str) -> Activation:
        return self._modules[site](x)

    def _quantized_weight(self, name: str) -> PackedMatrix | Tensor:
        return self._modules[f"{name}_quantizer"].matrix

    def _part(self, weight: PackedMatrix | Tensor, start: int, stop: int) -> PackedMatrix | Tensor:
        return weight.rows(start, stop) if isinstance(weight, PackedMatrix) else weight[start:stop]

    def _times(self, x: Activation, weight: PackedMatrix | Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, PackedMatrix):
            return weight.times(x, bias)
        return wide_product(x, QuantizedTensor.identity(weight), bias)


def _differ(one: Any, other: Any) -> bool:
    return one != other if isinstance(one, int) else one is not other
