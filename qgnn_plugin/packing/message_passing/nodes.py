"""Features of nodes as packed rows, in the shape that a layer sends them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers.ranges import PackedRange, PackedTensor
from ..lazy.deferred import materialized

__all__ = ["PackedNodes", "is_features", "packed_nodes", "values_of"]


@dataclass(frozen=True, eq=False)
class PackedNodes:
    """Node features of any shape as codes: one packed row per node, and sample where there are several.

    Args:
        packed: ``[S N, F]``, sample after sample, with ``F`` the numbers of one node in the order of the dimensions
            after that of nodes.
        shape: As the layer has them: those of ``S`` samples, nodes, and the numbers of a node.
        dim: The dimension of nodes.
    """

    packed: PackedTensor
    shape: torch.Size
    dim: int

    def size(self, dim: int) -> int:
        return self.shape[dim]

    @property
    def num_samples(self) -> int:
        return math.prod(self.shape[: self.dim])

    def sample(self, number: int) -> PackedNodes:
        """The features of one sample alone."""
        shape = self.shape[self.dim :]
        rows = self.packed.rows(number * shape[0], (number + 1) * shape[0])
        return PackedNodes(rows, shape, 0)

    def values(self) -> Tensor:
        """What the codes stand for, in the layer's shape."""
        return self.packed.dequantize().view(self.shape)

    def take(self, nodes: Tensor) -> Tensor:
        """The values of ``nodes`` ``[M]`` in the place of all: what ``index_select`` gives of :meth:`values`."""
        rows = nodes
        if self.dim:
            firsts = torch.arange(self.num_samples, device=nodes.device) * self.shape[self.dim]
            rows = (firsts.view(-1, 1) + nodes).view(-1)
        shape = (*self.shape[: self.dim], nodes.numel(), *self.shape[self.dim + 1 :])
        return self.packed.take(rows).dequantize().view(shape)


def is_features(value: Any) -> bool:
    """Whether ``value`` is a tensor, packed or not."""
    return isinstance(value, (Tensor, PackedNodes))


def values_of(value: Any) -> Any:
    """Replace packed features, also of a pair, by their values."""
    if isinstance(value, (tuple, list)):
        sides: list[Any] = []
        for side in value:  # one object stays one: layers ask whether both sides are the same
            again = next((done for one, done in zip(value, sides, strict=False) if one is side), None)
            sides.append(values_of(side) if again is None else again)
        return type(value)(sides) if type(value) in (tuple, list) else tuple(sides)
    return value.values() if isinstance(value, PackedNodes) else value


def packed_nodes(site: PackedRange, x: Tensor, node_dim: int) -> PackedNodes | Tensor:
    """``x`` in the range of ``site``; its values where they have no packed rows.

    Args:
        site: The range.
        x: Features, dense.
        node_dim: The dimension of nodes, as in PyG.
    """
    dim = node_dim + x.dim() if node_dim < 0 else node_dim
    per_row = site.spec.granularity != "tensor"
    if not 0 <= dim < x.dim() or (per_row and dim == x.dim() - 1):
        return _rounded(site, materialized(x))
    if dim == 0 and x.dim() == 2:
        packed = site(x)
        return PackedNodes(packed, x.shape, 0) if isinstance(packed, PackedTensor) else packed.dequantize()
    shape, x = x.shape, materialized(x)
    if x.numel() == 0:
        return _rounded(site, x)
    rows = x.flatten(0, dim)  # each node of each sample
    middle = math.prod(rows.shape[1:-1])
    if per_row and middle > 1:
        site.expect(x)
        site.expect_finite(x)
        packed = site.quantize_heads(rows.reshape(rows.size(0), middle, rows.size(-1)).contiguous())
    else:
        packed = site(rows.reshape(rows.size(0), math.prod(rows.shape[1:])))
    return PackedNodes(packed, shape, dim) if isinstance(packed, PackedTensor) else packed.dequantize().view(shape)


def _rounded(site: PackedRange, x: Tensor) -> Tensor:
    """``x`` in its range, as floats."""
    if x.dim() < 2 or x.numel() == 0:
        flat = x.reshape(-1, 1) if x.dim() else x.reshape(1, 1)
        return x if x.numel() == 0 else site(flat).dequantize().view(x.shape)
    return site(x.reshape(-1, x.size(-1))).dequantize().view(x.shape)
