"""Random splits: sizes, disjointness, reproducibility, errors."""

import pytest
import torch
from torch_geometric.data import Data

from qgnn_plugin.data import random_split


def _data(sizes: tuple[int, ...] = (60, 80, 100), unlabelled: int = 0) -> Data:
    labels = [torch.full((size,), label) for label, size in enumerate(sizes)]
    y = torch.cat([*labels, torch.full((unlabelled,), -1)])
    order = torch.randperm(y.numel(), generator=torch.Generator().manual_seed(5))
    return Data(y=y[order], num_nodes=y.numel())


def test_counts_per_class_and_rest() -> None:
    data = _data(unlabelled=17)
    train, val, test = random_split(data, seed=1)
    assert train.dtype == torch.bool
    assert data.y[train].bincount().tolist() == [20, 20, 20]
    assert data.y[val].bincount().tolist() == [30, 30, 30]
    assert data.y[test].bincount().tolist() == [10, 30, 50]
    assert int((train.int() + val.int() + test.int()).max()) == 1
    assert not bool((data.y[train | val | test] < 0).any())


def test_depends_on_the_seed_alone() -> None:
    data = _data()
    torch.manual_seed(1)
    first = random_split(data, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = random_split(data, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = random_split(data, seed=4)
    assert not torch.equal(first.train_mask, other.train_mask)
    assert not torch.equal(first.val_mask, other.val_mask)


def test_every_node_is_drawn_equally_often() -> None:
    data, draws = _data((60,)), 600
    counts = torch.zeros(60)
    for seed in range(draws):
        counts += random_split(data, seed=seed).train_mask
    # 20 of 60 each time: mean 200, standard deviation 11.5; the chance of 4.5 of them is 4e-4.
    assert counts.sum() == 20 * draws
    assert (counts - draws / 3).abs().max() < 4.5 * (draws * (1 / 3) * (2 / 3)) ** 0.5


def test_fixed_sizes() -> None:
    data = _data()
    train, val, test = random_split(data, 20, num_val=50, num_test=70, seed=0)
    assert [int(mask.sum()) for mask in (train, val, test)] == [60, 50, 70]
    assert int((train.int() + val.int() + test.int()).max()) == 1
    assert len(data.y[val].unique()) == 3  # Drawn over all classes, not class by class.


def test_small_classes() -> None:
    data = _data((51, 50, 9, 2, 1))
    with pytest.raises(ValueError, match=r"more than 50 nodes .*got 50 in class 1.*small_classes"):
        random_split(data)
    train, val, test = random_split(data, small_classes=True)
    assert data.y[train].bincount(minlength=5).tolist() == [20, 20, 5, 1, 1]
    assert data.y[val].bincount(minlength=5).tolist() == [30, 15, 2, 0, 0]
    assert data.y[test].bincount(minlength=5).tolist() == [1, 15, 2, 1, 0]


@pytest.mark.parametrize(
    ("y", "error", "match"),
    [
        (None, TypeError, "got NoneType"),
        (torch.rand(9), TypeError, "got dtype torch.float32"),
        (torch.zeros(9, dtype=torch.bool), TypeError, "got dtype torch.bool"),
        (torch.zeros(9, 2, dtype=torch.long), ValueError, r"got \[9, 2\]"),
        (torch.full((9,), -1), ValueError, "at least one node with a label"),
        (torch.zeros(0, dtype=torch.long), ValueError, "at least one node with a label"),
    ],
)
def test_malformed_labels(y: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        random_split(Data(y=y, num_nodes=9))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"per_class_train": 0}, "'per_class_train' to be at least 1"),
        ({"per_class_val": -1}, "'per_class_val' to be at least 0"),
        ({"num_val": -1}, "'num_val' to be at least 0"),
        ({"num_val": 100, "num_test": 81}, "num_val=100 and num_test=81"),
        ({"num_val": 181}, "num_val=181"),
    ],
)
def test_malformed_sizes(kwargs: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        random_split(_data(), **kwargs)
