"""The differential multiplier method on its own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from core.support import features, graph
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GCNConv
from torch_geometric.utils import to_undirected

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig, SMPropagation
from qgnn_plugin.smp import ConstraintState
from qgnn_plugin.smp.multiplier import ascend


def value(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def solve(damping: float, steps: int = 4000, rate: float = 0.05) -> list[float]:
    """min 1/2 (x - 2)^2 subject to x^2 <= 1, ``h = x^2 - 1``: every ``x`` on the way to 1."""
    config = SMPConfig(eta_lambda=rate, damping=damping)
    x, multiplier, slack, path = 2.0, value(0.0), value(0.0), []
    for _ in range(steps):
        force = max(0.0, float(multiplier) + damping * (x * x - 1))
        x -= rate * ((x - 2) + force * 2 * x)
        multiplier, slack, _ = ascend(config, multiplier, slack, value(x * x))
        path.append(x)
    return path


def test_converges_to_the_constrained_minimum_and_damping_calms() -> None:
    """At the minimum x = 1 the multiplier is 1/2, and the damped method oscillates less on its way there."""
    free, damped = solve(0.0), solve(2.0)
    for path in (free, damped):
        assert path[-1] == pytest.approx(1.0, abs=1e-3)

    def travelled(path: list[float]) -> float:
        return sum(abs(b - a) for a, b in itertools.pairwise(path))

    assert travelled(damped) < 0.9 * travelled(free)


def test_slack_takes_up_what_the_bound_leaves() -> None:
    """A loose bound, g/b = 0.4: the slack falls until h = g/b - 1 + s^2 is not positive, and the multiplier with it."""
    config = SMPConfig(eta_lambda=0.1, eta_slack=0.1, slack=1.0)
    multiplier, slack = value(0.5), value(1.0)
    for _ in range(500):
        multiplier, slack, _ = ascend(config, multiplier, slack, value(0.4))
    assert float(multiplier) == 0
    assert 0 < float(slack) ** 2 <= 0.6


@pytest.mark.parametrize("ratio", [0.0, float("inf"), 1e30])
def test_stays_finite(ratio: float) -> None:
    config = SMPConfig(damping=3.0, eta_slack=0.1, max_multiplier=7.0)
    new = ascend(config, value(1.0), value(0.2), value(ratio))
    assert all(bool(part.isfinite()) for part in new)
    assert 0 <= float(new.multiplier) <= 7
    assert float(new.multiplier + new.penalty) <= 7


def test_penalty_acts_in_the_next_forward() -> None:
    """A damped layer smooths with lambda + c h, and a saved model goes on as it was."""
    x, edge_index = features(), to_undirected(graph())
    smp = SMPConfig(alpha=0.1, damping=0.5, eta_lambda=1e-9)
    layer: Any = qgnn.quantize_model(GCNConv(x.size(1), 6), config=QuantConfig(bits=8, smp=smp))
    qgnn.calibrate(layer, (x, edge_index)).train()
    before = layer(x, edge_index)
    state = qgnn.differential_multiplier_step(layer)[""]
    assert state.multiplier == pytest.approx(0, abs=1e-6)
    assert state.force == pytest.approx(0.5 * state.violation, rel=1e-5)
    assert layer.is_smoothing
    after = layer(x, edge_index)
    assert not torch.allclose(before, after)
    undamped: Any = qgnn.quantize_model(qgnn.restore_model(layer), config=QuantConfig(bits=8, smp=SMPConfig(alpha=0.1)))
    undamped.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "penalty"})
    undamped.multiplier.fill_(state.force)
    torch.testing.assert_close(undamped.train()(x, edge_index), after)
    assert "penalty" in layer.state_dict()
    assert "penalty" not in undamped.state_dict()
    assert "penalty" not in qgnn.restore_model(layer).state_dict()


def test_one_reduction_for_all_layers() -> None:
    """Layers of one and of several constraints, and one that measured nothing in this process."""
    smp = SMPConfig(alpha=0.1, eta_lambda=1.0)
    model = nn.ModuleDict({"a": GCNConv(4, 4), "b": APPNP(2, 0.1), "c": SMPropagation(3, smp=smp), "d": GCNConv(4, 4)})
    qmodel: Any = qgnn.quantize_model(model, config=QuantConfig(smp=smp))
    qmodel["a"].constraint_state = ConstraintState(torch.tensor(2.0), torch.tensor(1.0))
    qmodel["b"].constraint_state = ConstraintState(torch.tensor([1.0, 6.0]), torch.tensor([1.0, 2.0]))
    seen = []

    def reduce(table: Tensor) -> Tensor:
        seen.append(table)
        other = torch.zeros_like(table)
        other[-1] = torch.tensor([3.0, 2.0, 1.0])  # another process measured "d"
        other[:3] = table[:3]
        return (table + other) / 2

    states = qgnn.differential_multiplier_step(qmodel, reduce=reduce)
    assert len(seen) == 1
    assert seen[0].shape == (1 + 2 + 3 + 1, 3)
    assert list(states) == ["a", "b", "d"]
    assert states["a"].constraint == pytest.approx(2.0)
    assert states["b"].constraint == pytest.approx(3.0)  # its worst step
    assert states["d"].constraint == pytest.approx(1.5)
    assert float(qmodel["d"].multiplier) == pytest.approx(0.5)
    assert float(qmodel["c"].multiplier) == 0


def test_saturation_is_announced_early() -> None:
    smp = SMPConfig(alpha=0.1, eta_lambda=1.0, max_multiplier=4.0)
    layer: Any = qgnn.quantize_model(GCNConv(4, 4), config=QuantConfig(smp=smp))
    flags = []
    for _ in range(5):
        layer.constraint_state = ConstraintState(torch.tensor(2.0), torch.tensor(1.0))
        state = qgnn.differential_multiplier_step(layer)[""]
        flags.append((state.saturating, state.saturated))
    assert flags == [(False, False), (True, False), (True, False), (True, True), (True, True)]


@pytest.mark.parametrize("schedule", ["inner", "step"])
@pytest.mark.parametrize("teleport", [0.2, 0.3])  # limits that float32 holds exactly, and not
def test_the_explicit_correction_stays_stable(teleport: float, schedule: Any) -> None:
    """Whatever it is asked for: the multiplier ends where a change of the highest frequency is at most turned round."""
    x, edge_index = features(), to_undirected(graph())
    smp = SMPConfig(alpha=1e-6, correction="explicit", schedule=schedule, eta_lambda=1.0, damping=0.5)
    layer = SMPropagation(8, teleport, smp=smp)
    assert layer.highest_multiplier == pytest.approx(0.25 / teleport)  # its step size is the teleport
    plain = SMPropagation(8, teleport)(x, edge_index)
    for _ in range(20):
        out = layer(x, edge_index)
        state = qgnn.differential_multiplier_step(layer)[""]
    assert state.saturated
    assert state.multiplier == pytest.approx(layer.highest_multiplier)
    assert state.force <= layer.highest_multiplier * (1 + 1e-6)
    assert out.norm() < 2 * plain.norm()
    assert SMPropagation(4, teleport, smp=SMPConfig()).highest_multiplier == SMPConfig().max_multiplier
    lower = SMPConfig(correction="explicit", max_multiplier=0.5)
    assert SMPropagation(4, teleport, smp=lower).highest_multiplier == 0.5


def test_mirror_follows_the_buffers() -> None:
    layer = SMPropagation(2, smp=SMPConfig(multiplier=0.5))
    assert layer.is_smoothing
    layer.multiplier.zero_()
    assert not layer.is_smoothing
    layer.load_state_dict({"multiplier": torch.tensor(2.0), "slack": torch.tensor(0.0)})
    assert layer.is_smoothing
    assert SMPropagation(2).to(torch.float64).is_smoothing is False
