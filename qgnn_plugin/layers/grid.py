"""Convolutions over a grid, of one and two dimensions: linear maps of patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizers.autocast import full_precision
from .products import INPUT, MultipliesWeights, QuantizedWeights

__all__ = ["QuantizedGridConv", "RunsGridConv"]


class RunsGridConv(MultipliesWeights):
    """The forward of ``Conv1d`` and ``Conv2d``."""

    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Any
    padding_mode: str
    groups: int
    out_channels: int
    _reversed_padding_repeated_twice: list[int]

    @full_precision
    def _convolved(self: Any, x: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        if x.dim() not in (dims + 1, dims + 2) or x.size(-dims - 1) != self.in_channels:
            raise ValueError(
                f"Expected {self.in_channels} channels over {dims} dimensions at '{self._qualified_name}' (got "
                f"{list(x.shape)})"
            )
        batched = x.dim() == dims + 2
        patches, grid = self._patches(x if batched else x.unsqueeze(0))
        weight, width = self._quantized_weight("weight"), self.out_channels // self.groups
        parts = []
        for group, rows in enumerate(patches.unbind(1)):
            bias = None if self.bias is None else self.bias[group * width : (group + 1) * width]
            own = self._part(weight, group * width, (group + 1) * width)
            parts.append(self._times(self._taken(rows.flatten(0, -2), INPUT), own, bias))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        y = y.view(patches.size(0), patches.size(2), self.out_channels).transpose(1, 2).unflatten(2, grid)
        if not _is_channels_last(x):  # callers take views of what torch lays out in one piece
            y = y.contiguous()
        return y if batched else y.squeeze(0)

    def _patches(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """What the weight of each group sees ``[B, groups, positions, C / groups * kernel]``, and the grid of these.

        Padding is part of it: a patch is a row like any other.
        """
        x = F.pad(x, self._margins(), mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        grid = []
        for axis, (size, step, gap) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True)):
            reach = gap * (size - 1) + 1
            if x.size(2 + axis) < reach:
                raise ValueError(f"Expected at least {reach} elements in dimension {2 + axis} (got {list(x.shape)})")
            x = x.unfold(2 + axis, reach, step)[..., ::gap]
            grid.append(x.size(2 + axis))
        dims = len(grid)
        x = x.unflatten(1, (self.groups, -1)).movedim(2, 2 + dims)  # [B, groups, *grid, C / groups, *kernel]
        return x.flatten(2 + dims).flatten(2, 1 + dims), tuple(grid)

    def _margins(self) -> list[int]:
        """What :func:`torch.nn.functional.pad` takes."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return list(self._reversed_padding_repeated_twice)
        return [margin for width in reversed(self.padding) for margin in (width, width)]


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class QuantizedGridConv(RunsGridConv, QuantizedWeights):
    """Quantized ``Conv1d`` or ``Conv2d``.

    Sites: ``input``, the patches (with a range per node: one per patch), and ``weight``.
    """

    @classmethod
    def _input_widths(cls, layer: Any) -> dict[str, int]:
        return {INPUT: layer.weight[0].numel()}

    def forward(self, input: Tensor) -> Tensor:
        if self.is_off:
            return super().forward(input)  # type: ignore[misc]
        return self._convolved(input)
