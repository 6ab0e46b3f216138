"""One bit, packed: the converted model bit for bit, half the words of two bits, told from 0/1 data in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import erdos_renyi
from packing.cases import ATTENTION, MODELS, features, packed_pair, quantized
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import available_backends, use_backend
from qgnn_plugin.kernels.layout import unpack_codes
from qgnn_plugin.packing.files.schema import _site, fits
from qgnn_plugin.packing.layers.ranges import SiteSpec
from qgnn_plugin.packing.layers.site_spec import ZERO_ONE
from qgnn_plugin.quantizers import QLRQuantizer

CONFIGS: list[dict[str, Any]] = [
    {"bits": 1},
    {"bits": 1, "granularity": "node", "message_levels": "half", "weight_levels": "affine"},
    {"bits": 1, "granularity": "tensor", "weight_granularity": "tensor", "output_bits": 1},
    {"bits": 2, "weight_bits": 1, "truncation": "sbt"},
]
BACKENDS = [name for name in available_backends() if name in ("torch", "cpu")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("name", [*MODELS, *ATTENTION])
def test_models_equal_bit_for_bit(name: str, config: dict[str, Any], poison_empty: None) -> None:
    qmodel, packed, args = packed_pair(name, **config)
    for backend in BACKENDS if config == CONFIGS[0] else BACKENDS[-1:]:
        with use_backend(backend), torch.no_grad():
            assert torch.equal(packed(*args), qmodel(*args)), backend


class Gated(MessagePassing):
    """A layer of a user's own, with a linear map before it and a message of both ends."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(aggr="add")
        self.lin = nn.Linear(num_in, num_out)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=self.lin(x))

    def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        return torch.sigmoid(x_i) * x_j


def test_a_layer_of_ones_own() -> None:
    graph, x = erdos_renyi(40, 200), features("dense", 40)
    qmodel = quantized(Gated(x.size(1), 9), x, graph.edge_index, bits=1)
    packed = qgnn.pack_model(qmodel)
    for backend in BACKENDS:
        with use_backend(backend), torch.no_grad():
            assert torch.equal(packed(x, graph.edge_index), qmodel(x, graph.edge_index)), backend
    assert "cpu" not in BACKENDS or "generated kernel" in {layer.path for layer in qgnn.summary(packed).layers}


@pytest.mark.parametrize("kind", ["binary", "sparse", "rows", "sparse_rows"])
def test_beside_data_of_zero_and_one(kind: str) -> None:
    """Features that are 0/1 stay exact in one bit; those of a value per row too few for that have two levels."""
    qmodel, packed, args = packed_pair("gcn", kind, bits=1)
    site = packed.convs[0].lin.input_quantizer.spec
    assert (site.bits, site.is_zero_one) == (1, kind in ("binary", "sparse"))
    with torch.no_grad():
        assert torch.equal(packed(*args), qmodel(*args))


def test_matched_codes_are_packed() -> None:
    """With the codes that calibration chooses for the outputs, which are not those of the nearest level."""
    graph, x = erdos_renyi(40, 200), features("dense", 40)
    qmodel = qgnn.calibrate(qgnn.quantize_model(MODELS["gcn"](), bits=1).eval(), (x, graph.edge_index))
    assert any(q.shift is not None and bool(q.shift.any()) for q in qgnn.quantizers(qmodel).values())
    with torch.no_grad():
        assert torch.equal(qgnn.pack_model(qmodel)(x, graph.edge_index), qmodel(x, graph.edge_index))


def linear(bits: int) -> Any:
    torch.manual_seed(0)
    x = torch.randn(100, 256)
    return qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(nn.Linear(256, 64), bits=bits).eval(), [(x,)]))


def test_words_are_half_of_those_of_two_bits() -> None:
    one, two = linear(1), linear(2)
    assert one.words.shape == (64, 256 // 32)
    assert 2 * one.words.nbytes == two.words.nbytes
    assert qgnn.packed_bytes(two).packed - qgnn.packed_bytes(one).packed == one.words.nbytes
    x = torch.randn(5, 256)
    assert 2 * one.input_quantizer(x).words.nbytes == two.input_quantizer(x).words.nbytes
    assert {layer.bits["weight"] for layer in qgnn.summary(one).layers} == {1}
    # Each weight is minus or plus one number of its channel.
    codes = unpack_codes(one.words, 256, 1).float()
    torch.testing.assert_close(one.weight + 0, (codes - 0.5) * one.weight_scale.view(-1, 1))


@pytest.mark.parametrize("name", ["gcn", "gat"])
def test_files(name: str, tmp_path: Path) -> None:
    qmodel, packed, args = packed_pair(name, bits=1)
    path = tmp_path / "packed.safetensors"
    qgnn.save_packed(packed, path)
    loaded = qgnn.load_packed(path, qgnn.restore_model(qmodel))
    assert torch.equal(loaded(*args), packed(*args))
    assert str(qgnn.summary(loaded)) == str(qgnn.summary(packed))


def test_files_are_as_much_smaller_as_the_words(tmp_path: Path) -> None:
    sizes = []
    for bits in (1, 2):
        layer = linear(bits)
        path = tmp_path / f"{bits}.safetensors"
        qgnn.save_packed(layer, path)
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] >= layer.words.nbytes / 2 - 100  # what names the two levels


class Refused(Exception):
    pass


def refuse(field: str, expected: str, value: Any) -> Any:
    raise Refused(f"{field}: {expected} (got {value})")


def test_descriptions_tell_two_levels_from_zero_and_one() -> None:
    """A width of 1 without more is what files of before have for 0/1 data."""
    assert _site(refuse, "site", {"bits": 1}) == ZERO_ONE
    quantizer = QLRQuantizer(1, levels="half", site="weight")
    quantizer.set_range(torch.randn(8, 8))
    site = SiteSpec.of(quantizer)
    assert site.has_range
    assert not site.is_zero_one
    assert site.to_dict() == {"bits": 1, "zero_code": 0.5, "two_levels": True}
    assert _site(refuse, "site", site.to_dict()) == site
    assert fits(site, quantizer, packed=True)
    assert fits(ZERO_ONE, quantizer, packed=True)
    assert not fits(site, QLRQuantizer(2, levels="half"), packed=True)
    with pytest.raises(Refused, match="two_levels"):
        _site(refuse, "site", {"bits": 2, "two_levels": True})
