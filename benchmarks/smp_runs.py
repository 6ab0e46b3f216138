"""Runs the cells of ``make bench-smp``."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch_geometric.data import Data

from qgnn_plugin.data import load_dataset, to_sparse_features
from qgnn_plugin.denormals import flushed_denormals

from .smp_parts import RUNS
from .smp_settings import SYNTHETIC, Settings

__all__ = ["run_cell"]

SPARSE_BELOW = 0.5


@flushed_denormals()
def run_cell(cell: tuple[Any, ...], settings: Settings, root: str) -> dict[str, Any]:
    """Everything measured in one cell, as plain data."""
    torch.set_num_threads(1)
    part, *what, seed = cell
    name = what[0] if part in ("constraint", "plain") else settings.datasets[0]
    data = _synthetic() if name == SYNTHETIC else load_dataset(name, root, seed=seed)
    data = to_sparse_features(data, max_density=SPARSE_BELOW)
    start = time.perf_counter()
    results = RUNS[part](data, settings, seed, *what)
    seconds = round(time.perf_counter() - start, 1)
    return {"part": part, "what": what, "seed": seed, "seconds": seconds, "results": results}


def _synthetic(nodes: int = 90, classes: int = 3, features: int = 20) -> Data:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(nodes) % classes
    pairs = torch.randint(nodes, (2, 40 * nodes), generator=generator)
    pairs = pairs[:, y[pairs[0]] == y[pairs[1]]][:, : 2 * nodes]
    edges = torch.unique(torch.cat([pairs, pairs.flip(0)], 1), dim=1)
    x = torch.rand(nodes, features, generator=generator) < 0.1 + 0.5 * (torch.arange(features) % classes == y[:, None])
    third = torch.arange(nodes) // classes % 3
    masks = {f"{name}_mask": third == i for i, name in enumerate(("train", "val", "test"))}
    return Data(x=x.float(), edge_index=edges, y=y, **masks)
