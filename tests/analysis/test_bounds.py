"""Measured quantization errors stay within their bounds, and the bounds are what they claim to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.support import NODES, WIDTH, features, graph
from graphs import GRAPHS, erdos_renyi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import (
    APPNP,
    GAT,
    GCN,
    ClusterGCNConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GraphConv,
    GraphSAGE,
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
from qgnn_plugin.analysis.error_report import LayerError
from qgnn_plugin.analysis.operators import Correction, operator_bound, operator_of
from qgnn_plugin.graph.adjacency import gcn_graph
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.smp.propagation import StepFactors

ROUNDING = 1e-9


def holds(layer: LayerError) -> None:
    pairs = [(step.carried, step.bound) for step in layer.steps] or [(layer.carried, layer.bound)]
    for k, (carried, bound) in enumerate(pairs):
        assert bound is not None
        assert carried <= bound * (1 + ROUNDING) + ROUNDING, f"step {k}: {carried} > {bound}"


def report(layer: nn.Module, args: tuple[Any, ...], config: QuantConfig, shift: float = 0.0) -> LayerError:
    """The report of one layer; ranges are moved by a factor of ``exp(shift)``, so that some values are clipped."""
    qlayer = qgnn.calibrate(qgnn.quantize_model(layer, config=config), args, method="ranges").eval()
    with torch.no_grad():
        for name, parameter in qlayer.named_parameters():
            if name.endswith("log_scale"):
                parameter.add_(shift)
    return qgnn.error_report(qlayer, args).layers[0]


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


# Deep stacks ##########################################################################################################


def stack_report(model: nn.Module, bits: int, shift: float = 0.0, **smp: Any) -> list[LayerError]:
    """The layers of a deep stack, of a model that runs on the graph's features."""
    config = QuantConfig(bits=bits, smp=SMPConfig(**{"initial_residual": 0.1, "identity_map": 0.5, **smp}))
    args = (features(), to_undirected(graph()))
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, config=config), args, method="ranges").eval()
    with torch.no_grad():
        for name, parameter in qmodel.named_parameters():
            if name.endswith("log_scale"):
                parameter.add_(shift)
    found = qgnn.error_report(qmodel, args)
    places = {name for name, layer in qgnn.conversion.quantized_layers(qmodel).items() if hasattr(layer, "deep_place")}
    assert ("stack bound" in str(found)) == any(layer.stack is not None for layer in found.layers)
    return [layer for layer in found.layers if layer.name in places]


@settings(max_examples=12, deadline=None)
@given(
    depth=st.sampled_from([4, 9, 18]),
    bits=st.sampled_from([2, 4, 8]),
    shift=st.sampled_from([-0.7, 0.0, 0.5]),
    residual=st.sampled_from([None, 0.1, 0.5]),
    theta=st.sampled_from([None, 0.5, 1.5]),
    multiplier=st.sampled_from([0.0, 0.6]),
    act=st.sampled_from(["relu", "elu", "tanh"]),
    seed=st.integers(0, 2**16),
)
def test_deep_stacks_stay_within_their_bound(
    depth: int, bits: int, shift: float, residual: Any, theta: Any, multiplier: float, act: str, seed: int
) -> None:
    if residual is None and theta is None:
        residual = 0.0
    torch.manual_seed(seed)
    model = GCN(WIDTH, 8, depth, 3, act=act)
    layers = stack_report(
        model, bits, shift, initial_residual=residual, identity_map=theta, multiplier=multiplier, terms=2
    )
    assert len(layers) == depth - 2
    for layer in layers:
        holds(layer)
        assert layer.stack is not None
        assert 0 < layer.stack.carried <= layer.stack.bound * (1 + ROUNDING)
    assert layers[0].stack.carried == pytest.approx(layers[0].carried)  # type: ignore[union-attr]
    assert layers[0].stack.bound == layers[0].bound  # type: ignore[union-attr]


def test_errors_of_a_stack_stay_bounded() -> None:
    """The residual and the map make a layer contract: a deeper stack is not further off than a geometric series."""
    model = GCN(WIDTH, 8, 40, 3)
    with torch.no_grad():
        for conv in model.convs[1:-1]:
            conv.lin.weight.mul_(0.5 / torch.linalg.matrix_norm(conv.lin.weight, 2))
    layers = stack_report(model, 8)
    bounds = [layer.stack.bound for layer in layers]  # type: ignore[union-attr]
    own = max(layer.bound for layer in layers)  # type: ignore[type-var]
    assert max(bounds) <= own / 0.1  # type: ignore[operator]


def test_a_stack_without_a_known_activation_has_no_common_bound() -> None:
    layers = stack_report(GCN(WIDTH, 8, 6, 3, norm="batch_norm"), 4)
    assert layers[0].stack is not None
    assert [layer.stack for layer in layers[1:]] == [None] * 3
    for layer in layers:
        holds(layer)


@pytest.mark.parametrize("model", [GraphSAGE, GAT])
@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_layers_of_other_stacks_stay_within_their_bound(multiplier: float, model: Any) -> None:
    for v2 in (False, True) if model is GAT else (None,):
        options = {} if v2 is None else {"v2": v2}
        for layer in stack_report(model(WIDTH, 8, 6, 3, **options), 4, -0.4, multiplier=multiplier):
            assert layer.carried > 0
            assert layer.stack is None
            holds(layer)


def test_full_precision_has_no_error() -> None:
    layer = report(GCNConv(WIDTH, 6), (features(), graph()), QuantConfig(bits=32))
    assert (layer.error, layer.carried, layer.bound) == (0, 0, 0)


def test_report_of_a_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lin, self.prop = GCNConv(WIDTH, 8), nn.Linear(8, 4), SMPropagation(5)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.prop(self.lin(self.conv(x, edge_index).relu()), edge_index)

    data = Data(x=features(), edge_index=to_undirected(graph()))
    model = Net()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), data).train()
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    found = qgnn.error_report(qmodel, data)
    assert [layer.name for layer in found.layers] == ["conv", "prop"]
    operator = gcn_graph(data.edge_index, None, NODES, dtype=torch.float64)
    with torch.no_grad():
        out = model.double()(data.x.double(), data.edge_index)
    expected = float((out * (out - operator.apply(out))).sum())
    assert found.layers[1].float_energy == pytest.approx(expected, rel=1e-6)
    assert found.layers[1].energy == pytest.approx(expected, rel=0.2)
    assert "prop" in str(found)
    assert qmodel.training
    for name, value in qmodel.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match="quantize_model"):
        qgnn.error_report(model, data)


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
