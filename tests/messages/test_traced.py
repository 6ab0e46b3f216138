"""Messages that are traced: results against the converted layer, guards, and what is refused."""

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from messages.cases import ATTRIBUTES, EDGE_INDEX, EDGES, EXACT, NODES, ROUNDED, WIDTH, X, floats, graph
from torch import Tensor, nn
from torch_geometric.nn import AGNNConv, GENConv, GraphConv, MessagePassing, SuperGATConv, TransformerConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.messages import sums, traced
from qgnn_plugin.messages.shadow import Snapshot, fingerprint
from qgnn_plugin.packing import producers
from qgnn_plugin.packing.generic import PackedMessagePassing

pytest.importorskip("numba")


def packed_pair(make: Callable[[], nn.Module], *args: Any, bits: int = 4) -> tuple[nn.Module, nn.Module]:
    """A converted layer with its ranges set, and its packed form."""
    torch.manual_seed(0)
    # Linear maps of concatenations are split for one range per tensor only; test_edge_maps has the others.
    config = qgnn.QuantConfig(bits=bits, granularity="tensor")
    qmodel = qgnn.quantize_model(make().eval(), config=config)
    qgnn.calibrate(qmodel, [args])
    return qmodel.eval(), qgnn.pack_model(qmodel)


def paths(packed: nn.Module) -> set[str]:
    return {layer._path_taken() for layer in packed.modules() if isinstance(layer, PackedMessagePassing)}


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, dict):
        out = tuple(out.values())
    return [out] if isinstance(out, Tensor) else [part for part in out if isinstance(part, Tensor)]


@torch.no_grad()
def agree(qmodel: nn.Module, packed: nn.Module, *args: Any, exact: bool = False, **kwargs: Any) -> None:
    expected, found = tensors(qmodel(*args, **kwargs)), tensors(packed(*args, **kwargs))
    assert len(expected) == len(found) > 0
    for want, got in zip(expected, found, strict=True):
        if exact:
            assert torch.equal(want, got), (want - got).abs().max()
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


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
    qmodel, packed = packed_pair(lambda: GraphConv((WIDTH, WIDTH), 9), (X, X[:50]), EDGE_INDEX % 50)
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


# What is not traced ###############################################################################

SEEN: list[int] = []


class Own(MessagePassing):
    def __init__(self) -> None:
        super().__init__(aggr="sum")
        self.calls, self.log = 0, list[int]()
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)


class Branching(Own):
    def message(self, x_j: Tensor) -> Tensor:
        return x_j if bool(x_j.max() > 1e3) else 2 * x_j


class ByParameter(Own):
    def message(self, x_j: Tensor) -> Tensor:
        return x_j * float(self.threshold)


class Random(Own):
    def message(self, x_j: Tensor) -> Tensor:
        torch.rand(())
        return x_j


class Counting(Own):
    def message(self, x_j: Tensor) -> Tensor:
        self.calls += 1
        return x_j


class Logging(Own):
    def message(self, x_j: Tensor) -> Tensor:
        self.log.append(1)
        return x_j


class Telling(Own):
    def message(self, x_j: Tensor) -> Tensor:
        SEEN.append(1)
        return x_j


class Settings:
    slope = 0.5


class BySettings(Own):
    """Reads an object whose changes nobody sees."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def message(self, x_j: Tensor) -> Tensor:
        return self.helper(x_j)

    def helper(self, x_j: Tensor) -> Tensor:
        return x_j * self.settings.slope


class Across(Own):
    """Looks at other edges than its own row's."""

    def message(self, x_j: Tensor) -> Tensor:
        return x_j / x_j.abs().max()


class Neighbouring(Own):
    def message(self, x_j: Tensor) -> Tensor:
        return x_j + x_j.roll(1, 0)


class Sorting(Own):
    def message(self, x_j: Tensor) -> Tensor:
        return x_j.sort(0).values


REFUSED = [Branching, ByParameter, Random, Counting, Logging, Telling, BySettings, Across, Neighbouring, Sorting]


