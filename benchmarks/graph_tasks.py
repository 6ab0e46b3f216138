"""Data sets, models and splits of the graph-level benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GIN, MLP, global_add_pool, global_mean_pool
from torch_geometric.utils import degree, get_laplacian, to_dense_adj

from examples.graph_regression import Net as Molecules
from examples.graph_regression import load as molecules

__all__ = ["TASKS", "Split", "Task", "circular_skip_links"]

SKIPS = (2, 3, 4, 5, 6, 9, 11, 12, 13, 16)  # Murphy et al., 2019; one class each
RING, COPIES, ENCODING = 41, 15, 20
DEGREES = 64  # one-hot degrees up to this stand in for features


class Classifier(nn.Module):
    """GIN layers with batch norm, a sum or mean over the nodes of each graph, an MLP."""

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int = 32, layers: int = 4, mean: bool = False
    ) -> None:
        super().__init__()
        self.gnn = GIN(in_channels, hidden, layers, norm="batch_norm", jk="cat")
        self.pool = global_mean_pool if mean else global_add_pool
        self.head = MLP([hidden, hidden, out_channels], dropout=0.0 if mean else 0.5)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, batch_size: int) -> Tensor:
        return self.head(self.pool(self.gnn(x, edge_index), batch, batch_size))


@dataclass(frozen=True)
class Split:
    """Graphs of one run."""

    train: list[Data]
    val: list[Data]
    test: list[Data]


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Args:
        load: From the folder of the data sets to the graphs.
        model: From the number of features of nodes, of edges, and of classes.
        runs: Folds of the data, or seeds of random splits.
        float_epochs, epochs: Of the float model, and of each converted one.
        batch_size: Graphs of a training step.
        regression: Whether ``y`` is a number.
        flips: Whether features are eigenvectors, whose signs are drawn anew in every training step.
    """

    load: Callable[[str], list[Data]]
    model: Callable[[int, int, int], nn.Module]
    runs: int = 10
    float_epochs: int = 100
    epochs: int = 50
    batch_size: int = 64
    regression: bool = False
    flips: bool = False

    def split(self, graphs: list[Data], run: int) -> Split:
        """Fold ``run`` to test, the next one to stop on, the rest to train on; folds have the classes of the whole.

        Of a regression, 10 % each at random by the seed ``run``.
        """
        generator = torch.Generator().manual_seed(run if self.regression else 0)
        order = torch.randperm(len(graphs), generator=generator)
        if self.regression:
            held = len(graphs) // 10
            return Split(*(_take(graphs, part) for part in (order[2 * held :], order[:held], order[held : 2 * held])))
        labels = torch.cat([graph.y.view(-1) for graph in graphs])[order]
        fold = torch.empty_like(order)
        fold[order[labels.argsort(stable=True)]] = torch.arange(len(graphs)) % self.runs
        test, val = fold == run, fold == (run + 1) % self.runs
        return Split(*(_take(graphs, part.nonzero().flatten()) for part in (~(test | val), val, test)))


def _take(graphs: list[Data], index: Tensor) -> list[Data]:
    return [graphs[k] for k in index.tolist()]


def circular_skip_links(root: str = "") -> list[Data]:
    """150 graphs of 41 nodes in 10 classes: a ring, and links that skip a number of nodes, in random node order.

    All are 4-regular, so message passing without positions gives them one and the same embedding.  Positions are the
    first 20 non-trivial eigenvectors of the Laplacian (Dwivedi et al., "Benchmarking graph neural networks", 2020).
    """
    generator, graphs, ring = torch.Generator().manual_seed(0), [], torch.arange(RING)
    for label, skip in enumerate(SKIPS):
        for _ in range(COPIES):
            order = torch.randperm(RING, generator=generator)
            ahead = torch.cat([torch.stack([ring, (ring + step) % RING]) for step in (1, skip)], dim=1)
            edge_index = order[torch.cat([ahead, ahead.flip(0)], dim=1)]
            index, weight = get_laplacian(edge_index, normalization="sym", num_nodes=RING)
            vectors = torch.linalg.eigh(to_dense_adj(index, edge_attr=weight, max_num_nodes=RING)[0])[1]
            x = vectors[:, 1 : ENCODING + 1] * RING**0.5
            graphs.append(Data(x=x, edge_index=edge_index, y=torch.tensor([label])))
    return graphs


def _tu_dataset(name: str) -> Callable[[str], list[Data]]:
    def load(root: str) -> list[Data]:
        from torch_geometric.datasets import TUDataset

        graphs = list(TUDataset(str(Path(root) / "TUDataset"), name))
        most = 0
        for graph in graphs:
            if graph.x is None:
                degrees = degree(graph.edge_index[0], graph.num_nodes, dtype=torch.long).clamp(max=DEGREES)
                graph.x, most = degrees, max(most, int(degrees.max()))
        for graph in graphs:
            if graph.x.dim() == 1:
                graph.x = nn.functional.one_hot(graph.x, most + 1).float()
        return graphs

    return load


def _classifier(**options: Any) -> Callable[[int, int, int], nn.Module]:
    return lambda features, edges, classes: Classifier(features, classes, **options)


TASKS: dict[str, Task] = {
    "CSL": Task(
        circular_skip_links, _classifier(hidden=64, mean=True), runs=5, float_epochs=150, epochs=80, batch_size=30,
        flips=True,
    ),
    "MUTAG": Task(_tu_dataset("MUTAG"), _classifier()),
    "ESOL": Task(
        lambda root: molecules("ESOL", str(Path(root) / "MoleculeNet")), lambda f, e, c: Molecules(f, e, 64), runs=5,
        float_epochs=60, epochs=40, regression=True,
    ),
    "PROTEINS": Task(_tu_dataset("PROTEINS"), _classifier(), float_epochs=60, epochs=30),
    "REDDIT-BINARY": Task(_tu_dataset("REDDIT-BINARY"), _classifier(), float_epochs=60, epochs=30),
}  # fmt: skip
