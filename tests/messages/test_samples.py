"""Features of several samples: traced for one, run for each, and compared with what the layer gives of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.support import Summed
from messages.cases import EDGE_INDEX, EDGES, NODES, WIDTH, X
from messages.traced_support import agree, paths
from torch import Tensor, nn
from torch_geometric.nn import ARMAConv, MessagePassing, TransformerConv

import qgnn_plugin as qgnn
from qgnn_plugin.messages.samples import samples_of
from qgnn_plugin.packing.message_passing.call import Propagation
from qgnn_plugin.packing.message_passing.nodes import PackedNodes, packed_nodes

pytest.importorskip("numba")

SAMPLES = torch.stack([X, 0.3 * X, 1 - X])
WEIGHT = torch.rand(EDGES, generator=torch.Generator().manual_seed(5))


def packed_pair(layer: nn.Module, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    qmodel = qgnn.quantize_model(layer.eval(), config=qgnn.QuantConfig(bits=4, **options))
    qgnn.calibrate(qmodel, [args], method="ranges")
    return qmodel.eval(), qgnn.pack_model(qmodel)


@pytest.mark.parametrize("granularity", ["row", "tensor", "node"])
def test_each_sample_by_one_kernel(granularity: str) -> None:
    torch.manual_seed(0)
    qmodel, packed = packed_pair(Summed(WIDTH, 6), SAMPLES, EDGE_INDEX, WEIGHT, granularity=granularity)
    for x in (SAMPLES, SAMPLES[:1], torch.stack([SAMPLES, SAMPLES + 1])):
        agree(qmodel, packed, x, EDGE_INDEX, WEIGHT, exact=True)
    assert paths(packed) == {"generated kernel"}


def test_stacks_of_a_layer() -> None:
    torch.manual_seed(0)
    qmodel, packed = packed_pair(ARMAConv(WIDTH, 6, num_stacks=3, num_layers=2), X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    assert paths(packed) == {"generated kernel"}


def test_one_set_of_targets_for_all_samples() -> None:
    torch.manual_seed(0)
    edges = torch.stack([EDGE_INDEX[0], EDGE_INDEX[1] % 40])
    layer = Summed((WIDTH, WIDTH), 6, aggr="max")
    qmodel, packed = packed_pair(layer, (SAMPLES, X[:40]), edges)
    agree(qmodel, packed, (SAMPLES, X[:40]), edges, exact=True)
    assert paths(packed) == {"generated kernel"}


class Ranks(MessagePassing):
    """Sends something else where features are of samples."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_j: Tensor) -> Tensor:
        return self.factor * (x_j if x_j.dim() == 2 else 2 * x_j)


class Across(Ranks):
    """Looks across what are samples in one call, and edges in another."""

    def message(self, x_j: Tensor) -> Tensor:
        return x_j - x_j.mean(0, keepdim=True)


@pytest.mark.parametrize("make", [Ranks, Across])
def test_what_is_not_the_same_for_each_sample_is_not_traced(make: Any) -> None:
    qmodel, packed = packed_pair(make(), SAMPLES, EDGE_INDEX)
    agree(qmodel, packed, SAMPLES, EDGE_INDEX)
    assert "generated kernel" not in paths(packed)


def test_a_new_trace_is_compared_with_all_samples_again() -> None:
    class Changes(Ranks):
        def message(self, x_j: Tensor) -> Tensor:
            return x_j if self.factor == 1 or x_j.dim() == 2 else self.factor * x_j

    qmodel, packed = packed_pair(Changes(), SAMPLES, EDGE_INDEX)
    agree(qmodel, packed, SAMPLES, EDGE_INDEX, exact=True)
    assert paths(packed) == {"generated kernel"}
    for layer in (qmodel, packed):
        layer.factor = 3.0
    agree(qmodel, packed, SAMPLES, EDGE_INDEX)


def test_heads_are_no_samples() -> None:
    torch.manual_seed(0)
    qmodel, packed = packed_pair(TransformerConv(WIDTH, 6, heads=2), X, EDGE_INDEX)
    agree(qmodel, packed, X, EDGE_INDEX)
    layer = packed
    call = Propagation.of(layer, EDGE_INDEX, None, {"query": X, "key": X, "value": X.view(NODES, 2, -1)})
    assert layer.node_dim == 0
    assert samples_of(call) is None


@pytest.mark.parametrize("node_dim", [-2, 1, 0])
def test_packed_features_of_samples_are_those_that_were_given(node_dim: int) -> None:
    _, packed = packed_pair(Summed(WIDTH, 6), X, EDGE_INDEX)
    site = packed.argument_quantizers["x"]
    found = packed_nodes(site, SAMPLES, node_dim)
    assert isinstance(found, PackedNodes)
    values, dim = found.values(), node_dim % 3
    rows = torch.tensor([2, 0, 2])
    assert torch.equal(found.take(rows), values.index_select(dim, rows))
    if dim == 1:
        alone = [packed_nodes(site, sample, -2).values() for sample in SAMPLES]
        assert torch.equal(values, torch.stack(alone))
        assert torch.equal(found.sample(1).values(), alone[1])
