"""Messages that are traced: results against the converted layer, guards, and what is refused."""

from typing import Any, Optional

import pytest
import torch
from core.support import Summed
from messages.cases import EDGE_INDEX, EXACT, ROUNDED, WIDTH, X, graph
from messages.traced_support import agree, packed_pair, paths
from torch import Tensor, nn
from torch_geometric.nn import AGNNConv, GENConv, MessagePassing, SuperGATConv, TransformerConv

import qgnn_plugin as qgnn
from qgnn_plugin.packing.lazy import sizes

pytest.importorskip("numba")


@pytest.mark.parametrize("name", EXACT)
def test_sums_of_products_are_those_of_the_converted_layer(name: str) -> None:
    make, args = EXACT[name]
    qmodel, packed = packed_pair(make, *args)
    agree(qmodel, packed, *args, exact=True)
    assert paths(packed) == {"generated kernel"}


@pytest.mark.parametrize("name", ROUNDED)
def test_other_messages_agree_to_rounding(name: str) -> None:
    make, args = ROUNDED[name]
    qmodel, packed = packed_pair(make, *args)
    agree(qmodel, packed, *args)
    agree(qmodel, packed, *args)
    assert paths(packed) == {"generated kernel"}


@pytest.mark.parametrize("granularity", ["tensor", "channel", "node"])
@pytest.mark.parametrize("bits", [2, 8])
def test_every_width_and_kind_of_range(bits: int, granularity: Any) -> None:
    torch.manual_seed(0)
    config = qgnn.QuantConfig(bits=bits, granularity=granularity)
    qmodel = qgnn.quantize_model(TransformerConv(WIDTH, 6, heads=2).eval(), config=config)
    qgnn.calibrate(qmodel, [(X, EDGE_INDEX)], method="ranges")
    packed = qgnn.pack_model(qmodel.eval())
    agree(qmodel, packed, X, EDGE_INDEX)
    assert paths(packed) == {"generated kernel"}


def test_other_graphs_and_pairs_of_features() -> None:
    """A trace holds for graphs of other sizes, also with targets of their own."""
    qmodel, packed = packed_pair(lambda: Summed((WIDTH, WIDTH), 9), (X, X[:50]), EDGE_INDEX % 50)
    for seed, targets in ((1, 50), (2, 13), (3, 149)):
        edges = torch.stack([graph(seed)[0], graph(seed)[1] % targets])[:, : 400 * seed]
        agree(qmodel, packed, (X, X[:targets]), edges, exact=True)
    empty = EDGE_INDEX[:, :0]
    agree(qmodel, packed, (X, X[:3]), empty, exact=True)
    assert "generated kernel" in next(iter(paths(packed)))


def test_the_other_flow() -> None:
    qmodel, packed = packed_pair(lambda: AGNNConv(flow="target_to_source"), X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    assert paths(packed) == {"generated kernel"}


def test_attention_weights_in_the_order_of_the_edges() -> None:
    qmodel, packed = packed_pair(lambda: TransformerConv(WIDTH, 6, heads=2), X, EDGE_INDEX)
    with torch.no_grad():
        want, got = (m(X, EDGE_INDEX, return_attention_weights=True) for m in (qmodel, packed))
    assert torch.equal(got[1][0], EDGE_INDEX)
    torch.testing.assert_close(got[1][1], want[1][1], rtol=1e-5, atol=1e-6)
    assert paths(packed) == {"generated kernel"}
    assert packed._alpha is None


def test_in_inference_mode() -> None:
    qmodel, packed = packed_pair(lambda: SuperGATConv(WIDTH, 6, heads=2), X, EDGE_INDEX)
    with torch.no_grad():
        expected = qmodel(X, EDGE_INDEX)
    with torch.inference_mode():
        torch.testing.assert_close(packed(X, EDGE_INDEX), expected, rtol=1e-5, atol=1e-5)
    assert paths(packed) == {"generated kernel"}


# What a trace depends on ##########################################################################


class Scaled(MessagePassing):
    """Reads an attribute, a parameter, and a number of a module inside."""

    def __init__(self) -> None:
        super().__init__(aggr="sum")
        self.factor, self.gate = 2.0, nn.Parameter(torch.ones(WIDTH))
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_j: Tensor, x_i: Tensor) -> Tensor:
        return self.act(x_j - x_i) * self.gate * self.factor


def test_what_changes_on_the_layer_is_seen() -> None:
    qmodel, packed = packed_pair(Scaled, X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    for change in (
        lambda m: setattr(m, "factor", -0.5),
        lambda m: setattr(m.act, "negative_slope", 0.7),
        lambda m: m.gate.data.mul_(3.0),
        lambda m: setattr(m, "gate", nn.Parameter(torch.arange(1.0, WIDTH + 1), requires_grad=False)),
        lambda m: setattr(m, "act", nn.Sigmoid()),
    ):
        before = packed(X, EDGE_INDEX)
        change(qmodel)
        change(packed)
        assert not torch.equal(packed(X, EDGE_INDEX), before)
        agree(qmodel, packed, X, EDGE_INDEX)
    assert paths(packed) == {"generated kernel"}


FACTOR = 2.0


class ByModule(MessagePassing):
    """Reads a number of its module."""

    def __init__(self) -> None:
        super().__init__(aggr="sum")

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_j: Tensor) -> Tensor:
        return FACTOR * x_j.relu()


def test_numbers_around_a_class_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel, packed = packed_pair(ByModule, X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX, exact=True)
    monkeypatch.setitem(globals(), "FACTOR", -3.0)
    agree(qmodel, packed, X, EDGE_INDEX, exact=True)
    assert paths(packed) == {"generated kernel"}


def test_attributes_that_change_all_the_time_end_in_row_blocks() -> None:
    qmodel, packed = packed_pair(Scaled, X, EDGE_INDEX)
    for step in range(12):
        qmodel.factor = packed.factor = 1.0 + step
        agree(qmodel, packed, X, EDGE_INDEX)


def test_parameters_are_read_in_every_call() -> None:
    qmodel, packed = packed_pair(lambda: GENConv(WIDTH, WIDTH, learn_t=True), X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    for model in (qmodel, packed):
        model.aggr_module.t.data.fill_(0.3)
    agree(qmodel, packed, X, EDGE_INDEX)


# By blocks of rows ################################################################################


@pytest.mark.parametrize("name", ["FiLMConv", "PNAConv", "GENConv", "ClusterGCNConv"])
def test_by_blocks_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a reduction, or the whole of a message of sources and targets: the same numbers."""
    make, args = (EXACT | ROUNDED)[name]
    qmodel, packed = packed_pair(make, *args)
    with torch.no_grad():
        whole = packed(*args)
        monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * WIDTH)
        assert torch.equal(packed(*args), whole)
    agree(qmodel, packed, *args)
    assert paths(packed) == {"generated kernel"}


class Centred(MessagePassing):
    """Looks at all rows after they were reduced."""

    def __init__(self) -> None:
        super().__init__(aggr="sum")

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_j: Tensor, x_i: Tensor) -> Tensor:
        return x_j * x_i

    def aggregate(self, inputs: Tensor, index: Tensor, dim_size: Optional[int] = None) -> Tensor:  # noqa: UP045
        out = super().aggregate(inputs, index, dim_size=dim_size)
        return torch.cat([out - out.mean(0, keepdim=True), out], 1)


def test_what_looks_across_rows_is_not_made_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * WIDTH)
    qmodel, packed = packed_pair(Centred, X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
