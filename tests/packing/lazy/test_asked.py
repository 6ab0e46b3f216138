"""Results that are packed in several ranges: from the second call on in one pass."""

from __future__ import annotations

from typing import Any

import torch
from packing.lazy.test_deferred import RANGE, ROWS, WIDTH, Counted, codes
from torch import Tensor, nn
from torch_geometric.nn import GraphConv

import qgnn_plugin
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.packing.lazy.asked import Asked
from qgnn_plugin.packing.lazy.deferred import DeferredTensor
from qgnn_plugin.packing.lazy.producers import Producer

OTHER = {"out_scale": torch.tensor(0.1), "out_offset": torch.tensor(0.0), "out_bits": 8}


class Layer(Counted):
    """A producer whose results remember what was asked of the ones before."""

    def __init__(self) -> None:
        super().__init__(torch.randn(ROWS, WIDTH))
        self.asked = Asked()

    def tensor(self) -> DeferredTensor:
        producer = Producer(*self.value.shape, self.value.device, self.run)
        return DeferredTensor(producer, self._repeat, self.asked)

    def runs_of(self, *ranges: dict[str, Any], relu: bool = False) -> int:
        """How often a result's producer runs while it is packed in ``ranges``; the codes are compared."""
        before, x = self.runs, self.tensor()
        x = x.relu() if relu else x
        for out in ranges:
            expected = quantize_pack(self.value.relu() if relu else self.value, *out.values())  # type: ignore[arg-type]
            assert torch.equal(x.pending.packed(**out), expected)
        return self.runs - before


def test_two_ranges_are_packed_in_one_pass_from_the_second_call_on() -> None:
    layer = Layer()
    assert [layer.runs_of(RANGE, OTHER) for _ in range(3)] == [2, 1, 1]
    assert layer.runs_of(OTHER, RANGE) == 2  # in the other order they are others
    assert layer.runs_of(RANGE, OTHER, relu=True) == 1
    assert layer.repeats == 0  # its floats are never asked to be written


def test_a_range_that_is_not_asked_for_again_is_forgotten() -> None:
    layer = Layer()
    layer.runs_of(RANGE, OTHER)
    layer.runs_of(RANGE)
    assert layer.asked.after(RANGE) == []
    assert layer.runs_of(RANGE, OTHER) == 2


def test_codes_that_wait_are_not_those_of_a_later_step() -> None:
    layer = Layer()
    layer.runs_of(RANGE, OTHER)
    x = layer.tensor()
    assert torch.equal(x.pending.packed(**RANGE), codes(layer.value))
    x.relu_()
    expected = quantize_pack(layer.value.relu(), *OTHER.values())  # type: ignore[arg-type]
    assert torch.equal(x.pending.packed(**OTHER), expected)


def test_what_is_touched_beside_its_codes_is_written_as_floats() -> None:
    layer = Layer()
    x = layer.tensor()
    x.pending.packed(**RANGE)
    assert torch.equal(x.materialized(), layer.value)
    assert layer.repeats == 1


class Twice(nn.Module):
    """Layers that send features and multiply them, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphConv(WIDTH, 16), GraphConv(16, 5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


@torch.no_grad()
def test_a_layer_that_sends_and_multiplies_never_sees_floats() -> None:
    x, edge_index = torch.randn(ROWS, WIDTH), torch.randint(ROWS, (2, 600))
    qmodel = qgnn_plugin.calibrate(qgnn_plugin.quantize_model(Twice(), bits=4), (x, edge_index)).eval()
    packed = qgnn_plugin.pack_model(qmodel)
    expected = qmodel(x, edge_index)
    for _ in range(3):
        torch.testing.assert_close(packed(x, edge_index), expected)
    assert all(layer._packed.defers for layer in (packed.first.lin_rel, packed.first.lin_root))
