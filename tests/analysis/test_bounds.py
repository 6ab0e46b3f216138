"""Measured quantization errors stay within their bounds, and the bounds are what they claim to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from analysis.bound_support import ROUNDING, holds, report
from core.support import NODES, WIDTH, features, graph
from graphs import GRAPHS, erdos_renyi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn import (
    APPNP,
    ClusterGCNConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GraphConv,
    LGConv,
    MFConv,
    SAGEConv,
    SGConv,
    SSGConv,
    TAGConv,
    TransformerConv,
)
from torch_geometric.nn.resolver import aggregation_resolver
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig, SMPropagation
from qgnn_plugin.analysis.operators import Correction, operator_bound, operator_of
from qgnn_plugin.graph.adjacency import gcn_graph
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.smp.descent import StepFactors


@settings(max_examples=25, deadline=None)
@given(
    steps=st.sampled_from([1, 2, 7, 16, 64]),
    eta=st.sampled_from([0.05, 0.1, 0.3, 0.9]),
    reach=st.sampled_from([0.0, 0.4, 0.9, 1.0, 1.2]),
    bits=st.sampled_from([2, 4, 8]),
    granularity=st.sampled_from(["tensor", "node", "row"]),
    levels=st.sampled_from(["affine", "half"]),
    truncation=st.sampled_from([None, "bt", "sbt"]),
    shift=st.sampled_from([-1.0, 0.0, 0.7]),
    multiplier=st.sampled_from([0.0, 0.3, 5.0]),
    correction=st.sampled_from(["proximal", "explicit"]),
    state_bits=st.sampled_from([32, 8, 4]),
    directed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_propagation_stays_within_its_bound(
    steps: int, eta: float, reach: float, bits: int, granularity: Any, levels: Any, truncation: Any, shift: float,
    multiplier: float, correction: Any, state_bits: int, directed: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    edge_index = erdos_renyi(30, 90, seed).edge_index
    edge_index = edge_index if directed else to_undirected(edge_index)
    mu = max(0.0, reach / eta - 1)  # (1 + mu) eta = reach: 1 is a step of APPNP, beyond it the descent overshoots
    if correction == "explicit":  # stable up to eta lambda = 1/2
        multiplier = min(multiplier, 0.6 / eta)
    smp = SMPConfig(eta=eta, mu=mu, multiplier=multiplier, correction=correction, state_bits=state_bits)
    config = QuantConfig(bits=bits, granularity=granularity, message_levels=levels, truncation=truncation)
    layer = report(SMPropagation(steps, smp=smp), (torch.randn(30, 5), edge_index), config, shift)
    assert len(layer.steps) == steps + 1
    assert layer.carried > 0
    holds(layer)


@pytest.mark.parametrize("multiplier", [0.0, 0.7])
@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("correction", ["proximal", "explicit"])
def test_hops_stay_within_their_bound(correction: Any, directed: bool, multiplier: float) -> None:
    edge_index = graph() if directed else to_undirected(graph())
    layers = (SGConv(WIDTH, 6, 16), SSGConv(WIDTH, 6, 0.1, 8), TAGConv(WIDTH, 6, 3), LGConv())
    for bits, layer in zip((2, 4, 8, 4), layers, strict=True):
        smp = SMPConfig(multiplier=multiplier, correction=correction, state_bits=8)
        found = report(layer, (features(), edge_index), QuantConfig(bits=bits, smp=smp), -0.4)
        assert len(found.steps) == getattr(layer, "K", 1) + 1
        assert found.carried > 0
        holds(found)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("teleport", [0.05, 0.1, 0.5])
def test_bound_of_appnp_is_the_geometric_series(teleport: float, bits: int) -> None:
    r"""With equal steps s, :math:`e \le q (1 - a) / a + ...`: what the recursion sums to, from the step sizes alone."""
    x, edge_index = features(), to_undirected(graph(self_loops=False))
    config = QuantConfig(bits=bits, granularity="tensor")
    qlayer: Any = qgnn.quantize_model(APPNP(64, teleport), config=config).eval()
    qgnn.calibrate(qlayer, (x, edge_index), method="ranges")
    layer = qgnn.error_report(qlayer, (x, edge_index)).layers[0]
    holds(layer)
    assert layer.steps[-1].bound == layer.bound
    with torch.no_grad():  # wide enough for every value
        for quantizer in (qlayer.input_quantizer, *qlayer.step_quantizers.values()):
            quantizer.log_scale.fill_(1.5)
            quantizer.offset.fill_(-(2**bits - 1) / 2)
    layer = qgnn.error_report(qlayer, (x, edge_index)).layers[0]
    holds(layer)
    half = torch.tensor(1.5).exp().item() / 2
    pairs = edge_index.size(1) + NODES  # entries of A + I: the sum of d_i
    entered, sent = half * (NODES * WIDTH) ** 0.5, half * (WIDTH * pairs) ** 0.5
    rest = (1 - teleport) ** 64
    expected = rest * entered + (1 - rest) / teleport * ((1 - teleport) * sent + teleport * entered)
    assert layer.bound == pytest.approx(expected, rel=1e-5)


LAYERS = {
    "GCNConv": lambda: GCNConv(WIDTH, 6),
    "GCNConv without loops": lambda: GCNConv(WIDTH, 6, add_self_loops=False),
    "GCNConv not normalized": lambda: GCNConv(WIDTH, 6, normalize=False),
    "SAGEConv": lambda: SAGEConv(WIDTH, 6),
    "SAGEConv sum": lambda: SAGEConv(WIDTH, 6, aggr="sum"),
    "GINConv": lambda: GINConv(nn.Linear(WIDTH, 6), eps=0.3),
    "GATConv": lambda: GATConv(WIDTH, 6, heads=3),
    "GATConv mean": lambda: GATConv(WIDTH, 6, heads=2, concat=False),
}


@pytest.mark.parametrize("multiplier", [0.0, 0.8])
@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_stay_within_their_bound(name: str, directed: bool, multiplier: float) -> None:
    edge_index = graph() if directed else to_undirected(graph())
    for bits, shift in ((2, 0.0), (4, -0.8), (8, 0.4)):
        smp = SMPConfig(multiplier=0.0 if "GIN" in name else multiplier)  # which is bounded in its plain sum
        layer = report(LAYERS[name](), (features(), edge_index), QuantConfig(bits=bits, smp=smp), shift)
        assert layer.carried > 0
        assert layer.error > 0
        holds(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_a_constraint_have_a_report(name: str) -> None:
    layer = report(LAYERS[name](), (features(), graph()), QuantConfig(bits=2, smp=None))
    assert layer.carried > 0
    holds(layer)


def test_weighted_edges_stay_within_their_bound() -> None:
    edge_index = graph()
    args = (features(), edge_index, torch.rand(edge_index.size(1)))
    for layer in (GCNConv(WIDTH, 6), APPNP(16, 0.1)):
        holds(report(layer, args, QuantConfig(bits=2)))


@pytest.mark.parametrize("multiplier", [0.0, 0.8])
@pytest.mark.parametrize(
    "make",
    [lambda: GATv2Conv(WIDTH, 6, heads=2), lambda: GATv2Conv(WIDTH, 5, heads=3, concat=False, share_weights=True)],
)
def test_changing_attention_stays_within_its_bound(make: Any, multiplier: float) -> None:
    for bits, attention_bits in ((2, 4), (4, 32), (8, 8)):
        config = QuantConfig(bits=bits, attention_bits=attention_bits, smp=SMPConfig(multiplier=multiplier))
        layer = report(make(), (features(), graph()), config, -0.5)
        assert layer.carried > 0
        holds(layer)


GENERIC = {
    "GraphConv": lambda: GraphConv(WIDTH, 6),
    "GraphConv mean": lambda: GraphConv(WIDTH, 6, aggr="mean"),
    "GraphConv max": lambda: GraphConv(WIDTH, 6, aggr="max"),
    "ClusterGCNConv": lambda: ClusterGCNConv(WIDTH, 6),
    "MFConv": lambda: MFConv(WIDTH, 6, max_degree=3),
    "SAGEConv wider": lambda: SAGEConv(WIDTH, 2 * WIDTH),
    "SAGEConv max": lambda: SAGEConv(WIDTH, 6, aggr="max"),
}


@pytest.mark.parametrize("name", GENERIC)
def test_aggregates_stay_within_their_bound(name: str) -> None:
    edge_index = graph()
    weighted = ((torch.rand(edge_index.size(1)) * 2 - 1),) if "GraphConv" in name else ()
    for extra in {(), weighted}:
        layer = report(GENERIC[name](), (features(), edge_index, *extra), QuantConfig(bits=2), -0.6)
        assert layer.carried > 0
        assert layer.reason is None
        holds(layer)


def test_the_aggregate_is_what_the_layer_computes() -> None:
    """With maps of ones and zeros the error of the aggregate is that of the result."""
    conv = GraphConv(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        conv.lin_rel.weight.copy_(torch.eye(WIDTH))
        conv.lin_root.weight.zero_()
    x, edge_index = features(), graph()
    args = (x, edge_index, torch.rand(edge_index.size(1)))
    for aggr in ("add", "mean", "max"):
        conv.aggr_module = aggregation_resolver(aggr)
        conv.aggr = aggr
        qconv = qgnn.quantize_model(conv, 2, exclude=["lin_rel", "lin_root"]).eval()
        qgnn.calibrate(qconv, args, method="ranges")
        layer = qgnn.error_report(qconv, args).layers[0]
        assert layer.carried == pytest.approx(float((qconv(*args) - conv(*args)).norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["SMPropagation", "APPNP", "SGConv"])
@pytest.mark.parametrize("correction", ["proximal", "explicit", "reference"])
def test_moving_multipliers_stay_within_their_bound(correction: str, name: str) -> None:
    """The two runs end with multipliers of their own."""
    if correction == "reference":
        smp = SMPConfig.reference(eta_lambda=1e-3)
    else:
        smp = SMPConfig(
            schedule="inner", alpha=0.01, eta_lambda=0.05, multiplier=0.1, correction=correction
        )  # type: ignore[arg-type]
    layers = {"SMPropagation": lambda: SMPropagation(24, smp=smp), "APPNP": lambda: APPNP(12, 0.1),
              "SGConv": lambda: SGConv(WIDTH, 3, 6)}  # fmt: skip
    for edge_index in (graph(), to_undirected(graph())):
        for bits, shift in ((2, 0.0), (4, -0.8), (8, 0.4)):
            layer = report(layers[name](), (features(), edge_index), QuantConfig(bits=bits, smp=smp), shift)
            assert layer.carried > 0
            holds(layer)


def test_layers_without_a_bound_say_why() -> None:
    layer = report(TransformerConv(WIDTH, 6), (features(), graph()), QuantConfig(bits=2))
    assert layer.bound is None
    assert 0 < layer.carried < 10 * layer.error
    assert layer.reason == "what it does with a message is not known"
    smoothing = QuantConfig(bits=2, smp=SMPConfig(multiplier=0.5))
    layer = report(GraphConv(WIDTH, WIDTH), (features(), graph()), smoothing)
    assert "follow its corrected aggregate" in layer.reason
    layer = report(GINConv(nn.Linear(WIDTH, 6)), (features(), graph()), smoothing)
    assert "a network of its own" in layer.reason
    layer = report(SAGEConv(WIDTH, 6, normalize=True), (features(), graph()), QuantConfig(bits=2))
    assert "normalized" in layer.reason
    layer = report(GCNConv(WIDTH, 6), (features(), graph()), QuantConfig(bits=2, output_bits=8))
    assert "quantized once more" in layer.reason
    sides = (torch.randn(20, WIDTH), torch.randn(NODES, WIDTH))
    edge_index = torch.stack([torch.randint(20, (90,)), torch.randint(NODES, (90,))])
    layer = report(SAGEConv((WIDTH, WIDTH), 6), (sides, edge_index), QuantConfig(bits=4))
    assert "from one set of nodes to another" in layer.reason


# Norms ################################################################################################


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in ("star", "no_nodes")])
@pytest.mark.parametrize("weighted", [False, True])
def test_operator_bound_is_one_and_is_tight(name: str, weighted: bool) -> None:
    edge_index, nodes = GRAPHS[name]()
    values = (
        torch.rand(edge_index.size(1), dtype=torch.float64) - 0.3
        if weighted
        else torch.ones(edge_index.size(1)).double()
    )
    plan = GraphPlan.from_edges(edge_index[0], edge_index[1], nodes, nodes)
    dense = torch.zeros(nodes, nodes, dtype=torch.float64).index_put_(
        (plan.dst, plan.col.long()), plan.sort(values), accumulate=True
    )
    bound = operator_bound(plan, plan.sort(values))
    exact = float(torch.linalg.matrix_norm(dense, 2))
    assert exact <= bound.norm * (1 + ROUNDING)
    if not weighted:  # of non-negative entries; signs may cancel
        assert bound.norm <= 1.1 * exact + ROUNDING
    assert bound.symmetric == torch.allclose(dense, dense.t())


def test_a_normalized_undirected_graph_is_a_walk() -> None:
    for directed in (False, True):
        edge_index = graph() if directed else to_undirected(graph())
        normalized = gcn_graph(edge_index, None, NODES, dtype=torch.float64)
        bound = operator_bound(normalized.plan, operator_of(normalized))
        assert bound.is_walk is not directed
        if not directed:
            assert bound.norm == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("correction", ["proximal", "explicit"])
@pytest.mark.parametrize("multiplier", [0.0, 0.2, 1.0, 10.0])
def test_correction_does_what_is_claimed(multiplier: float, correction: Any, directed: bool) -> None:
    """Norms of the dense matrices: of C, of I - C, and of the whole step."""
    edge_index = graph() if directed else to_undirected(graph())
    normalized = gcn_graph(edge_index, None, NODES, dtype=torch.float64)
    bound = operator_bound(normalized.plan, operator_of(normalized))
    identity = torch.eye(NODES, dtype=torch.float64)
    operator = normalized.apply(identity)
    config = SMPConfig(correction=correction, terms=3)
    dense = identity
    if correction == "explicit":
        dense = identity - 2 * 0.1 * multiplier * (identity - operator)
    else:
        for _ in range(3):
            dense = (identity + 4 * multiplier * (dense + operator @ dense) / 2) / (1 + 4 * multiplier)
    claimed = Correction.of(config, multiplier, 0.1, bound)

    def norm(matrix: Tensor) -> float:
        return float(torch.linalg.matrix_norm(matrix, 2))

    assert norm(dense) <= claimed.norm + ROUNDING
    assert norm(identity - dense) <= claimed.drift + ROUNDING
    for factors in (StepFactors(0.0, 0.9, 0.1), StepFactors(0.5, 0.4, 0.1), StepFactors(-0.8, 1.5, 0.3)):
        step = identity - dense + dense @ (factors.keep * identity + factors.average * operator)
        assert norm(step) <= claimed.contraction(factors, bound) + ROUNDING
    if not directed and correction == "proximal":
        assert claimed.norm <= 1
        assert claimed.contraction(StepFactors(0.0, 0.9, 0.1), bound) == pytest.approx(1 - 0.1 / (1 + 4 * multiplier))
