"""Sums of results that are not computed yet: over two terms, and over relations without their stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packing.lazy.test_deferred import RANGE, ROWS, WIDTH, Counted, codes
from torch import Tensor, nn
from torch_geometric.nn import GraphConv, HeteroConv, SAGEConv

import qgnn_plugin
from qgnn_plugin.packing.lazy import sizes
from qgnn_plugin.packing.lazy.deferred import DeferredTensor
from qgnn_plugin.packing.lazy.sums import Stacked

TYPES = ["a", "b"]
RELATIONS = [(one, f"{one}{other}{k}", other) for one in TYPES for other in TYPES for k in range(2)]


def sources(count: int) -> list[Counted]:
    return [Counted(torch.randn(ROWS, WIDTH)) for _ in range(count)]


def test_a_sum_of_two_runs_each_once_and_gives_codes() -> None:
    one, other = sources(2)
    total = torch.relu(one.tensor().relu() + other.tensor())
    assert isinstance(total, DeferredTensor)
    assert one.runs == other.runs == 0
    expected = (one.value.relu() + other.value).relu()
    assert torch.equal(total.pending.packed(**RANGE), codes(expected))
    assert one.runs == other.runs == 1
    assert torch.equal(total.materialized(), expected)
    assert (one.repeats, other.repeats) == (1, 1)  # asked for twice: both are told


def test_a_product_of_two_runs_each_once_and_gives_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = sources(2)
    product = one.tensor().relu() * other.tensor()
    assert isinstance(product, DeferredTensor)
    expected = one.value.relu() * other.value
    assert torch.equal(product.pending.packed(**RANGE), codes(expected))
    assert one.runs == other.runs == 1
    x = one.tensor()
    assert torch.equal(x * x, one.value * one.value)
    assert torch.equal(one.tensor() * torch.ones(WIDTH), one.value)
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * WIDTH)
    known = torch.randn(ROWS, WIDTH)
    x = one.tensor()
    assert torch.equal(known * x, known * one.value)
    assert x.pending.value is None


def test_a_sum_with_itself_or_with_numbers_is_computed() -> None:
    (one,) = sources(1)
    x = one.tensor()
    assert torch.equal(x + x, 2 * one.value)
    y = one.tensor()
    assert torch.equal(y + torch.ones(WIDTH), one.value + 1)
    assert torch.equal(torch.add(one.tensor(), one.tensor(), alpha=2), one.value + 2 * one.value)


@pytest.fixture
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * WIDTH)


@pytest.mark.usefixtures("several_blocks")
def test_a_sum_with_what_is_known_is_made_by_blocks() -> None:
    """Without the other term as a whole; with another shape or type, of what somebody else may write to, as ever."""
    known = torch.randn(ROWS, WIDTH)
    before = known.clone()
    for turned in (False, True):
        (one,) = sources(1)
        x = one.tensor().relu()
        total = known + x if turned else x + known
        known.zero_()
        assert torch.equal(total, before + one.value.relu())
        assert x.pending.value is None
        total.zero_()
        known.copy_(before)
        assert torch.equal(x + known.double(), known.double() + one.value.relu())
    (one,) = sources(1)
    assert torch.equal(one.tensor() + known[:1], known[:1] + one.value)


# What follows from a sum that is there, by name; none may change what the others read.
READERS: dict[str, Callable[[Any], Tensor]] = {
    "itself": lambda h: h,
    "activation": lambda h: h.tanh().relu(),
    "relu first": lambda h: h.relu() * 2,
    "a product of both": lambda h: h * h.sigmoid(),
    "with another result": lambda h: torch.cat([h, h.relu()], dim=1)[:, :WIDTH],
    "a column of it": lambda h: h[:, 1:3],
    "with what is known": lambda h: torch.ones(ROWS, WIDTH) - h,
    "by blocks": lambda h: h.relu().sum(-1),
}


@pytest.mark.usefixtures("several_blocks")
@pytest.mark.parametrize("first", READERS)
@pytest.mark.parametrize("second", READERS)
def test_what_follows_from_a_sum_reads_it_as_it_was(first: str, second: str) -> None:
    (one,) = sources(1)
    known = torch.randn(ROWS, WIDTH)
    h = one.tensor() + known
    assert isinstance(h, DeferredTensor)
    assert h.pending.value is None
    runs = one.runs
    outs = {name: READERS[name](h) for name in {first, second}}
    for name in (first, second, first):
        assert torch.equal(outs[name], READERS[name](one.value + known)), name
    assert torch.equal(h.pending.packed(**RANGE), codes(one.value + known))
    outs[first].add_(1)
    change = torch.zeros(ROWS, WIDTH)
    change[:, slice(None) if first == "itself" else slice(1, 3 if first == "a column of it" else 1)] = 1  # of views
    assert torch.equal(h, one.value + known + change)
    assert one.runs == runs


@pytest.mark.usefixtures("several_blocks")
def test_floats_that_nothing_else_reads_are_written_over() -> None:
    (one,) = sources(1)
    h = one.tensor() + torch.ones(ROWS, WIDTH)
    place = h.pending.floats.value.data_ptr()
    h = h.tanh()
    assert h.materialized().data_ptr() == place
    assert torch.equal(h, (one.value + 1).tanh())


IN_PLACE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "a number": lambda h, bias, other: h.add_(2).mul_(3),
    "a bias": lambda h, bias, other: h.add_(bias),
    "factors": lambda h, bias, other: h.mul_(bias),
    "a result": lambda h, bias, other: h.add_(other),
    "a matrix": lambda h, bias, other: h.sub_(bias.expand(ROWS, WIDTH).contiguous()),
}


@pytest.mark.usefixtures("several_blocks")
@pytest.mark.parametrize("change", IN_PLACE)
def test_changes_in_place_are_noted_and_reach_every_view(change: str) -> None:
    one, other = sources(2)
    bias, before = torch.randn(WIDTH), torch.randn(WIDTH)
    before.copy_(bias)
    h = one.tensor()
    earlier, view, column = h.relu(), h.view(ROWS, -1), h[:, 2:]
    assert IN_PLACE[change](h, bias, other.tensor()) is h
    assert h.pending.value is None
    bias.zero_()
    expected = IN_PLACE[change](one.value.clone(), before, other.value)
    assert torch.equal(h.pending.packed(**RANGE), codes(expected))
    for found in (h, view):
        assert torch.equal(found, expected)
    assert torch.equal(column, expected[:, 2:])
    assert torch.equal(earlier, one.value.relu())


@pytest.mark.usefixtures("several_blocks")
def test_a_matrix_that_is_there_takes_a_result_by_blocks() -> None:
    (one,) = sources(1)
    x, known = one.tensor().relu(), torch.randn(ROWS, WIDTH)
    expected = known + one.value.relu()
    assert known.add_(x) is known
    assert torch.equal(known, expected)
    assert x.pending.value is None


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs, self.join = nn.ModuleList([GraphConv(WIDTH, WIDTH) for _ in range(3)]), nn.Linear(2 * WIDTH, 3)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor, edge_index: Tensor, given: Tensor) -> Tensor:
        start = x
        for conv in self.convs:
            h = conv(x, edge_index)
            h += self.shift
            x = (h.relu() + x) * given[:1]
        self.kept = [x, h]
        return self.join(torch.cat([x + given, 0.5 * start], dim=-1)).softmax(-1)


@pytest.mark.parametrize("nodes", [40, 700])
def test_residual_models_give_what_their_converted_form_does(monkeypatch: pytest.MonkeyPatch, nodes: int) -> None:
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 256 * WIDTH)
    torch.manual_seed(0)
    edge_index, given = torch.randint(nodes, (2, 5 * nodes)), torch.randn(nodes, WIDTH)
    x = torch.randn(nodes, WIDTH)
    qmodel = qgnn_plugin.quantize_model(Residual().eval(), bits=4)
    qgnn_plugin.calibrate(qmodel, [(x, edge_index, given)], method="ranges")
    packed = qgnn_plugin.pack_model(qmodel.eval())
    with torch.no_grad():
        outs = [packed(x + k, edge_index, given) for k in range(3)]
        for k, out in enumerate(outs):
            torch.testing.assert_close(out, qmodel(x + k, edge_index, given), rtol=1e-4, atol=1e-5)
        assert all(type(t) is Tensor for t in packed.kept)
        for kept, expected in zip(packed.kept, qmodel.kept, strict=True):
            torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
        for where in (given, given[:1]):
            where[0, 0] = torch.nan
            with pytest.raises(ValueError, match="NaN"):
                packed(x, edge_index, given)
            where[0, 0] = 0


def test_the_sum_of_a_stack_is_that_of_torch() -> None:
    for count in (1, 2, 3, 5, 16):
        terms = sources(count)
        stack = torch.stack([term.tensor() for term in terms])
        assert isinstance(stack, Stacked)
        assert torch.equal(stack.sum(0), torch.stack([term.value for term in terms]).sum(0))
        assert all(term.runs == 1 for term in terms)


def test_what_else_is_done_with_a_stack_sees_its_values() -> None:
    terms = sources(3)

    def stack() -> Tensor:
        return torch.stack([term.tensor() for term in terms])

    values = torch.stack([term.value for term in terms])
    assert torch.equal(stack().mean(0), values.mean(0))
    assert torch.equal(stack().sum(0, keepdim=True), values.sum(0, keepdim=True))
    assert torch.equal(stack().sum((0, 1)), values.sum((0, 1)))
    assert torch.equal(stack()[1], values[1])
    kept = stack()
    assert torch.equal(kept.sum(0), values.sum(0))
    assert torch.equal(kept * 2, values * 2)
    assert torch.equal(torch.stack([term.tensor() for term in terms], dim=1), values.transpose(0, 1))


class Hetero(nn.Module):
    def __init__(self, make: type[nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            HeteroConv({relation: make((9, 9), 9) for relation in RELATIONS}, aggr="sum") for _ in range(2)
        )

    def forward(self, x: dict[str, Tensor], edges: dict[tuple[str, str, str], Tensor]) -> dict[str, Tensor]:
        x = {name: value.relu() for name, value in self.convs[0](x, edges).items()}
        return self.convs[1](x, edges)


def test_layers_of_relations_are_those_of_the_converted_model() -> None:
    """Four relations into each type; bit for bit, in the first call and in later ones."""
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(70, 9, generator=generator) for name in TYPES}
    edges = {relation: torch.randint(70, (2, 300), generator=generator) for relation in RELATIONS}
    for make in (GraphConv, SAGEConv):
        torch.manual_seed(0)
        qmodel = qgnn_plugin.quantize_model(Hetero(make).eval(), bits=4)
        qgnn_plugin.calibrate(qmodel, [(x, edges)], method="ranges")
        packed = qgnn_plugin.pack_model(qmodel.eval())
        with torch.no_grad():
            expected = qmodel(x, edges)
            for _ in range(3):
                found = packed(x, edges)
                assert all(torch.equal(found[name], expected[name]) for name in TYPES)
                assert all(type(value) is Tensor for value in found.values())
