"""RGCNConv and FastRGCNConv: sums of relations from packed sources, by relations or by the bases of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import FastRGCNConv, RGCNConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.packing.message_passing import relations

pytest.importorskip("numba")

NODES, EDGES, WIDTH, OUT, RELATIONS = 70, 600, 20, 8, 5
X = torch.randn(NODES, WIDTH, generator=torch.Generator().manual_seed(0))
EDGE_INDEX = torch.randint(NODES - 4, (2, EDGES), generator=torch.Generator().manual_seed(1))
TYPES = torch.randint(RELATIONS - 1, (EDGES,), generator=torch.Generator().manual_seed(2))  # of the last there is none
WEIGHTS: dict[str, dict[str, Any]] = {"each": {}, "bases": {"num_bases": 2}, "blocks": {"num_blocks": 2}}


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """Kernels, in the place of the references that other tests of this folder run."""
    with use_backend("cpu"):
        yield


def pair(model: nn.Module, *args: Tensor, **config: Any) -> tuple[nn.Module, nn.Module]:
    qmodel = qgnn.quantize_model(model.eval(), config=qgnn.QuantConfig(bits=4, **config))
    qgnn.calibrate(qmodel, [args], method="ranges")
    return qmodel.eval(), qgnn.pack_model(qmodel)


def agree(qmodel: nn.Module, packed: nn.Module, *args: Tensor) -> None:
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(packed(*args), qmodel(*args), rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("aggr", ["mean", "add", "max"])
@pytest.mark.parametrize("granularity", ["row", "tensor", "channel", "node"])
def test_relations_are_those_of_the_converted_layer(weights: str, aggr: str, granularity: Any) -> None:
    qmodel, packed = pair(
        RGCNConv(WIDTH, OUT, RELATIONS, aggr=aggr, **WEIGHTS[weights]), X, EDGE_INDEX, TYPES, granularity=granularity
    )
    agree(qmodel, packed, X, EDGE_INDEX, TYPES)
    agree(qmodel, packed, X, EDGE_INDEX[:, :0], TYPES[:0])


@pytest.mark.parametrize("weights", ["each", "blocks"])
def test_sums_are_those_of_propagate_bit_for_bit(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = pair(RGCNConv(WIDTH, OUT, RELATIONS, **WEIGHTS[weights]), X, EDGE_INDEX, TYPES)
    with torch.no_grad():
        found = packed(X, EDGE_INDEX, TYPES)
        monkeypatch.setattr(relations, "_is_sum", lambda layer, cls: False)
        assert torch.equal(packed(X, EDGE_INDEX, TYPES), found)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_types_that_there_are_not_are_refused_as_in_pyg(weights: str) -> None:
    qmodel, packed = pair(RGCNConv(WIDTH, OUT, RELATIONS, **WEIGHTS[weights]), X, EDGE_INDEX, TYPES)
    for other in (TYPES - 1, TYPES + 2):
        for model in (qmodel, packed):
            if weights != "blocks":  # which PyG leaves out there
                with torch.no_grad(), pytest.raises(RuntimeError, match="out of bounds"):
                    model(X, EDGE_INDEX, other)
        if weights == "blocks":
            agree(qmodel, packed, X, EDGE_INDEX, other)


def test_bases_run_no_product_per_relation(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel, packed = pair(RGCNConv(WIDTH, OUT, RELATIONS, num_bases=2), X, EDGE_INDEX, TYPES)
    monkeypatch.setattr(relations._Terms, "add_relation", None)
    agree(qmodel, packed, X, EDGE_INDEX, TYPES)


def test_coefficients_of_bases_may_change_between_calls() -> None:
    qmodel, packed = pair(RGCNConv(WIDTH, OUT, RELATIONS, num_bases=2), X, EDGE_INDEX, TYPES)
    agree(qmodel, packed, X, EDGE_INDEX, TYPES)
    with torch.no_grad():
        for model in (qmodel, packed):
            model.comp[1] *= -3  # type: ignore[operator, index]
    agree(qmodel, packed, X, EDGE_INDEX, TYPES)


class Doubled(RGCNConv):
    def message(self, x_j: Tensor, edge_type_ptr: Any) -> Tensor:
        return 2 * x_j + 1


class FastDoubled(FastRGCNConv):
    def message(self, x_j: Tensor, edge_type: Tensor, edge_index_j: Tensor) -> Tensor:
        return 2 * super().message(x_j, edge_type, edge_index_j)


class Shifted(RGCNConv):
    def update(self, inputs: Tensor) -> Tensor:
        return inputs - 1


@pytest.mark.parametrize("cls", [Doubled, FastDoubled, Shifted])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_a_users_class_sends_is_what_counts(cls: Any, weights: str) -> None:
    torch.manual_seed(0)
    model = cls(WIDTH, OUT, RELATIONS, **WEIGHTS[weights])
    qmodel, packed = pair(model, X, EDGE_INDEX, TYPES)
    agree(qmodel, packed, X, EDGE_INDEX, TYPES)
