"""Packed propagations: K steps on packed messages, a kernel for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import erdos_renyi
from packing.cases import FEATURES, features
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import APPNP, LGConv, LightGCN, SGConv, SSGConv, TAGConv

import qgnn_plugin
from qgnn_plugin import QuantConfig, SMPConfig, SMPropagation
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.plan import GraphPlan


class Calls(TorchDispatchMode):
    """Counts the ops of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qgnn":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def pair(model: nn.Module, *weight: Tensor, **config: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    graph = erdos_renyi(40, 200)
    args = (features("dense", 40), graph.edge_index, *weight)
    qmodel = qgnn_plugin.quantize_model(model, config=QuantConfig(**{"bits": 4, **config})).eval()
    qgnn_plugin.calibrate(qmodel, args, method="ranges")
    return qmodel, qgnn_plugin.pack_model(qmodel), args


def assert_equal(qmodel: Any, packed: Any, args: tuple[Any, ...]) -> None:
    with torch.no_grad():
        assert torch.equal(packed(*args), qmodel(*args))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    "model",
    [
        APPNP(3, 0.1), APPNP(1, 0.5), APPNP(2, 1.0), SMPropagation(3, 0.15),
        SMPropagation(4, smp=SMPConfig(eta=0.2, mu=2.0)),
    ],
    ids=["appnp", "one step", "teleport only", "smp", "smp that keeps its state"],
)  # fmt: skip
@pytest.mark.parametrize("bits", [2, 8])
def test_steps_run_in_one_kernel_each(model: Any, bits: int, backend: str, poison_empty: None) -> None:
    with use_backend(backend):
        qmodel, packed, args = pair(model, bits=bits, granularity="tensor")  # what that kernel sums
        assert_equal(qmodel, packed, args)
        with Calls() as calls:
            packed(*args)
    assert calls.names.count("smp_step") == model.K
    assert calls.names.count("quantize_pack") == 2  # the input, and what the first step sends
    assert "aggregate" not in calls.names


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    "config",
    [
        {"granularity": "node"},
        {"granularity": "row"},
        {"message_levels": "half"},
        {"truncation": "bt"},
        {"message_bits": 32},
        {"smp": SMPConfig(multiplier=0.5)},
        {"smp": SMPConfig(multiplier=0.05, correction="explicit"), "granularity": "node"},
        {"smp": SMPConfig(state_bits=8)},
    ],
    ids=lambda c: "-".join(c),
)
@pytest.mark.parametrize("model", [APPNP(3, 0.1), SMPropagation(3, 0.2)], ids=["appnp", "smp"])
def test_equals_the_converted_layer(model: Any, config: dict[str, Any], bits: int, poison_empty: None) -> None:
    if isinstance(model, SMPropagation) and "smp" in config:
        model = SMPropagation(3, 0.2, smp=config["smp"])
    qmodel, packed, args = pair(model, **{"bits": bits, **config})
    assert_equal(qmodel, packed, args)
    assert qgnn_plugin.summary(packed).layers[0].reason is None


HOPS = {
    "SGConv": lambda: SGConv(FEATURES, 6, 3),
    "SGConv wider": lambda: SGConv(FEATURES, FEATURES + 3, 2),
    "SSGConv": lambda: SSGConv(FEATURES, 6, 0.1, 2),
    "TAGConv": lambda: TAGConv(FEATURES, 6, 2),
    "LGConv": lambda: LGConv(),
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"granularity": "node"},
        {"granularity": "row"},
        {"truncation": "bt"},
        {"smp": SMPConfig(multiplier=0.5, state_bits=8)},
    ],
    ids=lambda c: "-".join(c),
)
@pytest.mark.parametrize("name", HOPS)
def test_hops_equal_the_converted_layer(name: str, config: dict[str, Any], poison_empty: None, tmp_path: Any) -> None:
    for bits in (2, 8):
        qmodel, packed, args = pair(HOPS[name](), **{"bits": bits, **config})
        assert_equal(qmodel, packed, args)
        assert {layer.reason for layer in qgnn_plugin.summary(packed).layers} == {None}
    qgnn_plugin.save_packed(packed, tmp_path / "hops.safetensors")
    loaded = qgnn_plugin.load_packed(tmp_path / "hops.safetensors", HOPS[name]())
    assert torch.equal(loaded(*args), packed(*args))


