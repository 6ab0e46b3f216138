"""Plans on accelerators: kept while a capture may read them, ordered between streams, checked once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from foreign_device import DEVICE, ForeignTensor, foreign_device, waits
from torch import Tensor
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.kernels import streams
from qgnn_plugin.kernels.plan import GraphPlan, PlanCache, graph_plan, pinned_plans, plan_cache


def graph(seed: int = 0, num_edges: int = 20) -> Tensor:
    return torch.randint(10, (2, num_edges), generator=torch.Generator().manual_seed(seed))


def test_what_is_looked_up_while_pinned_outlives_the_cache() -> None:
    edge_index = graph()
    before = weakref.ref(graph_plan(graph(1), (10, 10)))
    with pinned_plans() as outer:
        with pinned_plans() as pins:
            plan = weakref.ref(graph_plan(edge_index, (10, 10)))
        found = weakref.ref(graph_plan(edge_index, (10, 10)))
    address = edge_index.data_ptr()
    del edge_index
    plan_cache.clear()
    gc.collect()
    assert before() is None
    assert found() is plan() is not None
    assert any(part.data_ptr() == address for _, parts in pins for part in parts)  # memory that kernels may read
    del pins[:]
    gc.collect()
    assert plan() is not None  # the outer context has them too
    del outer[:]
    gc.collect()
    assert plan() is None


@torch.no_grad()
def test_a_packed_models_forward_is_pinned_as_a_whole() -> None:
    x, edge_index = torch.randn(10, 8), graph()
    model = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(GCN(8, 8, 2, 4), bits=4), (x, edge_index)))
    model(x, edge_index)
    with pinned_plans() as pins:
        model(x, edge_index)
    kinds = {type(value).__name__ for value, _ in pins}
    assert "NormalizedGraph" in kinds
    assert len(pins) >= 2  # of every layer, and the weights that kernels prepared


class Stream:
    def __init__(self, name: str) -> None:
        self.name, self.log = name, []  # type: ignore[var-annotated]

    def record_event(self) -> str:
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(event)


class Device:
    """What ``torch.cuda`` knows of streams."""

    def __init__(self) -> None:
        self.stream, self.capturing = Stream("builder"), False

    def current_stream(self, device: Any = None) -> Stream:
        return self.stream

    def is_current_stream_capturing(self) -> bool:
        return self.capturing


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    module = Device()
    monkeypatch.setattr(streams, "_module_of", lambda device: None if device.type == "cpu" else module)
    monkeypatch.setattr(ForeignTensor, "record_stream", lambda self, stream: stream.log.append("memory"), raising=False)
    return module


def test_a_plan_is_ordered_before_its_uses_on_other_streams(device: Device) -> None:
    cache = PlanCache()
    with foreign_device():
        edge_index = graph().to(DEVICE)

        def look_up() -> GraphPlan:
            return cache.get((edge_index,), (), lambda: GraphPlan.from_edges(*edge_index, 10, 10))

        plan = look_up()
        assert device.stream.log == []  # built and used on one stream
        builder, device.stream = device.stream, Stream("user")
        assert look_up() is plan
        assert device.stream.log == ["event of builder", *["memory"] * 3]  # its memory is not reused before it is done
        device.stream.log.clear()
        look_up()
        assert device.stream.log == []  # once
        device.stream, device.capturing = Stream("capture"), True
        look_up()
        assert device.stream.log == []  # a capture begins after all that was launched before
        device.stream, device.capturing = builder, False
        look_up()
        assert builder.log == []


def test_what_a_plan_derives_later_is_ordered_too(device: Device) -> None:
    with foreign_device():
        edge_index = graph().to(DEVICE)
        plan = GraphPlan.from_edges(*edge_index, 10, 10)
        degree = plan.degree
        assert plan.degree is degree
        device.stream = Stream("user")
        assert plan.degree is degree
        assert device.stream.log == ["event of builder", "memory"]
        assert plan.transpose.num_src == 10
        assert plan.transpose is plan.transpose


@pytest.mark.parametrize("node", [10, -1])
@pytest.mark.parametrize("row", [0, 1])
def test_indices_are_checked_on_a_device_once_per_plan(node: int, row: int) -> None:
    with foreign_device():
        edge_index = graph()
        plan_cache.clear()
        graph_plan(good := edge_index.to(DEVICE), (10, 10))
        waits.clear()
        graph_plan(good, (10, 10))
        assert waits == []
        edge_index[row, 3] = node
        with pytest.raises(ValueError, match=r"nodes in the interval \[0, 10\)"):
            graph_plan(edge_index.to(DEVICE), (10, 10))


def test_plans_of_the_cpu_wait_for_nothing() -> None:
    plan = graph_plan(graph(), (10, 10))
    assert plan.degree is plan.__dict__["degree"]
