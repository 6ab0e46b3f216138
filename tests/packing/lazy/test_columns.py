"""Columns of results that are not computed yet, rows of several dimensions, and what joins them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packing.lazy.test_deferred import RANGE, Counted, codes
from torch import Tensor, nn
from torch_geometric.nn import FiLMConv, MessagePassing, PNAConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.packing.lazy import producers, sizes
from qgnn_plugin.packing.lazy.asked import Asked
from qgnn_plugin.packing.lazy.columns import Shaped, deferred_result
from qgnn_plugin.packing.lazy.deferred import DeferredTensor
from qgnn_plugin.packing.lazy.producers import Producer

pytest.importorskip("numba")

ROWS, TOWERS, WIDTH = 150, 3, 4
NODES, EDGES, FEATURES = 90, 700, 12
X = torch.randn(NODES, FEATURES, generator=torch.Generator().manual_seed(0))
EDGE_INDEX = torch.randint(NODES - 5, (2, EDGES), generator=torch.Generator().manual_seed(1))
EDGE_TYPE = torch.randint(3, (EDGES,), generator=torch.Generator().manual_seed(2))
DEGREES = torch.bincount(torch.bincount(EDGE_INDEX[1]))


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """Kernels, in the place of the references that other tests of this folder run."""
    with use_backend("cpu"):
        yield


@pytest.fixture
def source() -> Counted:
    return Counted(torch.randn(ROWS, TOWERS * WIDTH))


def towers(source: Counted, asked: Asked | None = None) -> Any:
    """The result ``[N, T, F]`` of a producer."""
    producer = Producer(ROWS, TOWERS * WIDTH, torch.device("cpu"), source.run, dims=(TOWERS, WIDTH))
    return deferred_result(producer, source._repeat, asked or Asked())


NOTED: dict[str, Callable[[Any], Any]] = {
    "tower": lambda x: x[:, 1],
    "tower from behind": lambda x: x.select(1, -1),
    "flat": lambda x: x.view(ROWS, -1),
    "flat and back": lambda x: x.flatten(1).view(-1, TOWERS, WIDTH)[:, 2],
    "split": lambda x: x.flatten(1).split(TOWERS, dim=-1)[2],
    "split unevenly": lambda x: x.flatten(1).split([5, 4, 3], dim=1)[1],
    "chunk of a chunk": lambda x: x.flatten(1).chunk(2, dim=-1)[1].chunk(2, dim=-1)[0],
    "slice": lambda x: x.view(ROWS, -1)[:, 3:-2],
    "towers": lambda x: x[:, 1:].flatten(1),
    "function of columns": lambda x: F.leaky_relu(x[:, 0].relu() * 2, 0.3),
    "joined": lambda x: torch.cat([x, x.new_ones(ROWS, TOWERS, 1)], dim=-1)[:, 1],
    "joined with a tower": lambda x: torch.cat([x.new_zeros(ROWS, 2), x.flatten(1)], dim=-1).relu(),
}


@pytest.mark.parametrize("name", NOTED)
def test_views_give_the_codes_of_the_floats_that_nobody_writes(name: str, source: Counted) -> None:
    out, expected = NOTED[name](towers(source)), NOTED[name](source.value.clone().view(ROWS, TOWERS, WIDTH))
    assert type(out) is DeferredTensor
    assert out.shape == expected.shape
    assert source.runs == 0
    assert torch.equal(out.pending.packed(**RANGE), codes(expected.contiguous()))
    assert torch.equal(out + 0, expected)


OTHERS: dict[str, Callable[[Any], Any]] = {
    "last dimension": lambda x: x[..., 1],
    "rows": lambda x: x[3:5],
    "steps": lambda x: x[:, ::2],
    "flat nodes": lambda x: x.view(-1, WIDTH),
    "transposed": lambda x: x.transpose(0, 1),
    "joined rows": lambda x: torch.cat([x, x], dim=0),
    "joined with itself": lambda x: torch.cat([x, x], dim=-1),
    "joined with two of its towers": lambda x: torch.cat([x[:, 0], x[:, 1]], dim=-1),
    "joined with more": lambda x: torch.cat([x, x.new_ones(ROWS, TOWERS, WIDTH)], dim=-1),
    "mean": lambda x: x.mean(dim=1),
    "repeated": lambda x: x.repeat(1, 2, 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_computed_once(name: str, source: Counted) -> None:
    out = OTHERS[name](towers(source))
    assert type(out) is Tensor
    assert torch.equal(out, OTHERS[name](source.value.view(ROWS, TOWERS, WIDTH)))
    assert source.runs == 1


def test_changes_in_place_reach_what_columns_are_of_and_no_copy(source: Counted) -> None:
    """As in torch: views share memory, results of functions and joined ones do not."""

    def changed(x: Any, late: bool) -> list[Tensor]:
        flat = x.flatten(1)
        one, two = flat.split(6, dim=1)
        joined, function = torch.cat([flat, flat.new_ones(ROWS, 1)], dim=1), one.relu()
        if late:
            one.relu_()
            two.mul_(3)
        else:
            flat.neg_()
        return [joined, function, one, two, flat, x]

    for late in (True, False):
        expected = changed(source.value.clone().view(ROWS, TOWERS, WIDTH), late)
        for order in (1, -1):
            found = changed(towers(source), late)
            for got, wanted in list(zip(found, expected, strict=True))[::order]:
                assert torch.equal(got + 0, wanted)


def test_what_is_joined_is_as_it_was_when_it_was_joined(source: Counted) -> None:
    known = torch.randn(ROWS, TOWERS, 1)
    expected = torch.cat([known, source.value.view(ROWS, TOWERS, WIDTH)], dim=-1)
    out = torch.cat([known, towers(source)], dim=-1)
    known.zero_()
    assert type(out) is Shaped
    assert torch.equal(out + 0, expected)


def test_towers_are_packed_in_one_pass_from_the_second_call_on(source: Counted) -> None:
    asked, ranges = Asked(), [{**RANGE, "out_scale": torch.tensor(0.1 * (k + 1))} for k in range(TOWERS)]
    for runs in (TOWERS, 1, 1):
        source.runs, x = 0, towers(source, asked)
        for k, out in enumerate(ranges):
            found = x[:, k].pending.packed(**out)
            expected = producers.with_epilogue(source.value.view(ROWS, TOWERS, WIDTH)[:, k].contiguous(), **out)
            assert torch.equal(found, expected)
        assert source.runs == runs
    assert source.repeats == 0


def test_columns_that_meet_again_are_computed_once(source: Counted) -> None:
    """As those of FiLM's own term, whose factor and shift one linear map gives."""
    one, two = towers(source).flatten(1).split(6, dim=1)
    out = (one.relu() * 2 + two).relu()
    factor, shift = source.value[:, :6], source.value[:, 6:]
    expected = (factor.relu() * 2 + shift).relu()
    assert torch.equal(out.pending.packed(**RANGE), codes(expected))
    assert (source.runs, source.repeats) == (1, 0)
    assert torch.equal(out + 0, expected)


