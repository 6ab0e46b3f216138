"""Packed models against ``qmodel.eval()``."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from graphs import GRAPHS, erdos_renyi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing.cases import ATTENTION, FEATURES, MODELS, features, packed_pair, quantized
from torch import nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import GATConv, GATv2Conv, GCNConv, GINConv, SAGEConv

import qgnn_plugin
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.kernels.backend import available_backends, use_backend
from qgnn_plugin.kernels.plan import plan_cache
from qgnn_plugin.packing.layers.linear import PackedLinear

CASES = [
    {"bits": 2},
    {"bits": 8, "granularity": "node", "weight_granularity": "tensor"},
    {"bits": 2, "granularity": "row"},
    {"bits": 4, "granularity": "row", "message_levels": "half"},
    {"bits": 4, "granularity": "channel", "weight_levels": "affine", "message_levels": "half"},
    {"bits": 2, "truncation": "sbt"},
    {"bits": 2, "weight_bits": 8, "message_bits": 4, "output_bits": 8},
]


def assert_same(qmodel: nn.Module, packed: nn.Module, *args: Any, exact: bool = True) -> None:
    with torch.no_grad():
        expected = qmodel(*args)
    out = packed(*args)
    assert out.dtype == expected.dtype
    if exact:
        bad = (out != expected).nonzero()
        assert not len(bad), f"differs at {bad[:4].tolist()}: {out[tuple(bad[0])]}"
    else:
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(out.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("config", CASES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("name", MODELS)
def test_models_equal_bit_for_bit(name: str, config: dict[str, Any], poison_empty: None) -> None:
    qmodel, packed, args = packed_pair(name, **config)
    assert_same(qmodel, packed, *args)


@pytest.mark.parametrize("kind", ["binary", "rows", "sparse", "sparse_rows"])
@pytest.mark.parametrize("name", ["gcn", "sage", "sage_wide", "gin"])
def test_one_bit_inputs(name: str, kind: str, poison_empty: None) -> None:
    qmodel, packed, args = packed_pair(name, kind, bits=4)
    assert_same(qmodel, packed, *args)
    assert any(s.bits == 1 for spec in packed._packed_specs for s in spec.sites.values())


@pytest.mark.parametrize("config", CASES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, config: dict[str, Any], poison_empty: None) -> None:
    qmodel, packed, args = packed_pair(name, **config)
    assert_same(qmodel, packed, *args, exact=False)
    assert all(spec.reason is None for spec in packed._packed_specs)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["gcn", "sage", "gin", "appnp", "gat", "gatv2"])
def test_accurate_configuration(name: str, bits: int, depth: int, backend: str, poison_empty: None) -> None:
    """A range per node: sums round, and where zero lies halfway between two levels one ulp decides on its code."""
    qmodel, packed, args = accurate_pair({**MODELS, **ATTENTION}[name](depth=depth), bits)
    assert all(spec.reason is None for spec in packed._packed_specs)
    with use_backend(backend):
        assert_same(qmodel, packed, *args)
        assert torch.equal(packed(*args), qmodel(*args).detach())  # with gradients as well


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
def test_edge_weights(granularity: str, backend: str) -> None:
    """Weighted sums round, too."""
    graph = erdos_renyi(40, 200)
    args = features("dense", 40), graph.edge_index, torch.rand(200)
    config = QuantConfig(bits=4, granularity=granularity, message_levels="half")
    qmodel = qgnn_plugin.quantize_model(MODELS["gcn"](depth=3), config=config).eval()
    qgnn_plugin.calibrate(qmodel, args, method="ranges")
    with use_backend(backend):
        assert_same(qmodel, qgnn_plugin.pack_model(qmodel), *args)


def accurate_pair(model: nn.Module, bits: int) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    graph = erdos_renyi(40, 200)
    args = features("dense", 40), graph.edge_index
    qmodel = qgnn_plugin.quantize_model(model, config=QuantConfig.accurate(bits)).eval()
    qgnn_plugin.calibrate(qmodel, args, method="ranges")
    return qmodel, qgnn_plugin.pack_model(qmodel), args


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("bits", [2, 4])
def test_accurate_layers(bits: int, backend: str, poison_empty: None) -> None:
    """One layer each: sums over ranges per node (and head) differ by rounding, which a next layer may make a level."""
    for layer in (
        GCNConv(FEATURES, 9), SAGEConv(FEATURES, 9), GATConv(FEATURES, 5, heads=3), GATv2Conv(FEATURES, 5, heads=2),
    ):  # fmt: skip
        qmodel, packed, args = accurate_pair(layer, bits)
        assert all(spec.reason is None for spec in packed._packed_specs)
        with use_backend(backend):
            assert_same(qmodel, packed, *args, exact=False)


@pytest.mark.parametrize("attention_bits", [2, 32])
@pytest.mark.parametrize("layer", [GATConv, GATv2Conv])
def test_attention_options(layer: Any, attention_bits: int) -> None:
    graph = erdos_renyi(30, 100)
    x, edge_attr = features("dense", 30), torch.randn(100, 3)
    config = QuantConfig(bits=4, attention_bits=attention_bits)
    for options in ({"concat": False, "residual": True}, {"edge_dim": 3, "fill_value": 0.5}):
        model = layer(FEATURES, 5, heads=2, **options)
        args = (x, graph.edge_index, edge_attr) if "edge_dim" in options else (x, graph.edge_index)
        qmodel = qgnn_plugin.quantize_model(model, config=config).eval()
        qgnn_plugin.calibrate(qmodel, args, method="ranges")
        packed = qgnn_plugin.pack_model(qmodel)
        assert_same(qmodel, packed, *args, exact=False)
        out, (index, alpha) = packed(*args, return_attention_weights=True)
        with torch.no_grad():
            expected = qmodel(*args, return_attention_weights=True)
        torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(index, expected[1][0])
        torch.testing.assert_close(alpha, expected[1][1])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(MODELS)),
    kind=st.sampled_from(["dense", "binary", "sparse"]),
    nodes=st.integers(1, 40),
    degree=st.integers(0, 8),
    width=st.integers(1, 70),
    bits=st.sampled_from([2, 4, 8]),
    weight_bits=st.sampled_from([2, 4, 8, 32]),
    granularity=st.sampled_from(["tensor", "channel", "node", "row"]),
    seed=st.integers(0, 2**16),
)
def test_random_graphs_widths_and_bits(
    name: str, kind: str, nodes: int, degree: int, width: int, bits: int, weight_bits: int,
    granularity: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    graph = erdos_renyi(nodes, nodes * degree, seed)
    x = features(kind, nodes, width, seed)
    config = {"bits": bits, "weight_bits": weight_bits, "granularity": granularity}
    qmodel = quantized(MODELS[name](width), x, graph.edge_index, **config)
    # A 32-bit weight multiplies in floats, whose order of summation is the library's.
    assert_same(qmodel, qgnn_plugin.pack_model(qmodel), x, graph.edge_index, exact=weight_bits != 32)


@pytest.mark.parametrize("graph", [g for g in GRAPHS if g not in ("star", "no_nodes")])
def test_odd_graphs(graph: str, poison_empty: None) -> None:
    edge_index, nodes = GRAPHS[graph]()
    x = features("dense", nodes)
    for layer in (GCNConv(FEATURES, 9), SAGEConv(FEATURES, 9), GINConv(nn.Linear(FEATURES, 9))):
        qmodel = quantized(layer, x, edge_index, bits=2)
        assert_same(qmodel, qgnn_plugin.pack_model(qmodel), x, edge_index)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_hub_of_100_000_neighbours(backend: str) -> None:
    """At 8 bits its sum of codes passes 2^24, beyond which float32 does not hold every integer."""
    leaves = 100_000
    edge_index = torch.stack([torch.arange(1, leaves + 1), torch.zeros(leaves, dtype=torch.long)])
    x = features("dense", leaves + 1, 3)
    for layer in (GCNConv(3, 2), SAGEConv(3, 2), SAGEConv(3, 4, aggr="sum"), GINConv(nn.Linear(3, 2))):
        qmodel = quantized(layer, x, edge_index, bits=8)
        with use_backend(backend):
            assert_same(qmodel, qgnn_plugin.pack_model(qmodel), x, edge_index)


def test_every_adjacency_and_weights() -> None:
    graph = erdos_renyi(30, 120)
    edge_index = torch.unique(graph.edge_index, dim=1)
    # PyG's own formats differ where a graph has self-loops: see gcn_graph.
    edge_index = edge_index[:, edge_index[0] != edge_index[1]].contiguous()
    x = features("dense", 30)
    qmodel = quantized(GCNConv(FEATURES, 9), x, edge_index, bits=4)
    packed = qgnn_plugin.pack_model(qmodel)
    ones = torch.ones(edge_index.size(1))
    transposed = torch.sparse_coo_tensor(edge_index.flip(0), ones, (30, 30)).coalesce()
    expected = packed(x, edge_index)
    for adjacency in (transposed, transposed.to_sparse_csr(), transposed.to_sparse_csc(),
                      EdgeIndex(edge_index, sparse_size=(30, 30))):  # fmt: skip
        assert torch.equal(packed(x, adjacency), expected)
    assert_same(qmodel, packed, x, edge_index, torch.rand(edge_index.size(1)), exact=False)


def test_bipartite_pairs() -> None:
    edge_index = torch.stack([torch.randint(20, (60,)), torch.randint(11, (60,))])
    pair = (torch.randn(20, 6), torch.randn(11, 5))
    for layer in (SAGEConv((6, 5), 4), SAGEConv((6, 5), 9, aggr="max"), GATConv((6, 5), 4, add_self_loops=False),
                  GATv2Conv((6, 5), 4, add_self_loops=False)):  # fmt: skip
        qmodel = quantized(layer, pair, edge_index, bits=4)
        assert_same(qmodel, qgnn_plugin.pack_model(qmodel), pair, edge_index, exact=False)


@pytest.mark.parametrize("name", [*MODELS, *ATTENTION])
def test_multipliers_are_honoured(name: str) -> None:
    config = {"bits": 4, "smp": SMPConfig(multiplier=0.4)}
    qmodel, packed, args = packed_pair(name, **config)
    assert_same(qmodel, packed, *args, exact=False)
    plain = qgnn_plugin.quantize_model(qgnn_plugin.restore_model(qmodel), config=QuantConfig(bits=4))
    free = qgnn_plugin.pack_model(qgnn_plugin.calibrate(plain.eval(), args))
    assert not any("multiplier" in key for key in free.state_dict())


def test_layers_without_a_kernel_of_their_own_are_packed_too() -> None:
    qmodel, packed, args = packed_pair("mixed", bits=4)
    assert_same(qmodel, packed, *args)
    runs = {layer.name: layer.runs for layer in qgnn_plugin.summary(packed).layers}
    assert set(runs) >= {"conv1", "conv2", "conv3"}
    assert runs["conv1"] == "packed: kernel"
    assert all(how.startswith("packed: ") for how in runs.values())


@pytest.mark.parametrize("site", ["input_bits", "weight_bits", "activation_bits", "message_bits"])
@pytest.mark.parametrize("name", ["gcn", "sage", "gin", "appnp"])
def test_sites_at_32_bits(name: str, site: str) -> None:
    qmodel, packed, args = packed_pair(name, bits=4, **{site: 32})
    assert_same(qmodel, packed, *args, exact=False)


def test_shared_layers_stay_shared() -> None:
    qmodel, packed, args = packed_pair("shared", bits=4)
    assert packed.layers[0] is packed.layers[1] is packed.again
    assert_same(qmodel, packed, *args)


def test_copies_and_pickles() -> None:
    _, packed, args = packed_pair("gcn", bits=2)
    expected = packed(*args)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(*args), expected)
    other = qgnn_plugin.pack_model(packed_pair("gcn", bits=2)[0])
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(*args), expected)
    assert torch.equal(packed(*args), expected)


def test_weights_are_integers() -> None:
    qmodel, packed, _ = packed_pair("gcn", bits=2)
    linears = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    assert len(linears) == 2
    assert all(m.words is not None and m.words.dtype == torch.int32 for m in linears)
    assert not any(key.endswith("lin.weight") for key in packed.state_dict())
    float_state = qgnn_plugin.restore_model(qmodel).state_dict()
    size = qgnn_plugin.packed_bytes(packed)
    assert size.float == sum(t.numel() * t.element_size() for t in float_state.values())
    assert size.ratio > 1


def test_plans_are_built_once() -> None:
    _, packed, args = packed_pair("gcn", bits=2)
    packed(*args)
    entries = len(plan_cache)
    packed(*args)
    assert len(plan_cache) == entries


@pytest.mark.parametrize("granularity", ["tensor", "node", "row"])
@pytest.mark.parametrize("name", ["gcn", "sage", "gin", "appnp", "gat"])
def test_threads_do_not_matter(name: str, granularity: str) -> None:
    """On a graph that is large enough to be shared out."""
    graph = erdos_renyi(1000, 12_000)
    args = features("dense", 1000), graph.edge_index
    qmodel = quantized({**MODELS, **ATTENTION}[name](), *args, bits=4, granularity=granularity)
    packed = qgnn_plugin.pack_model(qmodel)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("cpu"):
                outs.append(packed(*args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.slow
def test_default_backend_agrees() -> None:
    assert available_backends()
    qmodel, packed, args = packed_pair("sage", bits=2)
    with use_backend("auto"):
        assert_same(qmodel, packed, *args)


def test_errors() -> None:
    model = GCNConv(FEATURES, 4)
    with pytest.raises(ValueError, match="quantize_model"):
        qgnn_plugin.pack_model(model)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        qgnn_plugin.pack_model("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibrate"):
        qgnn_plugin.pack_model(qgnn_plugin.quantize_model(model))
    _, packed, (x, edge_index) = packed_pair("gcn", "binary", bits=4)
    with pytest.raises(ValueError, match="already packed"):
        qgnn_plugin.pack_model(packed)
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        packed.train()(x, edge_index)
    packed.eval()
    with pytest.raises(ValueError, match="zero or one value"):
        packed(x * torch.rand(x.shape), edge_index)
    with pytest.raises(ValueError, match="finite"):
        packed(x * float("nan"), edge_index)
