"""Cora, which comes with the package: a real graph for demos and tests."""

from importlib import resources

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import to_undirected

from qgnn_plugin.data.splits import random_split

FILE = "cora.npz"
SPLIT_SEED = 0
NUM_PAPERS, NUM_WORDS = 2708, 1433


def load_demo_cora() -> Data:
    """Returns the Cora citation graph (cora-LICENSE.txt beside the file says where it is from).

    Citations are those of PyG's ``Planetoid`` Cora, the order of nodes is not, so the figures of
    the public split do not apply: the split here is a fixed seeded one.

    Returns:
        ``Data`` with ``x`` float32 ``[2708, 1433]`` of zeros and ones, ``edge_index`` int64
        ``[2, 10556]`` (both directions, sorted, no duplicates), ``y`` int64 ``[2708]`` with 7
        classes, and boolean masks of 20 nodes per class / 500 / 1000.
    """
    with resources.files(__package__).joinpath(FILE).open("rb") as file, np.load(file) as arrays:
        found = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in arrays.files}
    x = torch.zeros(NUM_PAPERS, NUM_WORDS)
    x[_rows(found["word_ptr"]), found["word"]] = 1.0
    citations = torch.stack([found["citing"], found["cited"]])
    edge_index = to_undirected(citations, num_nodes=NUM_PAPERS)
    data = Data(x=x, edge_index=edge_index, y=found["subject"])
    split = random_split(data, per_class_train=20, num_val=500, num_test=1000, seed=SPLIT_SEED)
    data.train_mask, data.val_mask, data.test_mask = split
    return data


def _rows(ptr: Tensor) -> Tensor:
    """The row of every stored entry of a CSR matrix."""
    return torch.arange(ptr.numel() - 1).repeat_interleave(ptr.diff())
