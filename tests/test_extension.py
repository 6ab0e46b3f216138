"""A layer type of a third party, told through :mod:`qgnn_plugin.extension` alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import qgnn_plugin as qgnn
from examples.custom_layer import MeanConv, Net, main
from qgnn_plugin import extension


@pytest.fixture
def graph() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 12, generator=generator), torch.randint(30, (2, 90), generator=generator)


def test_example_runs() -> None:
    assert main(epochs=3) > 0.15


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_is_the_converted_model_bit_for_bit(bits: int, graph: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(0)
    qmodel = qgnn.calibrate(qgnn.quantize_model(Net(12, 7, 3), bits=bits), graph, steps=5).eval()
    packed = qgnn.pack_model(qmodel)
    expected = qmodel(*graph)
    assert packed(*graph).equal(expected)
    assert all(layer.reason is None for layer in qgnn.summary(packed).layers)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other(*graph).equal(expected)
        assert isinstance(other.first, MeanConv)


def test_off_is_the_float_layer(graph: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = Net(12, 7, 3)
    torch.testing.assert_close(qgnn.quantize_model(model, bits=32)(*graph), model(*graph))


def test_refuses_what_is_no_packed_class() -> None:
    with pytest.raises(TypeError, match="PackedLayer"):
        extension.register_layer(MeanConv, extension.QuantizedConv, torch.nn.Linear)  # type: ignore[arg-type]
