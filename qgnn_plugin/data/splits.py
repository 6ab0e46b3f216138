"""Seeded random node splits with a fixed number of nodes per class."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data


class NodeSplit(NamedTuple):
    """Three disjoint boolean masks of shape ``[N]``, on the device of the labels."""

    train_mask: Tensor
    val_mask: Tensor
    test_mask: Tensor


def random_split(
    data: Data,
    per_class_train: int = 20,
    per_class_val: int = 30,
    seed: int = 0,
    *,
    num_val: int | None = None,
    num_test: int | None = None,
    small_classes: bool = False,
) -> NodeSplit:
    """Draws ``per_class_train`` / ``per_class_val`` nodes of each class, the rest for testing.

    The default is the protocol of Shchur et al., *Pitfalls of Graph Neural Network Evaluation*
    (arXiv 1811.05868). Nodes with a negative label belong to no set. The masks depend on the
    labels and ``seed`` alone, not on the global generator nor on the device.

    Args:
        data: A graph with integer labels ``y`` of shape ``[N]``, negative where unknown.
        per_class_train: Training nodes per class, at least 1.
        per_class_val: Validation nodes per class, at least 0. Ignored if ``num_val`` is given.
        seed: Any integer of 64 bits.
        num_val: Draw the validation set over all classes, of this size in total.
        num_test: Draw a test set of this size (default: every node that remains).
        small_classes: Let a class of at most ``per_class_train + per_class_val`` nodes give half
            of them to training and half of the others to validation, instead of raising.

    Raises:
        TypeError: ``data.y`` is missing or not integer.
        ValueError: ``y`` is not one-dimensional, a count is out of range, or too few nodes remain.
    """
    y = _labels(data)
    if num_val is not None:
        per_class_val = 0
    for name, value, least in (
        ("per_class_train", per_class_train, 1),
        ("per_class_val", per_class_val, 0),
        ("num_val", num_val or 0, 0),
        ("num_test", num_test or 0, 0),
    ):
        if value < least:
            raise ValueError(f"expected '{name}' to be at least {least} (got {value})")

    order = torch.randperm(y.numel(), generator=torch.Generator().manual_seed(seed))
    order = order[y[order] >= 0]
    train, val, rest = [], [], torch.zeros(y.numel(), dtype=torch.bool)
    for label in y[order].unique().tolist():
        members = order[y[order] == label]
        a, b = _class_counts(
            members.numel(), int(label), per_class_train, per_class_val, small_classes
        )
        train.append(members[:a])
        val.append(members[a : a + b])
        rest[members[a + b :]] = True

    remaining = order[rest[order]]
    if num_val is not None:
        val, remaining = [remaining[:num_val]], remaining[num_val:]
    wanted = num_test if num_test is not None else remaining.numel()
    if remaining.numel() < wanted or (num_val is not None and val[0].numel() < num_val):
        raise ValueError(
            f"expected enough labelled nodes for num_val={num_val} and num_test={num_test} after "
            f"{per_class_train} training nodes per class (got {y.numel()} nodes in all)"
        )
    device = data.y.device
    return NodeSplit(
        _mask(y.numel(), torch.cat(train)).to(device),
        _mask(y.numel(), torch.cat(val)).to(device),
        _mask(y.numel(), remaining[:wanted]).to(device),
    )


def _labels(data: Data) -> Tensor:
    y = getattr(data, "y", None)
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
        got = f"dtype {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"expected integer class labels in 'data.y' (got {got})")
    if y.dim() != 1:
        raise ValueError(
            f"expected one label per node, 'data.y' of shape [N] (got {list(y.shape)}); "
            f"multi-label tasks bring their own masks"
        )
    if not bool((y >= 0).any()):
        raise ValueError("expected at least one node with a label in 'data.y' (got none)")
    return y.cpu().long()


def _class_counts(size: int, label: int, train: int, val: int, small: bool) -> tuple[int, int]:
    if size > train + val:
        return train, val
    if not small:
        raise ValueError(
            f"expected more than {train + val} nodes in every class (got {size} in class {label}); "
            f"lower 'per_class_train' or 'per_class_val', or pass small_classes=True"
        )
    a = min(train, (size + 1) // 2)
    return a, min(val, (size - a) // 2)


def _mask(size: int, index: Tensor) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[index] = True
    return mask
