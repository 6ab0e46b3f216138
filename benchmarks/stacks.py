"""The three-layer models that inference is timed on: 128-256-256-40 with ReLU between the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

__all__ = ["MORE_STACKS", "STACKS", "WIDTHS", "Stack", "build_stack"]

WIDTHS = (128, 256, 256, 40)
HEADS = 4


class Stack(nn.Module):
    """Convolutions with ReLU between them."""

    def __init__(self, convs: list[nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(x, edge_index)
            if i + 1 < len(self.convs):
                x = x.relu()
        return x


def _gat(in_channels: int, out_channels: int, last: bool, **options: Any) -> GATConv:
    heads = 1 if last else HEADS
    return GATConv(in_channels, out_channels // heads, heads=heads, **options)


STACKS: dict[str, Callable[..., nn.Module]] = {
    "GCN": lambda i, o, last, **options: GCNConv(i, o, **options),
    "GraphSAGE": lambda i, o, last, **options: SAGEConv(i, o, **options),
    "GAT": _gat,
}


def _gin(in_channels: int, out_channels: int, last: bool, **options: Any) -> GINConv:
    hidden = nn.Linear(in_channels, out_channels)
    return GINConv(nn.Sequential(hidden, nn.ReLU(), nn.Linear(out_channels, out_channels)), **options)


MORE_STACKS: dict[str, Callable[..., nn.Module]] = {"GIN": _gin}  # on small graphs only


def build_stack(name: str, widths: Sequence[int] = WIDTHS, seed: int = 0, **options: Any) -> Stack:
    """A float model in eval mode with seeded random weights; the GAT's hidden widths are those of all heads together.

    Args:
        name: One of :data:`STACKS` or :data:`MORE_STACKS`.
        widths: Of the input, the hidden layers and the output.
        seed: Of the weights.
        options: Further arguments of every convolution.
    """
    torch.manual_seed(seed)
    pairs = list(pairwise(widths))
    make = {**STACKS, **MORE_STACKS}[name]
    convs = [make(i, o, k == len(pairs) - 1, **options) for k, (i, o) in enumerate(pairs)]
    return Stack(convs).eval()
