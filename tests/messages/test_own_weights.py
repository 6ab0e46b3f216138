"""Messages with weights of their own: what is no product with them reads values, and none of it ends the process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from messages.cases import EDGE_INDEX, NODES, floats
from torch import Tensor, nn
from torch_geometric.nn import DNAConv, MessagePassing

import qgnn_plugin as qgnn

WIDTH = 8


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_over_layers(groups: int) -> None:
    """``DNAConv`` maps what each edge sees by weights held in groups; recording that ended the process."""
    x = floats(NODES, 3, 8)
    qmodel = qgnn.quantize_model(DNAConv(8, heads=2, groups=groups).eval(), bits=8)
    qgnn.calibrate(qmodel, (x, EDGE_INDEX))
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        torch.testing.assert_close(packed(x, EDGE_INDEX), qmodel(x, EDGE_INDEX), rtol=1e-4, atol=1e-5)
    assert qgnn.summary(packed).layers[0].runs.startswith("packed: ")


class OfKind(MessagePassing):
    """One matrix for each kind of edge, as relational convolutions write it, and other reads of packed weights."""

    def __init__(self, read: str) -> None:
        super().__init__(aggr="add")
        self.weight, self.read = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5), read
        self.table = nn.Embedding(3, WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor, kind: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x @ self.weight[0], kind=kind)

    def message(self, x_j: Tensor, kind: Tensor) -> Tensor:
        return READS[self.read](self, x_j, kind)


READS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "indexed": lambda layer, x, kind: torch.bmm(x.unsqueeze(1), layer.weight[kind]).squeeze(1),
    "selected": lambda layer, x, kind: (x.unsqueeze(1) @ layer.weight.index_select(0, kind)).squeeze(1),
    "joined": lambda layer, x, kind: (x.unsqueeze(1) @ torch.stack([*layer.weight])[kind]).squeeze(1),
    "mapped": lambda layer, x, kind: x @ layer.weight[1].softmax(-1),
    "summed": lambda layer, x, kind: layer.weight.sum(0).mean(0) * x,
    "table": lambda layer, x, kind: x * layer.table.weight[kind].relu() + layer.table(kind),
}


@pytest.mark.parametrize("read", READS)
def test_values_of_own_weights(read: str) -> None:
    """Reading such values while a message was recorded ended the process."""
    torch.manual_seed(0)
    layer, x, kind = OfKind(read).eval(), floats(NODES, WIDTH), torch.arange(EDGE_INDEX.size(1)) % 3
    qmodel = qgnn.calibrate(qgnn.quantize_model(layer, bits=4), [None], forward=lambda m, _: m(x, EDGE_INDEX, kind))
    packed = qgnn.pack_model(qmodel.eval())
    with torch.no_grad():
        expected = qmodel(x, EDGE_INDEX, kind)
        for _ in range(2):
            torch.testing.assert_close(packed(x, EDGE_INDEX, kind), expected, rtol=1e-4, atol=1e-5)
        plain = copy.deepcopy(layer)
        plain.weight.data.add_(0.01)
        assert not torch.allclose(plain(x, EDGE_INDEX, kind), layer(x, EDGE_INDEX, kind))
