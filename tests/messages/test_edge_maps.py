"""Linear maps of single edges, in the default configuration: ranges that depend on the whole edge, layers of layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from messages.cases import ATTRIBUTES, DEGREES, EDGE_INDEX, EDGE_TYPES, EDGE_WIDTH, NODE_TYPES, NODES, floats, mlp
from messages.traced_support import agree, paths
from torch import Tensor, nn
from torch_geometric.nn import (
    CGConv,
    EdgeConv,
    FeaStConv,
    GINEConv,
    HEATConv,
    MessagePassing,
    PNAConv,
    PointGNNConv,
    PointNetConv,
    PointTransformerConv,
    ResGatedGraphConv,
)

import qgnn_plugin as qgnn

pytest.importorskip("numba")

WIDTH = 36  # more than one register, and no multiple of one
X, POINTS = floats(NODES, WIDTH), floats(NODES, 3, seed=9)
AGGREGATORS, SCALERS = ["mean", "max", "min", "std"], ["identity", "amplification"]

Case = tuple[Callable[[], nn.Module], tuple[Any, ...]]


def towers(divide: bool) -> nn.Module:
    return PNAConv(WIDTH, WIDTH, AGGREGATORS, SCALERS, DEGREES, EDGE_WIDTH, towers=3, divide_input=divide, pre_layers=2)


# Their sums, products and maxima are those of torch, bit for bit.
EXACT: dict[str, Case] = {
    "EdgeConv": (lambda: EdgeConv(mlp(2 * WIDTH, 20)), (X, EDGE_INDEX)),
    "GINEConv": (lambda: GINEConv(mlp(WIDTH, WIDTH), edge_dim=EDGE_WIDTH), (X, EDGE_INDEX, ATTRIBUTES)),
    "PNAConv": (
        lambda: PNAConv(WIDTH, WIDTH, AGGREGATORS, SCALERS, DEGREES, edge_dim=EDGE_WIDTH),
        (X, EDGE_INDEX, ATTRIBUTES),
    ),
    "PNAConv of towers": (lambda: towers(True), (X, EDGE_INDEX, ATTRIBUTES)),
    "PNAConv of whole towers": (lambda: towers(False), (X, EDGE_INDEX, ATTRIBUTES)),
    "PointNetConv": (lambda: PointNetConv(mlp(WIDTH + 3, 20), mlp(20, 8)), (X, POINTS, EDGE_INDEX)),
}
ROUNDED: dict[str, Case] = {
    "CGConv": (lambda: CGConv(WIDTH, dim=EDGE_WIDTH, batch_norm=True), (X, EDGE_INDEX, ATTRIBUTES)),
    "FeaStConv": (lambda: FeaStConv(WIDTH, 20, heads=3), (X, EDGE_INDEX)),
    "HEATConv": (
        lambda: HEATConv(WIDTH, 36, 2, 3, 4, EDGE_WIDTH, 4, heads=2),
        (X, EDGE_INDEX, NODE_TYPES, EDGE_TYPES, ATTRIBUTES),
    ),
    "PointGNNConv": (
        lambda: PointGNNConv(mlp(WIDTH, 3), mlp(WIDTH + 3, WIDTH), mlp(WIDTH, WIDTH)),
        (X, POINTS, EDGE_INDEX),
    ),
    "PointTransformerConv": (
        lambda: PointTransformerConv(WIDTH, WIDTH, pos_nn=mlp(3, WIDTH), attn_nn=mlp(WIDTH, WIDTH)),
        (X, POINTS, EDGE_INDEX),
    ),
    "ResGatedGraphConv": (
        lambda: ResGatedGraphConv(WIDTH, WIDTH, edge_dim=EDGE_WIDTH),
        (X, EDGE_INDEX, ATTRIBUTES),
    ),
}


def packed_pair(case: Case, bits: int, **config: Any) -> tuple[nn.Module, nn.Module]:
    make, args = case
    torch.manual_seed(0)
    qmodel = qgnn.quantize_model(make().eval(), config=qgnn.QuantConfig(bits=bits, **config))
    qgnn.calibrate(qmodel, [args], method="ranges")
    return qmodel.eval(), qgnn.pack_model(qmodel)


@pytest.mark.parametrize("name", EXACT)
def test_maps_of_edges_are_those_of_the_converted_layer(name: str) -> None:
    qmodel, packed = packed_pair(EXACT[name], bits=4)
    agree(qmodel, packed, *EXACT[name][1], exact=True)
    assert paths(packed) == {"generated kernel"}


@pytest.mark.parametrize("name", ROUNDED)
def test_with_functions_they_agree_to_rounding(name: str) -> None:
    qmodel, packed = packed_pair(ROUNDED[name], bits=4)
    agree(qmodel, packed, *ROUNDED[name][1])
    assert paths(packed) == {"generated kernel"}


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_every_width_of_codes(bits: int, granularity: Any) -> None:
    qmodel, packed = packed_pair(EXACT["EdgeConv"], bits, granularity=granularity)
    agree(qmodel, packed, X, EDGE_INDEX, exact=True)
    assert paths(packed) == {"generated kernel"}


def test_what_is_not_finite_names_the_range() -> None:
    """An edge's own, which no range of nodes sees; afterwards everything goes on."""
    qmodel, packed = packed_pair(ROUNDED["CGConv"], bits=4)
    agree(qmodel, packed, X, EDGE_INDEX, ATTRIBUTES)
    broken = ATTRIBUTES.clone()
    broken[100, 2] = float("nan")
    for model in (qmodel, packed):
        with torch.no_grad(), pytest.raises(ValueError, match=r"finite.*lin_[fs]"):
            model(X, EDGE_INDEX, broken)
    agree(qmodel, packed, X, EDGE_INDEX, ATTRIBUTES)
    assert paths(packed) == {"generated kernel"}


def test_weights_that_are_loaded_later_are_those_that_are_used() -> None:
    """Nothing of a map is kept beyond the numbers that it holds."""
    _, packed = packed_pair(EXACT["EdgeConv"], bits=4)
    with torch.no_grad():
        before = packed(X, EDGE_INDEX)
        other = {name: value.clone() for name, value in packed.state_dict().items()}
        for name, value in other.items():
            if name.endswith("bias"):
                value += 1
            elif name.endswith("weight_scale"):
                value *= 2
            elif name.endswith("words"):
                value.copy_(value.flip(0))
        packed.load_state_dict(other)
        after = packed(X, EDGE_INDEX)
        assert not torch.equal(before, after)
        fresh = qgnn.pack_model(packed_pair(EXACT["EdgeConv"], bits=4)[0])
        fresh.load_state_dict(other)
        assert torch.equal(fresh(X, EDGE_INDEX), after)


class TwoMaps(MessagePassing):
    """The same map twice, and two maps of the same."""

    def __init__(self) -> None:
        super().__init__(aggr="max")
        self.one, self.other = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        both, turned = torch.cat([x_i, x_j], dim=-1), torch.cat([x_j, x_i], dim=-1)
        return torch.relu(self.one(both)) * self.other(both) - self.one(turned)


def test_maps_that_are_used_twice() -> None:
    qmodel, packed = packed_pair((TwoMaps, (X, EDGE_INDEX)), bits=4)
    agree(qmodel, packed, X, EDGE_INDEX, exact=True)
    assert paths(packed) == {"generated kernel"}