# Layers ###############################################################################################################


class Overwrites(MessagePassing):
    """Writes over what a message read of its targets before anybody has asked for the result."""

    def __init__(self, late: bool) -> None:
        super().__init__(aggr="mean")
        self.late, self.lin, self.shift = late, nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 2 * FEATURES)
        self.last = nn.Linear(FEATURES, 5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        scale, shift = self.shift(x).split(FEATURES, dim=-1)
        if not self.late:
            scale, shift = scale + 0, shift + 0
        out = self.propagate(edge_index, x=self.lin(x), scale=scale, shift=shift)
        scale.zero_()
        shift.relu_()
        return self.last(out) + scale.sum() + shift.sum()

    def message(self, x_j: Tensor, scale_i: Tensor, shift_i: Tensor) -> Tensor:
        return torch.relu(scale_i * x_j + shift_i)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "FiLM": (lambda: FiLMConv(FEATURES, 9), (X, EDGE_INDEX)),
    "FiLM of relations": (lambda: FiLMConv(FEATURES, 9, num_relations=3), (X, EDGE_INDEX, EDGE_TYPE)),
    "towers": (
        lambda: PNAConv(FEATURES, 9, ["mean", "std", "max"], ["identity", "attenuation"], DEGREES, towers=3),
        (X, EDGE_INDEX),
    ),
    "overwritten": (lambda: Overwrites(late=False), (X, EDGE_INDEX)),
    "overwritten columns": (lambda: Overwrites(late=True), (X, EDGE_INDEX)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("blocks", [False, True])
def test_layers_are_those_of_the_converted_model(name: str, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every call: the first finds kernels, the second packs what the first was asked for."""
    make, args = LAYERS[name]
    torch.manual_seed(0)
    qmodel = qgnn.quantize_model(nn.ModuleList([make()]).eval()[0], bits=4)
    qgnn.calibrate(qmodel, [args], method="ranges")
    packed = qgnn.pack_model(qmodel.eval())
    if blocks:
        monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * FEATURES)
    with torch.no_grad():
        expected = qmodel(*args)
        for _ in range(3):
            torch.testing.assert_close(packed(*args), expected, rtol=2e-6, atol=2e-6)


def test_what_aggregations_of_towers_give_is_never_written_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    make, args = LAYERS["towers"]
    qmodel = qgnn.quantize_model(make().eval(), bits=4)
    qgnn.calibrate(qmodel, [args], method="ranges")
    packed, seen = qgnn.pack_model(qmodel.eval()), list[str]()
    own = Shaped.materialized

    def materialized(self: Shaped) -> Tensor:
        seen.append(str(tuple(self.shape)))
        return own(self)

    with torch.no_grad():
        packed(*args)
        monkeypatch.setattr(Shaped, "materialized", materialized)
        packed(*args)
    assert seen == []