def test_hops_on_sparse_and_weighted_graphs_and_at_32_bits() -> None:
    qmodel, packed, args = pair(TAGConv(FEATURES, 6, 2, normalize=False), torch.rand(200))
    assert_equal(qmodel, packed, args)
    qmodel, packed, args = pair(SGConv(FEATURES, 6, 2, cached=True), message_bits=32, input_bits=32, smp=None)
    assert_equal(qmodel, packed, args)
    assert [layer.reason for layer in qgnn_plugin.summary(packed).layers] == ["32 bits", None]


@pytest.mark.parametrize("name", HOPS)
def test_hops_refuse_values_that_are_not_finite(name: str) -> None:
    _, packed, (x, edge_index) = pair(HOPS[name]())
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        packed(x, edge_index)


def test_packed_light_gcn() -> None:
    model = LightGCN(40, 8, num_layers=2)
    graph = erdos_renyi(40, 200)
    qmodel = qgnn_plugin.quantize_model(model, 4).eval()
    qgnn_plugin.calibrate(qmodel, [graph.edge_index], forward=lambda m, e: m.get_embedding(e))
    packed = qgnn_plugin.pack_model(qmodel)
    with torch.no_grad():
        assert torch.equal(packed.get_embedding(graph.edge_index), qmodel.get_embedding(graph.edge_index))
    assert not any(layer.reason for layer in qgnn_plugin.summary(packed).layers)


@pytest.mark.parametrize("options", [{"normalize": False}, {"add_self_loops": False}, {"flow": "target_to_source"}])
def test_options(options: dict[str, Any]) -> None:
    qmodel, packed, args = pair(APPNP(2, 0.1, **options))
    assert_equal(qmodel, packed, args)


def test_edge_weights() -> None:
    qmodel, packed, args = pair(APPNP(3, 0.1), torch.rand(200))
    with torch.no_grad():
        torch.testing.assert_close(packed(*args), qmodel(*args), rtol=1e-5, atol=1e-5)


def test_a_multiplier_that_moves_by_itself_stays_in_floats() -> None:
    qmodel, packed, args = pair(SMPropagation(3, 0.2, smp=SMPConfig(schedule="inner")))
    assert_equal(qmodel, packed, args)
    assert "moves within the forward pass" in str(qgnn_plugin.summary(packed))


def test_saved_and_loaded(tmp_path: Any) -> None:
    def model() -> nn.Module:
        return SMPropagation(3, 0.2, smp=SMPConfig(multiplier=0.3))

    _, packed, args = pair(model())
    qgnn_plugin.save_packed(packed, tmp_path / "smp.safetensors")
    loaded = qgnn_plugin.load_packed(tmp_path / "smp.safetensors", model())
    assert torch.equal(loaded(*args), packed(*args))


def test_plan_of_some_rows() -> None:
    graph = erdos_renyi(40, 200)
    plan = GraphPlan.from_edges(*graph.edge_index, 40, 40)
    part = plan.rows(10, 25)
    assert (part.num_dst, part.num_src) == (15, 40)
    rows = torch.zeros(40, 40).index_put_((plan.dst, plan.col.long()), torch.ones(()), accumulate=True)
    found = torch.zeros(15, 40).index_put_((part.dst, part.col.long()), torch.ones(()), accumulate=True)
    assert torch.equal(found, rows[10:25])
    values = torch.randn(200)
    assert part.perm is not None
    assert torch.equal(values[part.perm], plan.sort(values)[plan.edges(10, 25)])
    assert plan.rows(0, 40) is plan
