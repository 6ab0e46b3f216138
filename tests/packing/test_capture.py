"""Capture in a CUDA graph, with one made up: what a replay computes, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import power_law
from torch import nn
from torch_geometric.nn import GAT, GCN, GraphSAGE

import qgnn_plugin as qgnn
from qgnn_plugin.packing import cuda_graph as module

GRAPH = power_law(30, 120)


class MadeUp:
    """As a CUDA graph does, it runs no Python: a replay computes from the captured inputs' memory alone."""

    def __init__(self) -> None:
        self.recorded, self.replays = 0, 0

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        self.recorded += 1
        out = run()

        def replay() -> None:
            self.replays += 1
            out.copy_(run())

        return replay, out


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    graph = MadeUp()
    monkeypatch.setattr(module, "_record", graph.record)
    monkeypatch.setattr(module, "_can_capture", lambda device: True)
    return graph


def packed(make: Callable[..., nn.Module] = GCN) -> nn.Module:
    model = make(8, 16, num_layers=2, out_channels=4)
    x = torch.randn(GRAPH.num_nodes, 8)
    return qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(model, bits=4), (x, GRAPH.edge_index)))


@pytest.mark.parametrize("make", [GCN, GraphSAGE, GAT])
def test_a_replay_gives_what_the_model_gives(made_up: MadeUp, make: Callable[..., nn.Module]) -> None:
    model, first = packed(make), torch.randn(GRAPH.num_nodes, 8)
    captured = qgnn.capture(model, first, GRAPH.edge_index)
    results = []
    for x in (first, torch.randn_like(first), torch.randn_like(first)):
        results.append((captured(x, GRAPH.edge_index), model(x, GRAPH.edge_index)))
    for got, want in results:  # an output is not written over by the next call
        assert torch.equal(got, want)
    assert (made_up.recorded, made_up.replays) == (1, 3)
    assert isinstance(captured, qgnn.CapturedModel)


def test_the_first_input_is_not_written_to(made_up: MadeUp) -> None:
    x = torch.randn(GRAPH.num_nodes, 8)
    before = x.clone()
    captured = qgnn.capture(packed(), x, GRAPH.edge_index)
    captured(torch.randn_like(x), GRAPH.edge_index)
    assert torch.equal(x, before)


def test_what_the_recording_reads_outlives_the_caches(made_up: MadeUp) -> None:
    captured = qgnn.capture(packed(), torch.randn(GRAPH.num_nodes, 8), GRAPH.edge_index)
    assert captured._pins


def test_another_graph_is_refused(made_up: MadeUp) -> None:
    edge_index, x = GRAPH.edge_index.clone(), torch.randn(GRAPH.num_nodes, 8)
    captured = qgnn.capture(packed(), x, edge_index)
    captured(x, edge_index)
    for other in (edge_index.flip(0), edge_index[:, 1:]):
        with pytest.raises(ValueError, match="graph that was captured"):
            captured(x, other)
    edge_index[0, 0] = (edge_index[0, 0] + 1) % GRAPH.num_nodes
    with pytest.raises(ValueError, match="changed in place"):
        captured(x, edge_index)


@pytest.mark.parametrize("change", [lambda x: x[1:], lambda x: x.double(), lambda x: None])
def test_inputs_of_another_form_are_refused(made_up: MadeUp, change: Callable[[torch.Tensor], Any]) -> None:
    x = torch.randn(GRAPH.num_nodes, 8)
    captured = qgnn.capture(packed(), x, GRAPH.edge_index)
    with pytest.raises(ValueError, match=r"as captured|as they were captured"):
        captured(change(x), GRAPH.edge_index)
    with pytest.raises(ValueError, match="as they were captured"):
        captured(x, edge_index=GRAPH.edge_index)
    assert made_up.replays == 0


def test_a_model_that_was_changed_is_refused(made_up: MadeUp) -> None:
    model, x = packed(), torch.randn(GRAPH.num_nodes, 8)
    captured = qgnn.capture(model, x, GRAPH.edge_index)
    buffer = next(b for b in (*model.parameters(), *model.buffers()) if b.is_floating_point() and b.numel())
    with torch.no_grad():
        buffer.mul_(2)
    with pytest.raises(ValueError, match="capture it again"):
        captured(x, GRAPH.edge_index)


def test_other_arguments_are_part_of_the_recording(made_up: MadeUp) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = packed()

        def forward(self, x: torch.Tensor, edge_index: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
            return factor * self.model(x, edge_index)

    x = torch.randn(GRAPH.num_nodes, 8)
    captured = qgnn.capture(Scaled().eval(), x, GRAPH.edge_index, factor=2.0)
    captured(x, GRAPH.edge_index, factor=2.0)
    with pytest.raises(ValueError, match=r"Expected 2\.0 as captured \(got 3\.0\)"):
        captured(x, GRAPH.edge_index, factor=3.0)


def test_without_a_gpu_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"one CUDA device \(got cpu\).*call the model itself"):
        qgnn.capture(packed(), torch.randn(GRAPH.num_nodes, 8), GRAPH.edge_index)


def test_only_packed_models_in_eval_mode(made_up: MadeUp) -> None:
    x = torch.randn(GRAPH.num_nodes, 8)
    with pytest.raises(ValueError, match=r"packed model \(got GCN\); pack it"):
        qgnn.capture(GCN(8, 16, num_layers=2, out_channels=4), x, GRAPH.edge_index)
    with pytest.raises(ValueError, match="eval mode"):
        qgnn.capture(packed().train(), x, GRAPH.edge_index)
