"""Sums of two integer products: one op wherever floats of one would be written for the other."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import GraphConv, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import use_backend


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qgnn":
            self.names.append(str(func).removeprefix("qgnn."))
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.first, self.second = make(12, 40), make(40, 40)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


CODES, FLOATS = "linear_pair.rows", "linear_pair.default"


@pytest.mark.parametrize(
    ("make", "bits", "expected"),
    [(SAGEConv, 2, [CODES]), (SAGEConv, 8, [CODES]), (GraphConv, 4, 2 * [CODES] + [FLOATS])],
    ids=["SAGE2", "SAGE8", "Graph4"],
)
@torch.no_grad()
def test_a_widening_layer_has_one_op_for_both_products(make: Any, bits: int, expected: list[str]) -> None:
    """Codes in the next layer's range come out of it; GraphConv sums before it maps, whatever the widths,
    and takes two ranges of its input.
    """
    x, edge_index = torch.randn(30, 12), torch.randint(30, (2, 120))
    converted = qgnn.quantize_model(Model(make).eval(), bits=bits)
    qgnn.calibrate(converted, (x, edge_index))
    packed = qgnn.pack_model(converted)
    with use_backend("torch"), Ops() as ops:
        got = packed(x, edge_index)
    pairs = [name for name in ops.names if name.startswith("linear_pair")]
    assert pairs == expected, ops.names
    assert torch.equal(got, packed(x, edge_index))
    assert torch.equal(got, converted(x, edge_index))
