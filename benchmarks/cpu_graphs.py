"""The graphs that kernels are timed on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from qgnn_plugin.kernels.plan import GraphPlan

__all__ = ["graphs", "power_law"]

EXPONENT = 0.5  # of the weight of a node in its rank


def power_law(num_nodes: int, num_edges: int, seed: int = 0) -> GraphPlan:
    """Endpoints drawn with weights that fall as a power of a random rank, sources and targets apart.

    170,000 nodes and 2 million edges give a mean degree of 12 and a largest of about 2,400.
    """
    generator = np.random.default_rng(seed)
    weight = np.arange(1, num_nodes + 1) ** -EXPONENT
    cumulated = np.cumsum(weight / weight.sum())

    def endpoints() -> torch.Tensor:
        rank = np.searchsorted(cumulated, generator.random(num_edges)).clip(0, num_nodes - 1)
        return torch.from_numpy(generator.permutation(num_nodes)[rank])

    return GraphPlan.from_edges(endpoints(), endpoints(), num_nodes, num_nodes)


def graphs(num_nodes: int, num_edges: int, files: list[str]) -> Iterator[tuple[str, GraphPlan]]:
    """The generated graph, then ``name=file.npz`` with arrays ``rowptr`` and ``col``."""
    yield f"power-law {_short(num_nodes)}/{_short(num_edges)}", power_law(num_nodes, num_edges)
    for file in files:
        name, path = file.split("=", 1)
        arrays = np.load(Path(path))
        rowptr = torch.from_numpy(arrays["rowptr"].astype(np.int64))
        col = torch.from_numpy(arrays["col"].astype(np.int32))
        yield name, GraphPlan(rowptr, col, rowptr.numel() - 1)


def _short(count: int) -> str:
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if count >= unit:
            return f"{count / unit:g}{letter}"
    return str(count)
