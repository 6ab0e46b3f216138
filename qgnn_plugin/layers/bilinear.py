"""Bilinear maps, and linear maps by type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantizers.autocast import full_precision
from .products import INPUT, MultipliesWeights, QuantizedWeights

__all__ = ["QuantizedBilinear", "QuantizedHeteroLinear", "RunsBilinear", "RunsHeteroLinear"]


class RunsBilinear(MultipliesWeights):
    """The forward of :class:`torch.nn.Bilinear`: integer products with the second input, then a float one."""

    bias: Tensor | None

    @classmethod
    def _as_matrix(cls, layer: Any, name: str, weight: Tensor) -> Tensor:
        return weight.reshape(-1, weight.size(2))

    @full_precision
    def _product(self: Any, first: Tensor, second: Tensor) -> Tensor:
        for x, width in ((first, self.in1_features), (second, self.in2_features)):
            if x.size(-1) != width or x.shape[:-1] != first.shape[:-1]:
                raise ValueError(
                    f"Expected features [*, {self.in1_features}] and [*, {self.in2_features}] at "
                    f"'{self._qualified_name}' (got {list(first.shape)} and {list(second.shape)})"
                )
        maps = self._mapped(second, INPUT, "weight").unflatten(-1, (self.out_features, self.in1_features))
        y = (maps * first.unsqueeze(-2)).sum(-1)
        return y if self.bias is None else y + self.bias


class QuantizedBilinear(RunsBilinear, QuantizedWeights):
    """Quantized :class:`torch.nn.Bilinear`.  Sites: ``input``, the second one, and ``weight``."""

    @classmethod
    def _input_widths(cls, layer: Any) -> dict[str, int]:
        return {INPUT: layer.in2_features}

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        if self.is_off:
            return super().forward(input1, input2)  # type: ignore[misc]
        return self._product(input1, input2)


class RunsHeteroLinear(MultipliesWeights):
    """The forward of :class:`torch_geometric.nn.HeteroLinear`: a linear map for the rows of each type."""

    bias: Tensor | None
    num_types: int
    out_channels: int

    @classmethod
    def _as_matrix(cls, layer: Any, name: str, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).reshape(-1, weight.size(1))

    @classmethod
    def _of_matrix(cls, layer: Any, name: str, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.view(shape[0], shape[2], shape[1]).transpose(1, 2)

    @full_precision
    def _by_type(self: Any, x: Tensor, type_vec: Tensor) -> Tensor:
        if x.dim() != 2 or type_vec.shape != x.shape[:1]:
            raise ValueError(
                f"Expected features [N, F] and types [N] at '{self._qualified_name}' (got {list(x.shape)} and "
                f"{list(type_vec.shape)})"
            )
        weight, width = self._quantized_weight("weight"), self.out_channels
        out = x.new_zeros(x.size(0), width)
        for kind in type_vec.unique().tolist():
            rows = (type_vec == kind).nonzero().view(-1)
            own = self._part(weight, kind * width, (kind + 1) * width)
            y = self._times(self._taken(x[rows], INPUT), own, None if self.bias is None else self.bias[kind])
            out = out.index_copy(0, rows, y)
        return out


class QuantizedHeteroLinear(RunsHeteroLinear, QuantizedWeights):
    """Quantized :class:`torch_geometric.nn.HeteroLinear`.  Sites: ``input`` and ``weight``."""

    @classmethod
    def _input_widths(cls, layer: Any) -> dict[str, int]:
        return {INPUT: layer.in_channels}

    def forward(self, x: Tensor, type_vec: Tensor) -> Tensor:
        if self.is_off:
            return super().forward(x, type_vec)  # type: ignore[misc]
        return self._by_type(x, type_vec)
