"""Layers with a weight per relation: relations of a graph cached, integer products added up where they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_geometric.typing
from torch import Tensor
from torch_geometric.nn import RGCNConv

from .matrix import PackedMatrix
from .plans import found_by_contents

__all__ = ["own_form"]

Form = Callable[..., Tensor | None]


def own_form(forward: Callable[..., Any]) -> Form | None:
    """What computes a ``forward`` of PyG in fewer passes; it gives nothing for arguments that it does not take."""
    return _FORMS.get(forward)


def edges_by_relation(edge_index: Tensor, edge_type: Tensor, num_relations: int) -> list[Tensor]:
    """The edges of each relation, in order; the same tensors while ``edge_index`` and ``edge_type`` hold the same."""

    def build() -> list[Tensor]:
        return [edge_index[:, edge_type == relation] for relation in range(num_relations)]

    return found_by_contents((edge_index, edge_type), ("relations", num_relations), build)


def rgcn(layer: Any, x: Any, edge_index: Any, edge_type: Any = None) -> Tensor | None:
    r"""RGCNConv: :math:`\sum_r \left( \mathrm{mean}_{j \in N_r(i)} x_j \right) W_r + x_i W_0 + b`.

    Term by term as PyG's own, in the same order, each added by the product that makes it.
    """
    x_l, x_r = x if isinstance(x, tuple) else (x, x)
    tensors = (x_l, x_r, edge_index, edge_type)
    if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors):
        return None
    if not (x_l.is_floating_point() and x_r.is_floating_point()) or torch_geometric.typing.WITH_SEGMM:
        return None
    terms = _Terms(layer)
    if not terms.are_packed:
        return None
    size = (x_l.size(0), x_r.size(0))
    for relation, edges in enumerate(edges_by_relation(edge_index, edge_type, layer.num_relations)):
        terms.add_relation(layer.propagate(edges, x=x_l, edge_type_ptr=None, size=size), relation)
    if terms.root is not None:
        terms.add(x_r, "root", terms.root)
    out = terms.total
    return out if layer.bias is None or out is None else out.add_(layer.bias)


class _Terms:
    """The sum over relations."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.total: Tensor | None = None
        self.weight = layer._weight("weight")
        self.root = layer._weight("root") if "root" in layer._shapes else None
        self.composed: Tensor | None = None
        if layer.num_bases is not None:
            weight = layer._dequantized("weight").view(layer.num_bases, -1)
            self.composed = (layer.comp @ weight).view(layer.num_relations, layer.in_channels_l, layer.out_channels)
        elif layer.num_blocks is not None:
            self.composed = layer._dequantized("weight")

    @property
    def are_packed(self) -> bool:
        return all(matrix is None or isinstance(matrix, PackedMatrix) for matrix in (self.weight, self.root))

    def add_relation(self, h: Tensor, relation: int) -> None:
        width = self.layer.out_channels
        if self.composed is None:
            return self.add(h, "weight", self.weight.rows(relation * width, (relation + 1) * width))
        if self.layer.num_blocks is None:
            return self._put(h @ self.composed[relation])
        blocks = h.view(-1, self.composed.size(1), self.composed.size(2))
        return self._put(torch.einsum("abc,bcd->abd", blocks, self.composed[relation]).reshape(-1, width))

    def add(self, x: Tensor, name: str, matrix: PackedMatrix) -> None:
        """``x W^T``, of integers."""
        taken = self.layer._taken(x, f"{name}_input_quantizer")
        product = matrix.product(taken, None)
        if product is None or self.total is None or not product.adds:
            self._put(matrix.times(taken) if product is None else product())
        else:
            self.total = product.run(0, product.num_rows, addend=self.total)

    def _put(self, term: Tensor) -> None:
        self.total = term if self.total is None else self.total.add_(term)


_FORMS: dict[Callable[..., Any], Form] = {RGCNConv.forward: rgcn}
