"""Graphs to train on: loading, splitting and neighbour sampling."""

from qgnn_plugin.data.cora import load_demo_cora
from qgnn_plugin.data.datasets import DATASETS, load_dataset, to_sparse_features
from qgnn_plugin.data.sampler import CSRNeighborSampler, neighbor_loader
from qgnn_plugin.data.splits import NodeSplit, random_split

__all__ = [
    "DATASETS",
    "CSRNeighborSampler",
    "NodeSplit",
    "load_dataset",
    "load_demo_cora",
    "neighbor_loader",
    "random_split",
    "to_sparse_features",
]
