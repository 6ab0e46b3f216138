"""Sums of results that are not computed yet: over two terms, and over relations without their stack."""

from __future__ import annotations

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


def test_a_sum_with_what_is_known_is_made_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the other term as a whole; with another shape or type, of what somebody else may write to, as ever."""
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * WIDTH)
    known = torch.randn(ROWS, WIDTH)
    before = known.clone()
    for turned in (False, True):
        (one,) = sources(1)
        x = one.tensor().relu()
        total = known + x if turned else x + known
        assert type(total) is Tensor
        assert torch.equal(total, known + one.value.relu())
        assert x.pending.value is None
        assert torch.equal(known, before)
        total.zero_()
        assert torch.equal(x + known.double(), known.double() + one.value.relu())
    (one,) = sources(1)
    assert torch.equal(one.tensor() + known[:1], known[:1] + one.value)


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
