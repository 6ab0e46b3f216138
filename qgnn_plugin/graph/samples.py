"""Features of several samples on one graph, ``[*, N, F]``: the rows of as many copies of the graph, side by side."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Pair", "Samples"]


class Samples(NamedTuple):
    """Where node features have their samples and nodes.

    Args:
        leading: Sizes of the dimensions of samples; none for ``[N, F]``.
        num_nodes: ``N``, of one sample.
        position: The dimension of nodes, as PyG's ``node_dim``; features are always in the last.
    """

    leading: tuple[int, ...]
    num_nodes: int
    position: int = 0

    @classmethod
    def of(cls, layer: Any, x: Tensor) -> Samples:
        """Those of ``x``, which ``layer`` takes.

        Raises:
            ValueError: If ``x`` has no dimension of nodes before that of features.
        """
        node_dim, dim = layer.node_dim, x.dim()
        if dim == 2 and node_dim in (-2, 0):
            return cls((), x.size(0))
        position = node_dim + dim if node_dim < 0 else node_dim
        if not 0 <= position < dim - 1:
            raise ValueError(
                f"Expected node features of shape [*, N, F] in '{layer_name(layer)}', with nodes in a dimension before "
                f"the last (got shape {list(x.shape)} and node_dim={node_dim})"
            )
        shape = tuple(x.shape[:-1])
        return cls(shape[:position] + shape[position + 1 :], shape[position], position)

    @property
    def copies(self) -> int:
        """How many samples there are."""
        return math.prod(self.leading)

    @property
    def are_one(self) -> bool:
        """Whether features are a matrix ``[N, F]``."""
        return not self.leading

    def rows(self, x: Tensor) -> Tensor:
        """``[*, M, F]`` of any number of nodes ``M`` as the rows ``[copies M, F]``, sample by sample."""
        if self.are_one:
            return x
        return x.movedim(self.position, -2).reshape(self.copies * x.size(self.position), x.size(-1))

    def shaped(self, rows: Tensor) -> Tensor:
        """Rows ``[copies M, F]`` of any number of nodes ``M`` as ``[*, M, F]``."""
        if self.are_one:
            return rows
        num_nodes = rows.size(0) // self.copies if self.copies else self.num_nodes
        return rows.reshape(*self.leading, num_nodes, rows.size(-1)).movedim(-2, self.position)


class Pair(NamedTuple):
    """Source and target features of the same samples.

    Args:
        samples: How the layer's result is shaped.
        sent: Rows of the nodes that send.
        own: Rows of the nodes of the result, which add their own share; the same object where these are the nodes that
            send, :obj:`None` without features.
        num_src: Nodes of one sample that send.
        num_dst: Nodes of one sample that receive, :obj:`None` without features.
    """

    samples: Samples
    sent: Tensor
    own: Tensor | None
    num_src: int
    num_dst: int | None

    @classmethod
    def of(cls, layer: Any, x: tuple[Tensor, Tensor | None]) -> Pair:
        """Those of ``x``, whose samples are broadcast as by PyG.  The first of the two sends, whatever the flow.

        Raises:
            ValueError: If their samples do not match.
        """
        first, second = x
        if second is None or second is first:
            samples = Samples.of(layer, first)
            rows = samples.rows(first)
            if second is None:
                return cls(samples, rows, None, samples.num_nodes, None)
            return cls(samples, rows, rows, samples.num_nodes, samples.num_nodes)
        samples, others = Samples.of(layer, first), Samples.of(layer, second)
        if samples.leading != others.leading:
            samples, others, first, second = _broadcast(layer, samples, others, first, second)
        return cls(samples, samples.rows(first), others.rows(second), samples.num_nodes, others.num_nodes)


def _broadcast(
    layer: Any, samples: Samples, targets: Samples, x_src: Tensor, x_dst: Tensor
) -> tuple[Samples, Samples, Tensor, Tensor]:
    shapes = f"{list(x_src.shape)} and {list(x_dst.shape)}"
    error = f"Expected source and target features of the same samples in '{layer_name(layer)}' (got shapes {shapes})"
    if layer.node_dim >= 0 and x_src.dim() != x_dst.dim():
        raise ValueError(error)
    try:
        leading = tuple(torch.broadcast_shapes(samples.leading, targets.leading))
    except RuntimeError:
        raise ValueError(error) from None
    position = samples.position if layer.node_dim >= 0 else len(leading)
    found = []
    for x, own in ((x_src, samples), (x_dst, targets)):
        spread = x.movedim(own.position, -2).expand(*leading, own.num_nodes, x.size(-1)).movedim(-2, position)
        found.append((Samples(leading, own.num_nodes, position), spread))
    (samples, x_src), (targets, x_dst) = found
    return samples, targets, x_src, x_dst


def layer_name(layer: Any) -> str:
    """The name of a layer in its model, that of its class outside of one."""
    return getattr(layer, "_qualified_name", "") or type(layer).__name__
