"""Messages that are not traced run as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import Summed
from messages.cases import ATTRIBUTES, EDGE_INDEX, EDGES, NODES, WIDTH, X, floats
from messages.traced_support import agree, packed_pair, paths
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing, TransformerConv

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.messages import sums, traced
from qgnn_plugin.messages.shadow import Snapshot, fingerprint

pytest.importorskip("numba")


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
    qmodel, packed = packed_pair(lambda: Summed(WIDTH, WIDTH), X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    assert paths(packed) == {"row blocks"}


def test_dropout_is_none_in_eval_mode() -> None:
    qmodel, packed = packed_pair(lambda: TransformerConv(WIDTH, 6, heads=2, dropout=0.5), X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    assert paths(packed) == {"generated kernel"}


def test_nothing_is_traced_without_kernels() -> None:
    qmodel, packed = packed_pair(lambda: Summed(WIDTH, WIDTH), X, EDGE_INDEX)
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
    qmodel, packed = packed_pair(lambda: Summed(WIDTH, WIDTH), X, edges, weight)
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
