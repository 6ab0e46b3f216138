"""The smoothness constraint and its multiplier, against dense computations."""

import dataclasses
from typing import Any

import pytest
import torch
from core.support import NODES, OUT, WIDTH, features, graph, quantized, relative
from torch import Tensor, nn
from torch_geometric.datasets import FakeDataset
from torch_geometric.nn import APPNP, GATConv, GATv2Conv, GCNConv, GINConv, GraphConv, SAGEConv
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.graph.adjacency import gcn_graph, mean_graph
from qgnn_plugin.smp import ConstraintState, dirichlet_energy
from qgnn_plugin.smp.constraint import corrected

LAYERS = {
    "GCNConv": lambda: GCNConv(WIDTH, OUT),
    "SAGEConv": lambda: SAGEConv(WIDTH, OUT),
    "SAGEConv sum": lambda: SAGEConv(WIDTH, OUT, aggr="sum"),
    "GATConv": lambda: GATConv(WIDTH, OUT, heads=2),
    "GATv2Conv": lambda: GATv2Conv(WIDTH, OUT, heads=2),
    "GINConv": lambda: GINConv(nn.Linear(WIDTH, OUT)),
    "APPNP": lambda: APPNP(3, 0.1),
    "GraphConv": lambda: GraphConv(WIDTH, WIDTH),
}


def converted(name: str, bits: int = 8, **smp: Any) -> Any:
    qconv = qgnn.quantize_model(LAYERS[name](), config=QuantConfig(bits=bits, smp=SMPConfig(**smp)))
    return qgnn.calibrate(qconv, (features(), graph())).train()


def operators(edge_index: Tensor) -> dict[str, Tensor]:
    """The dense averaging operators of a graph, in float64."""
    adjacency = torch.zeros(NODES, NODES, dtype=torch.float64)
    adjacency[edge_index[1], edge_index[0]] = 1
    looped = adjacency.clone().fill_diagonal_(1)
    factor = looped.sum(1).rsqrt()
    mean = adjacency / adjacency.sum(1, keepdim=True).clamp_min(1)
    closed = adjacency + torch.eye(NODES, dtype=torch.float64)
    return {
        "gcn": factor.unsqueeze(1) * looped * factor,
        "mean": mean,
        "closed mean": closed / closed.sum(1, keepdim=True),
    }


def energy(x: Tensor, operator: Tensor) -> float:
    """tr(x' (I - P) x), built densely."""
    x = x.detach().double().flatten(1)
    return float(torch.trace(x.t() @ (torch.eye(NODES, dtype=torch.float64) - operator) @ x))


def test_energy_is_the_sum_of_squared_differences() -> None:
    """On an undirected graph: half the sum over edges of degree-normalized differences."""
    edge_index = to_undirected(graph(self_loops=False))
    x = features().double()
    operator = gcn_graph(edge_index, None, NODES, dtype=torch.float64)
    degree = torch.bincount(edge_index[1], minlength=NODES) + 1
    scaled = x / degree.double().sqrt().unsqueeze(1)
    differences = (scaled[edge_index[0]] - scaled[edge_index[1]]).square().sum() / 2
    assert dirichlet_energy(x, operator.apply).item() == pytest.approx(differences.item(), rel=1e-10)
    assert dirichlet_energy(x, operator.apply).item() == pytest.approx(
        energy(x, operators(edge_index)["gcn"]), rel=1e-10
    )


