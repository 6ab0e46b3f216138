"""Which fields of a batch go into a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["model_inputs"]

# Fields that a PyG model may take besides x and edge_index, as its forward names them.
OPTIONAL_FIELDS = ("edge_weight", "edge_attr", "edge_type", "batch", "pos")


def model_inputs(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of ``model`` for a batch.

    A tuple or list is passed as it is, a mapping as keywords.  Of a PyG ``Data`` or ``Batch``, ``x`` and its adjacency
    (``adj_t`` where present, else ``edge_index``) are passed, and whichever of ``edge_weight``, ``edge_attr``,
    ``edge_type``, ``batch`` and ``pos`` the batch holds and ``model.forward`` names.  Of a ``HeteroData``,
    ``x_dict`` and ``edge_index_dict`` are passed.

    Raises:
        TypeError: If the batch is none of these.
    """
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if hasattr(batch, "edge_index_dict"):
        return (batch.x_dict, batch.edge_index_dict), {}
    if not hasattr(batch, "edge_index") and not hasattr(batch, "adj_t"):
        raise TypeError(
            f"Expected a PyG Data object, a tuple of arguments or a dict of keywords (got {type(batch).__name__})"
        )
    adjacency = getattr(batch, "adj_t", None)
    if adjacency is None:
        adjacency = batch.edge_index
    named = inspect.signature(model.forward).parameters
    optional = {
        name: getattr(batch, name)
        for name in OPTIONAL_FIELDS
        if name in named and getattr(batch, name, None) is not None
    }
    return (batch.x, adjacency), optional
