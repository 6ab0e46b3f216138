"""Back to the plain model; originals beside their copies."""

import copy
from typing import Any

import pytest
import torch
from core.support import CONVS, OUT, WIDTH, Plain, assert_same_state, features, graph, quantized, state
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bits", [2, 32])
def test_restored_model_is_the_original(bits: int, inplace: bool) -> None:
    model = Plain()
    qmodel = qgnn.quantize_model(model, config=QuantConfig(bits=bits, output_bits=8))
    qgnn.calibrate(qmodel, (features(), graph()))
    restored = qgnn.restore_model(qmodel, inplace=inplace)
    assert (restored is qmodel) == inplace
    assert qgnn.is_quantized(qmodel) != inplace
    assert_same_state(restored, state(model))
    for (name, plain), (other, module) in zip(
        model.named_modules(), restored.named_modules(), strict=True
    ):
        assert name == other
        assert type(plain) is type(module)
        assert set(vars(plain)) == set(vars(module)), name
    x, edge_index = features(), graph()
    assert torch.equal(restored.eval()(x, edge_index), model.eval()(x, edge_index))


@pytest.mark.parametrize("name", CONVS)
def test_restored_layers_compute_and_look_like_the_original(name: str) -> None:
    conv = CONVS[name]().eval()
    x, edge_index = features(), graph()
    qconv = quantized(conv, x, edge_index, bits=4)
    qconv(x, edge_index)
    restored = qgnn.restore_model(qconv)
    assert {k: type(v) for k, v in vars(restored).items()} == {
        k: type(v) for k, v in vars(conv).items()
    }
    assert torch.equal(restored(x, edge_index), conv(x, edge_index))
    again = quantized(restored, x, edge_index, bits=4)
    assert torch.equal(again(x, edge_index), qconv(x, edge_index))


def test_training_is_kept_by_restoring() -> None:
    qmodel = qgnn.quantize_model(Plain(), 4)
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.1)
    qmodel(features(), graph()).square().sum().backward()
    optimizer.step()
    weight = qmodel.encoder.weight
    restored = qgnn.restore_model(qmodel, inplace=True)
    assert restored.encoder.weight is weight


def test_a_configuration_is_taken_in_the_place_of_bits() -> None:
    by_place, by_name = (
        qgnn.quantize_model(Plain(), *args, **options)
        for args, options in (((QuantConfig(bits=8),), {}), ((), {"config": QuantConfig(bits=8)}))
    )
    assert {q.bits for q in qgnn.quantizers(by_place).values()} == {8}
    assert [q.bits for q in qgnn.quantizers(by_place).values()] == [q.bits for q in qgnn.quantizers(by_name).values()]
    assert qgnn.quantize_model(Plain()).encoder.quant_config.bits == 4


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (qgnn.restore_model, "quantize_model"),
        (lambda model: qgnn.calibrate(model, (features(), graph())), "quantize_model"),
        (lambda model: qgnn.error_report(model, (features(), graph())), "quantize_model"),
        (qgnn.pack_model, "quantize_model"),
        (qgnn.summary, "quantize_model"),
        (qgnn.quantize_model, "plain"),
    ],
)
def test_models_of_another_kind_are_refused(use: Any, kind: str) -> None:
    """By what they are, with the way on."""
    packed = qgnn.pack_model(quantized(GCN(WIDTH, 8, 2, OUT), features(), graph(), bits=4))
    for model, found in ((Plain(), "plain"), (packed, "packed")):
        if (use is qgnn.summary and found == "packed") or kind == found:
            use(model)
            continue
        with pytest.raises(ValueError, match=rf"Expected .*{kind}.*\(got .*{found}.*") as caught:
            use(model)
        assert "; " in str(caught.value) or "already packed" in str(caught.value)
    for wrong in (None, {"a": 1}, Plain):
        with pytest.raises(TypeError, match=r"Expected a .*\(got (a )?(NoneType|dict|type)\)"):
            use(wrong)


def test_range_parameters_are_the_ranges() -> None:
    model = Plain()
    qmodel = qgnn.quantize_model(model, 4)
    ranges = qgnn.range_parameters(qmodel)
    assert len({id(p) for p in ranges}) == len(ranges)
    assert {id(p) for p in ranges} == {
        id(p)
        for name, p in qmodel.named_parameters()
        if name.rsplit(".", 1)[1] in ("log_scale", "offset")
    }
    assert len(ranges) + len(list(model.parameters())) == len(list(qmodel.parameters()))
    assert qgnn.range_parameters(model) == []
    assert qgnn.quantizers(model) == {}
    off = qgnn.quantize_model(model, 32)
    assert not any(p.requires_grad for p in qgnn.range_parameters(off))


def test_original_stays_usable_beside_its_copy() -> None:
    model = Plain().eval()
    x, edge_index = features(), graph()
    expected = model(x, edge_index)
    qmodel = quantized(model, x, edge_index, bits=2)
    assert not torch.equal(qmodel(x, edge_index), expected)
    assert torch.equal(model(x, edge_index), expected)
    fresh = copy.deepcopy(model)
    assert torch.equal(fresh(x, edge_index), expected)


def test_input_ranges_can_be_left_to_calibration():
    """Only the features that enter the model: ranges of activations, messages and weights still learn."""
    qmodel = qgnn.quantize_model(GCN(8, 8, 2, 3), config=QuantConfig.accurate(2))
    learned = {name for name, p in qmodel.named_parameters() if name.endswith("log_scale")}
    fixed = {name for name, _ in qmodel.named_buffers() if name.endswith("log_scale")}
    assert learned
    assert fixed == {"convs.0.lin.input_quantizer.log_scale"}
    assert len(learned) > 1
    default = qgnn.quantize_model(GCN(8, 8, 2, 3), bits=2)
    assert all(p.requires_grad for p in qgnn.range_parameters(default))