@pytest.mark.parametrize("make", REFUSED)
@pytest.mark.filterwarnings("ignore:The packed")
def test_what_cannot_be_recorded_runs_as_it_is(make: type[Own]) -> None:
    qmodel, packed = packed_pair(make, X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    assert "generated kernel" not in paths(packed)


def test_tracing_leaves_no_mark() -> None:
    """The layer's own attributes and the generator are as they were."""
    _, packed = packed_pair(Counting, X, EDGE_INDEX)
    state, calls = torch.random.get_rng_state(), packed.calls
    packed(X, EDGE_INDEX)
    assert packed.calls == calls + 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert packed.log == []


def test_a_result_that_is_not_the_layers_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = traced.row_program
    for module in (traced, sums):
        monkeypatch.setattr(module, "row_program", lambda *args: [out * 1.01 for out in whole(*args)])
    qmodel, packed = packed_pair(lambda: GraphConv(WIDTH, WIDTH), X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    assert paths(packed) == {"row blocks"}


def test_dropout_is_none_in_eval_mode() -> None:
    qmodel, packed = packed_pair(lambda: TransformerConv(WIDTH, 6, heads=2, dropout=0.5), X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    assert paths(packed) == {"generated kernel"}


def test_nothing_is_traced_without_kernels() -> None:
    qmodel, packed = packed_pair(lambda: GraphConv(WIDTH, WIDTH), X, EDGE_INDEX)
    with use_backend("torch"):
        agree(qmodel, packed, X, EDGE_INDEX)
    assert paths(packed) == {"row blocks"}


class TwoOfEach(Own):
    """A softmax by hand, two kinds of features of neighbours, a gate of edges, and a mean over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor, gate: Tensor) -> Tensor:
        return self.propagate(edge_index, key=self.key(x), value=self.value(x), gate=gate)

    def message(
        self, key_j: Tensor, key_i: Tensor, value_j: Tensor, gate: Tensor, index: Tensor, size_i: int
    ) -> Tensor:
        logits = torch.nn.functional.elu((key_i.view(-1, 3, 4) * key_j.view(-1, 3, 4)).sum(-1) * gate[:, :1])
        numerators = torch.exp(logits.clamp(max=5.0))
        total = torch.zeros(size_i, 3).index_add_(0, index, numerators)
        weights = numerators / total[index]
        return torch.where(value_j > 0, value_j, 0.1 * value_j) * weights.repeat_interleave(4, 1)


def test_a_message_of_the_users_own() -> None:
    args = (X, EDGE_INDEX, ATTRIBUTES.abs())
    qmodel, packed = packed_pair(TwoOfEach, *args)
    agree(qmodel, packed, *args)


def test_as_many_edges_as_nodes() -> None:
    """It is open then what belongs to edges: nothing is assumed."""
    edges = EDGE_INDEX[:, :NODES]
    weight = floats(NODES, seed=9).abs()
    qmodel, packed = packed_pair(lambda: GraphConv(WIDTH, WIDTH), X, edges, weight)
    agree(qmodel, packed, X, edges, weight)
    assert EDGES != NODES


def test_a_snapshot_sees_what_a_fingerprint_sees():
    """Whatever changes a fingerprint has been seen by the comparison of objects that stands before it."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.sizes, self.lin, self.hook = 0.5, [1, 2], nn.Linear(3, 3), None

    def replaced(layer: Any) -> None:
        layer.lin = nn.Linear(3, 3)

    changes: list[Callable[[Any], Any]] = [
        lambda layer: setattr(layer, "slope", 0.25),
        lambda layer: layer.sizes.append(3),
        lambda layer: layer.sizes.__setitem__(0, 7),
        lambda layer: setattr(layer.lin, "out_features", 5),
        lambda layer: setattr(layer.lin, "bias", None),
        lambda layer: setattr(layer.lin.weight, "data", torch.zeros(4, 3)),
        lambda layer: setattr(layer, "extra", 1),
        lambda layer: layer.eval(),
        lambda layer: setattr(layer, "hook", torch.relu),
        replaced,
    ]
    for change in changes:
        layer = Layer()
        snapshot, before = Snapshot(layer), fingerprint(layer)
        assert snapshot.holds(layer)
        assert fingerprint(layer) == before
        change(layer)
        assert not snapshot.holds(layer)
    assert not Snapshot(Layer()).holds(Layer())


# By blocks of rows ################################################################################


@pytest.mark.parametrize("name", ["FiLMConv", "PNAConv", "GENConv", "ClusterGCNConv"])
def test_by_blocks_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a reduction, or the whole of a message of sources and targets: the same numbers."""
    make, args = (EXACT | ROUNDED)[name]
    qmodel, packed = packed_pair(make, *args)
    with torch.no_grad():
        whole = packed(*args)
        monkeypatch.setattr(producers, "BLOCK_FLOATS", 64 * WIDTH)
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
    monkeypatch.setattr(producers, "BLOCK_FLOATS", 64 * WIDTH)
    qmodel, packed = packed_pair(Centred, X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