class Recorder:
    """What ``smooth`` was given and returned."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.calls = layer, []
        original = type(layer).smooth

        def smooth(z: Tensor, a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = original(layer, z, a, *args, **kwargs)
            self.calls.append((z.detach(), out.detach()))
            return out

        layer.smooth = smooth

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: Any) -> None:
        del self.layer.smooth


@pytest.mark.parametrize("bound", ["relative", "absolute"])
@pytest.mark.parametrize("multiplier", [0.0, 0.7])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "APPNP"])  # which has one constraint per step
def test_constraint_is_measured_on_the_realised_change(name: str, multiplier: float, bound: str) -> None:
    x, edge_index = features(), graph()
    layer = converted(name, alpha=0.3, bound=bound, multiplier=multiplier)
    with Recorder(layer) as recorder:
        layer(x, edge_index)
    z, out = recorder.calls[-1]
    if "GAT" in name:
        _, (edges, alpha) = layer.eval()(x, edge_index, return_attention_weights=True)
        dense = torch.zeros(NODES, NODES, layer.heads, dtype=torch.float64)
        dense[edges[1], edges[0]] = alpha.detach().double()
        parts = [(z[:, h], (out - z)[:, h], dense[..., h]) for h in range(layer.heads)]
        num_edges = edges.size(1)
    else:
        kind = {"SAGEConv": "mean", "SAGEConv sum": "mean", "GINConv": "closed mean"}.get(name, "gcn")
        parts = [(z, out - z, operators(edge_index)[kind])]
        looped = int((operators(edge_index)["gcn"] > 0).sum())
        num_edges = looped if kind == "gcn" else edge_index.size(1)
    measured = sum(energy(change, p) for _, change, p in parts)
    reference = sum(energy(start, p) for start, _, p in parts)
    state: ConstraintState = layer.constraint_state
    assert float(state.energy) == pytest.approx(measured, rel=0.02, abs=1e-4)
    allowed = 0.3 * reference if bound == "relative" else 0.3 * num_edges
    # A layer that averages quantized features reuses their average for the bound.
    assert float(state.bound) == pytest.approx(allowed, rel=0.05)
    assert layer.constraint == pytest.approx(float(state.energy / state.bound), rel=1e-5)
    assert layer.violation == pytest.approx(layer.constraint - 1)


def test_nothing_is_measured_in_eval_mode_or_across_two_node_sets() -> None:
    x, edge_index = features(), graph()
    layer = converted("SAGEConv").eval()
    layer(x, edge_index)
    assert layer.constraint is None
    layer.train()((x, features()), edge_index)
    assert layer.constraint is None
    assert qgnn.differential_multiplier_step(layer) == {}


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_multiplier_of_zero_leaves_outputs_bitwise(name: str, bits: int) -> None:
    x, edge_index = features(), graph()
    conv = LAYERS[name]()
    outs = []
    for smp in (None, SMPConfig(alpha=1e-5), SMPConfig(alpha=7, correction="explicit", bound="absolute")):
        qconv = qgnn.quantize_model(conv, config=QuantConfig(bits=bits, smp=smp))
        qgnn.calibrate(qconv, (x, edge_index), method="ranges")
        outs.append((qconv.train()(x, edge_index), qconv.eval()(x, edge_index)))
    for out in outs[1:]:
        assert torch.equal(out[0], outs[0][0])
        assert torch.equal(out[1], outs[0][1])


@pytest.mark.parametrize("correction", ["proximal", "explicit"])
@pytest.mark.parametrize("name", LAYERS)
def test_larger_multiplier_leaves_less_energy(name: str, correction: str) -> None:
    x, edge_index = features(), to_undirected(graph())
    layer = converted(name, correction=correction, alpha=1.0)
    values = []
    # The explicit step is stable up to eta lambda = 1/4.
    for multiplier in (0.0, 0.1, 0.5, 1.0, 2.0, 2.5) if correction == "explicit" else (0, 0.1, 0.5, 2, 10, 50, 100):
        layer.multiplier.fill_(multiplier)
        layer(x, edge_index)
        values.append(float(layer.constraint_state.ratio))
    assert values == sorted(values, reverse=True), values
    assert values[-1] < 0.6 * values[0]


def ring(nodes: int) -> Tensor:
    index = torch.arange(nodes)
    forward = torch.stack([index, (index + 1) % nodes])
    return torch.cat([forward, forward.flip(0)], 1)


@pytest.mark.parametrize("terms", [1, 2, 4, 5, 8])
def test_correction_is_monotone_on_every_frequency(terms: int) -> None:
    """An even ring has the eigenvalue -1, on which plain Jacobi sweeps do nothing for a large multiplier."""
    config = SMPConfig(terms=terms)
    operator = mean_graph(ring(12), (12, 12), "source_to_target", torch.float64).apply
    dense = operator(torch.eye(12, dtype=torch.float64))
    eigenvalues, vectors = torch.linalg.eigh((dense + dense.t()) / 2)
    assert float(eigenvalues[0]) == pytest.approx(-1.0)
    factors = []
    for multiplier in (0.0, 0.1, 1.0, 10.0, 100.0):
        remaining = corrected(vectors, operator, config, torch.tensor(multiplier, dtype=torch.float64))
        factors.append((vectors * remaining).sum(0))
    stacked = torch.stack(factors)
    assert (stacked[1:] <= stacked[:-1] + 1e-12).all()
    assert (stacked >= -1e-12).all()
    torch.testing.assert_close(stacked[0], torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(stacked[:, -1], torch.ones(5, dtype=torch.float64))  # constants stay


def test_correction_converges_to_the_proximal_step() -> None:
    operator = operators(to_undirected(graph()))["gcn"]
    change = features().double()
    for multiplier in (0.05, 0.5, 3.0):
        laplacian = torch.eye(NODES, dtype=torch.float64) - operator
        expected = torch.linalg.solve(torch.eye(NODES) + 2 * multiplier * laplacian, change)
        actual = corrected(change, lambda v: operator @ v, SMPConfig(terms=400), torch.tensor(multiplier))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    explicit = corrected(change, lambda v: operator @ v, SMPConfig(correction="explicit", eta=0.2), torch.tensor(0.5))
    torch.testing.assert_close(explicit, change - 0.2 * (change - operator @ change))


@pytest.mark.parametrize("bits", [32, 8])
def test_correction_is_the_same_at_every_width(bits: int) -> None:
    """A GCNConv in full precision is smoothed as a quantized one is."""
    torch.manual_seed(0)
    x, edge_index = features(), graph()
    conv = GCNConv(WIDTH, OUT)
    qconv = qgnn.quantize_model(conv, config=QuantConfig(bits=bits, smp=SMPConfig(multiplier=1.0)))
    qgnn.calibrate(qconv, (x, edge_index), method="ranges")
    z = conv.lin(x).detach().double()
    operator = operators(edge_index)["gcn"]
    change = operator @ z - z
    expected = z + corrected(change, lambda v: operator @ v, SMPConfig(), torch.tensor(1.0)) + conv.bias
    assert relative(qconv.eval()(x, edge_index), expected) < 0.03


def test_gradient_flows_through_the_correction() -> None:
    layer = converted("GCNConv", multiplier=2.0)
    layer(features(), graph()).square().sum().backward()
    assert layer.lin.weight.grad.isfinite().all()
    assert layer.lin.weight.grad.abs().sum() > 0
    assert not layer.multiplier.requires_grad


# The multiplier ######################################################################################


@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
@pytest.mark.parametrize(("multiplier", "slack"), [(0.0, 0.0), (1.5, 0.6)])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_step_follows_the_formula(ratio: float, multiplier: float, slack: float, damping: float) -> None:
    """Damping is a force of its own on the primal variables and the slack; the ascent rate knows nothing of it."""
    layer = converted("GCNConv", multiplier=multiplier, slack=slack, damping=damping, eta_lambda=0.1, eta_slack=0.2)
    layer.constraint_state = ConstraintState(torch.tensor(5.0 * ratio), torch.tensor(5.0))
    states = qgnn.differential_multiplier_step(nn.ModuleDict({"conv": layer}))
    h = ratio - 1 + slack**2
    expected = max(0.0, multiplier + 0.1 * h)
    force = max(0.0, multiplier + damping * h)
    assert float(layer.multiplier) == pytest.approx(expected, abs=1e-6)
    assert float(layer.slack) == pytest.approx(slack - 2 * 0.2 * force * slack, abs=1e-6)
    assert layer.multiplier_value == pytest.approx(max(0.0, expected + damping * h), abs=1e-6)
    state = states["conv"]
    assert state.force == pytest.approx(layer.multiplier_value)
    assert state.multiplier == pytest.approx(expected, abs=1e-6)
    assert state.constraint == pytest.approx(ratio)
    assert state.violation == pytest.approx(ratio - 1)
    assert not state.saturated


def test_multiplier_stays_between_zero_and_its_maximum() -> None:
    layer = converted("GCNConv", multiplier=0.01, eta_lambda=10.0, max_multiplier=2.0)
    for ratio, expected in [(0.0, 0.0), (1e9, 2.0), (float("inf"), 2.0)]:
        layer.constraint_state = ConstraintState(torch.tensor(ratio), torch.tensor(1.0))
        state = qgnn.differential_multiplier_step(layer)[""]
        assert float(layer.multiplier) == expected
        assert state.saturated == (expected == 2.0)


def test_measurements_are_averaged_over_processes() -> None:
    layer = converted("GCNConv", eta_lambda=1.0)
    layer.constraint_state = ConstraintState(torch.tensor(4.0), torch.tensor(1.0))
    other = torch.tensor([[8.0, 3.0, 1.0]])
    state = qgnn.differential_multiplier_step(layer, reduce=lambda own: (own + other) / 2)[""]
    assert state.constraint == pytest.approx(3.0)
    assert float(layer.multiplier) == pytest.approx(2.0)


def test_change_of_zero_meets_any_bound() -> None:
    layer = converted("GCNConv", multiplier=1.0)
    layer.constraint_state = ConstraintState(torch.tensor(0.0), torch.tensor(0.0))
    assert qgnn.differential_multiplier_step(layer)[""].constraint == 0.0
    assert layer.constraint == 0.0


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GATConv", "GINConv"])
def test_multiplier_drives_the_constraint_to_its_bound(name: str) -> None:
    """Fixed weights, an undirected graph: after some steps the bound is met, and not by much."""
    torch.manual_seed(0)
    x, edge_index = features(), to_undirected(graph())
    layer = converted(name, alpha=0.1, eta_lambda=0.3)
    for _ in range(200):
        layer(x, edge_index)
        qgnn.differential_multiplier_step(layer)
    layer(x, edge_index)
    assert 0.9 < layer.constraint < 1.05
    assert 0 < float(layer.multiplier) < 50


def test_default_bound_leaves_averaging_layers_alone() -> None:
    """Four times the energy is what the largest eigenvalue of a normalized Laplacian allows."""
    x, edge_index = features(), to_undirected(graph())
    for name in ("GCNConv", "GATConv", "APPNP", "GINConv"):
        layer = converted(name)
        for _ in range(3):
            layer(x, edge_index)
            state = qgnn.differential_multiplier_step(layer)[""]
        assert state.constraint <= 1
        assert state.multiplier == 0


def test_layers_state_and_saving() -> None:
    model = nn.ModuleDict({"a": GCNConv(3, 3), "b": nn.Linear(3, 3), "c": SAGEConv(3, 3)})
    qmodel = qgnn.quantize_model(model, config=QuantConfig(smp=SMPConfig(multiplier=0.5, slack=0.25)))
    layers = qgnn.smp_layers(qmodel)
    assert list(layers) == ["a", "c"]
    saved = qmodel.state_dict()
    assert float(saved["a.multiplier"]) == 0.5
    assert float(saved["c.slack"]) == 0.25
    layers["a"].multiplier.fill_(3.0)
    other = qgnn.quantize_model(model, 4)
    other.load_state_dict(qmodel.state_dict())
    assert float(other["a"].multiplier) == 3.0
    assert qgnn.smp_layers(qgnn.quantize_model(model, config=QuantConfig(smp=None))) == {}
    assert qgnn.smp_layers(model) == {}
    assert "multiplier" not in qgnn.restore_model(qmodel)["a"].state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "'alpha' > 0"),
        ({"alpha": float("nan")}, "'alpha' > 0"),
        ({"terms": 0}, r"'terms' to be an integer between 1 and 1000 \(got 0\)"),
        ({"multiplier": -1.0}, "'multiplier' >= 0"),
        ({"bound": "relativ"}, "Did you mean 'relative'"),
        ({"correction": "implicit"}, "'proximal', 'explicit'"),
        ({"max_multiplier": -2.0}, "'max_multiplier' > 0"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMPConfig(**options)


@pytest.mark.parametrize("steps", [4, 16, 64])
def test_the_bound_for_steps_is_met_by_its_first_multiplier(steps: int) -> None:
    """Components of every frequency change by at most sqrt(alpha) of themselves, the high ones by nearly that."""
    smp = SMPConfig.for_steps(steps)
    frequencies = torch.linspace(0.01, 2.0, 200)
    shares = (frequencies / (1 + 2 * smp.multiplier * frequencies)).square() / smp.alpha
    assert (shares < 1).all()
    assert shares[-1] > 0.7
    assert steps * smp.alpha**0.5 == pytest.approx(2**0.5)
    assert SMPConfig.for_steps(steps, terms=3, slack=0.1) == dataclasses.replace(smp, terms=3, slack=0.1)
    with pytest.raises(ValueError, match=r"at least one step \(got 0\)"):
        SMPConfig.for_steps(0)


def test_steps_without_a_teleport_keep_what_they_start_from() -> None:
    """K = 64 plain steps leave differences where their bound is met, and next to none without it."""
    torch.manual_seed(0)
    data = FakeDataset(num_graphs=1, avg_num_nodes=80, avg_degree=12, num_channels=WIDTH)[0]
    left = {}
    for name, smp in (("off", None), ("on", SMPConfig.for_steps(64))):
        config = QuantConfig(bits=8, granularity="node", smp=smp)
        qmodel = qgnn.calibrate(qgnn.quantize_model(APPNP(64, 0.0), config=config), (data.x, data.edge_index))
        with torch.no_grad():
            out = qmodel.train()(data.x, data.edge_index)
        plain = gcn_graph(data.edge_index, None, data.num_nodes)
        left[name] = float(dirichlet_energy(out, plain.apply) / dirichlet_energy(data.x, plain.apply))
        packed, expected = qgnn.pack_model(qmodel.eval()), qmodel(data.x, data.edge_index)
        torch.testing.assert_close(packed(data.x, data.edge_index), expected, rtol=1e-4, atol=1e-4)
    assert left["off"] < 1e-3
    assert left["on"] > 0.02


def test_packed_inference_costs_nothing_at_zero() -> None:
    """No product more than the layer's own: the graph is walked once."""
    data = FakeDataset(num_graphs=1, avg_num_nodes=50, num_channels=WIDTH)[0]
    qconv = quantized(GCNConv(WIDTH, OUT), data.x, data.edge_index)
    calls = []
    original = type(qconv).smooth

    def counting(self: Any, z: Tensor, a: Tensor, operator: Any, *args: Any, **kwargs: Any) -> Tensor:
        def watched(v: Tensor) -> Tensor:
            calls.append(v)
            return operator(v)

        return original(self, z, a, watched, *args, **kwargs)

    qconv.smooth = counting.__get__(qconv)
    qconv(data.x, data.edge_index)
    assert calls == []
