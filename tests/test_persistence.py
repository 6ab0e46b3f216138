"""Copies, pickles, state dicts, moves: quantization stays on, for the copy and for the original."""

import copy
import io
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from core.support import (
    CONVS,
    MODELS,
    OUT,
    WIDTH,
    Plain,
    assert_same_state,
    features,
    graph,
    quantized,
    relative,
    state,
    through_pickle,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch_geometric.nn import GAT, GCN, GATConv, GCNConv, GraphConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.conversion.converted import quantized_layers


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_torch_save, "copy": copy.copy}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", [*MODELS, *(n for n in CONVS if "Conv" in n or n == "APPNP")])
def test_copies_are_quantized_and_so_is_the_original(name: str, how: str) -> None:
    """PyG generates a ``propagate`` onto classes that have none of their own, on the first copy."""
    torch.manual_seed(0)
    x, edge_index = features(), graph()
    model = (MODELS.get(name) or CONVS[name])()
    qmodel = quantized(model, x, edge_index, config=QuantConfig(bits=2, output_bits=8))
    expected = qmodel(x, edge_index)
    assert relative(expected, model.eval()(x, edge_index)) > 0.02
    before = state(qmodel)
    duplicate = COPIES[how](qmodel)
    type(model) is GCNConv and GCNConv(3, 3)  # constructing the class again regenerates its own
    for candidate in (duplicate, qmodel, COPIES[how](duplicate)):
        assert torch.equal(candidate(x, edge_index), expected)
        assert_same_state(candidate, before)
        assert {n: type(m) for n, m in quantized_layers(candidate).items()} == {
            n: type(m) for n, m in quantized_layers(qmodel).items()
        }
    if how != "copy":
        for a, b in zip(qmodel.parameters(), duplicate.parameters(), strict=True):
            assert a is not b
            assert a.requires_grad == b.requires_grad


def propagates(layer: Any) -> set[str]:
    cls = type(layer)
    return {name for name in ("propagate", "_orig_propagate", "_jinja_propagate") if name in vars(cls)}


@pytest.mark.parametrize("make", [GraphConv, GCNConv, GATConv])
def test_propagate_is_the_classs_own_and_stays_so(make: type) -> None:
    x, edge_index = features(), graph()
    qconv: Any = quantized(make(WIDTH, OUT), x, edge_index, bits=2)
    cls = type(qconv)
    original = vars(cls)["propagate"]
    assert propagates(qconv) == {"propagate", "_orig_propagate", "_jinja_propagate"}
    for step in (
        lambda: copy.deepcopy(qconv),
        lambda: through_pickle(qconv),
        lambda: make(WIDTH, OUT),
        lambda: cls.__mro__[1].__name__,
        lambda: quantized(make(WIDTH, OUT), x, edge_index, bits=4),
        lambda: qgnn.restore_model(qconv),
    ):
        step()
        assert vars(cls)["propagate"] is original
        assert vars(cls)["_jinja_propagate"] is vars(cls)["_orig_propagate"] is original
        assert "propagate" not in vars(qconv)
    assert make.propagate is not original


def test_classes_are_made_once() -> None:
    first, second = (qgnn.quantize_model(GCNConv(3, 3), 4) for _ in range(2))
    assert type(first) is type(second)
    assert isinstance(first, GCNConv)
    assert type(first).__name__ == type(first).__qualname__ == "GCNConv"
    assert type(first).__module__ == GCNConv.__module__
    assert type(first) is not type(qgnn.quantize_model(GCNConv(3, 3), config=QuantConfig(output_bits=4)))


def test_pickle_of_a_fresh_process(tmp_path: Any) -> None:
    """Nothing has been converted there yet, and PyG has generated nothing."""
    x, edge_index = features(), graph()
    layers = [quantized(make(WIDTH, OUT), x, edge_index, bits=2) for make in (GraphConv, GCNConv)]
    expected = [layer(x, edge_index) for layer in layers]
    torch.save((layers, x, edge_index, expected), tmp_path / "layers.pt")
    script = textwrap.dedent(f"""
        import torch
        layers, x, edge_index, expected = torch.load({str(tmp_path / "layers.pt")!r}, weights_only=False)
        assert all(torch.equal(m(x, edge_index), y) for m, y in zip(layers, expected))
        from torch_geometric.nn import GCNConv, GraphConv
        GCNConv(3, 3), GraphConv(3, 3)
        assert all(torch.equal(m(x, edge_index), y) for m, y in zip(layers, expected))
    """)
    subprocess.run([sys.executable, "-c", script], check=True)


# State dicts #########################################################################################


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_round_trip(name: str) -> None:
    """Into a conversion that has seen no data, of a model with other weights; safe to unpickle."""
    x, edge_index = features(), graph()
    config = QuantConfig(bits=4, truncation="sbt", output_bits=8)
    qmodel = quantized(MODELS[name](), x, edge_index, config=config)
    for layer in qgnn.smp_layers(qmodel).values():
        layer.multiplier.fill_(0.7)
    buffer = io.BytesIO()
    torch.save(qmodel.state_dict(), buffer)
    buffer.seek(0)
    other = qgnn.quantize_model(MODELS[name]().eval(), config=config)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x, edge_index), qmodel(x, edge_index))
    assert all(float(layer.multiplier) == pytest.approx(0.7) for layer in qgnn.smp_layers(other).values())
    other.load_state_dict(qmodel.state_dict(), assign=True)
    assert torch.equal(other(x, edge_index), qmodel(x, edge_index))


def test_float_weights_load_into_a_converted_model() -> None:
    source, qmodel = Plain(), qgnn.quantize_model(Plain(), 4)
    missing, unexpected = qmodel.load_state_dict(source.state_dict(), strict=False)
    assert unexpected == []
    assert {key.rsplit(".", 1)[1] for key in missing} <= {"log_scale", "offset", "kind", "unit", "multiplier", "slack"}
    assert_same_state(qgnn.restore_model(qmodel), state(source))


OTHERS: dict[str, tuple[QuantConfig, QuantConfig, str]] = {
    "bits": (QuantConfig(bits=4), QuantConfig(bits=8), r"bits=8 at '.*' \(got bits=4\)"),
    "off": (QuantConfig(bits=32), QuantConfig(bits=4), r"bits=4.* \(got bits=32\)"),
    "message_bits": (QuantConfig(), QuantConfig(message_bits=8), r"bits=8 at '.*message.*' \(got bits=4\)"),
    "output_bits": (QuantConfig(output_bits=8), QuantConfig(), "output=False at 'convs.1'.*got output=True"),
    "granularity": (QuantConfig(granularity="node"), QuantConfig(), "granularity='row' at .*got granularity='node'"),
    "channels": (QuantConfig(granularity="channel"), QuantConfig(truncation="bt"), "got granularity='channel'"),
    "levels": (QuantConfig(message_levels="half"), QuantConfig(), "levels='affine' at .*got levels='half'"),
    "truncation": (QuantConfig(truncation="sbt"), QuantConfig(truncation="bt"), "truncation='bt' at .*'sbt'"),
    "smp": (QuantConfig(smp=SMPConfig(terms=8)), QuantConfig(), r"smp.terms=4 at 'convs.0' \(got smp.terms=8\)"),
    "deep": (
        QuantConfig(smp=SMPConfig(initial_residual=0.1)), QuantConfig(smp=SMPConfig(initial_residual=0.2)),
        "smp.initial_residual=0.2",
    ),
    "attention_bits": (QuantConfig(attention_bits=8), QuantConfig(), r"attention_bits=4 at 'convs.0'.*=8"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["calibrated", "as converted", "assign", "not strict"])
@pytest.mark.parametrize("what", OTHERS)
def test_state_of_another_configuration_is_refused(what: str, how: str) -> None:
    """Whether ranges are set or not, and the ranges stay what they are; settings of training may differ."""
    saved, config, message = OTHERS[what]
    depth = 4 if what == "deep" else 2
    build: Any = {"attention_bits": GAT}.get(what, GCN)
    first, other = (qgnn.quantize_model(build(WIDTH, 8, depth, OUT), config=c) for c in (saved, config))
    if how == "calibrated":
        qgnn.calibrate(first, (features(), graph()))
    before = {name: value.clone() for name, value in other.state_dict().items() if name.endswith("log_scale")}
    with pytest.raises(RuntimeError, match=message) as caught:
        other.load_state_dict(first.state_dict(), strict=how != "not strict", assign=how == "assign")
    assert "quantize_like" in str(caught.value)
    if what not in ("smp", "deep", "output_bits", "attention_bits"):
        changed = [n for n, v in before.items() if not torch.equal(v, other.state_dict()[n])]
        refused = [n for n, q in qgnn.quantizers(other).items() if q.settings != qgnn.quantizers(first)[n].settings]
        assert not {name.removesuffix(".log_scale") for name in changed} & set(refused)
    again = qgnn.quantize_like(build(WIDTH, 8, depth, OUT), first.state_dict())
    again.load_state_dict(first.state_dict())
    assert_same_state(again, state(first))
    assert [str(m) for m in again.modules()] == [str(m) for m in first.modules()]


def test_settings_of_training_may_differ() -> None:
    config = QuantConfig(learn_ranges=False, smp=SMPConfig(alpha=0.1, eta_lambda=0.5, multiplier=0.3))
    first = quantized(GCN(WIDTH, 8, 2, OUT), features(), graph(), config=QuantConfig())
    other = qgnn.quantize_model(GCN(WIDTH, 8, 2, OUT), config=config)
    other.load_state_dict(first.state_dict())
    x, edge_index = features(), graph()
    assert torch.equal(other.eval()(x, edge_index), first(x, edge_index))


def test_configurations_travel_in_every_format(tmp_path: Any) -> None:
    """As small tensors; without them, as in version 1, a state dict loads as it did."""
    qmodel = quantized(Plain(), features(), graph(), bits=4)
    values = qmodel.state_dict()
    assert all(isinstance(value, Tensor) for value in values.values())
    torch.save(values, tmp_path / "state.pt")
    safetensors.torch.save_file({k: v.clone() for k, v in values.items()}, tmp_path / "state.safetensors")
    for loaded in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "state.safetensors"),
        {k: v for k, v in values.items() if "_state" not in k},
        {k: v.to("meta") if "_state" in k else v for k, v in values.items()},
    ):
        for strict in (True, False):
            other = qgnn.quantize_model(Plain(), 4)
            assert other.load_state_dict(loaded, strict=strict) == ([], [])
            assert_same_state(other, state(qmodel))
    with pytest.raises(RuntimeError, match=r"bits=8 at 'convs.1.message.x' \(got bits=4\)"):
        qgnn.quantize_model(Plain(), 8).convs[1].load_state_dict(qmodel.convs[1].state_dict())
    damaged = {**values, "encoder._quantization_state": torch.ones(3), "encoder.weight_quantizer._extra_state": None}
    with pytest.raises(RuntimeError, match=r"'encoder'.*settings of a converted model \(got none[\s\S]*NoneType"):
        qgnn.quantize_model(Plain(), 4).load_state_dict(damaged)
    assert set(qgnn.restore_model(qmodel).state_dict()) == set(Plain().state_dict())


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.05, 0.15, 0.8), None])
def test_averages_of_state_dicts_load(weights: tuple[float, ...] | None) -> None:
    """As federated averages and model soups make them: integers and settings among the rest, as floats or added up."""
    qmodel = quantized(Plain(), features(), graph(), bits=4)
    values = qmodel.state_dict()
    if weights is None:
        total = {name: value.clone() for name, value in values.items()}
        for name in total:
            for _ in range(9):
                total[name] += values[name]
            total[name] = torch.div(total[name], 10)
    else:
        total = {name: torch.stack([w * v for w in weights]).sum(0) for name, v in values.items()}
    other = qgnn.quantize_model(Plain(), 4)
    other.load_state_dict(total)
    for name, site in qgnn.quantizers(other).items():
        assert site.range_kind == qgnn.quantizers(qmodel)[name].range_kind
        torch.testing.assert_close(site.range(), qgnn.quantizers(qmodel)[name].range())
    kinds = {name: value + 0.5 if name.endswith("kind") else value for name, value in total.items()}
    with pytest.raises(RuntimeError, match=r"integers as 'kind' \(got averaged over different models"):
        other.load_state_dict(kinds)


def test_layers_with_extra_state_of_their_own() -> None:
    class Counting(GCNConv):
        count = 0

        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, value: Any) -> None:
            self.count = value["count"]

    first, other = (qgnn.quantize_model(nn.ModuleDict({"conv": Counting(3, 3)}), 4) for _ in range(2))
    first["conv"].count = 5
    other.load_state_dict(first.state_dict())
    assert other["conv"].count == 5
    assert set(qgnn.restore_model(first).state_dict()) == set(nn.ModuleDict({"conv": Counting(3, 3)}).state_dict())
    with pytest.raises(RuntimeError, match="got bits=4"):
        qgnn.quantize_model(nn.ModuleDict({"conv": Counting(3, 3)}), 8).load_state_dict(first.state_dict())


def test_quantize_like_says_what_is_missing() -> None:
    qmodel, model = qgnn.quantize_model(Plain(), 4), Plain()
    with pytest.raises(ValueError, match="does not say how it was converted"):
        qgnn.quantize_like(model, model.state_dict())
    with pytest.raises(ValueError, match="got another at 'encoder'"):
        qgnn.quantize_like(GCN(WIDTH, 8, 2, OUT), qmodel.state_dict())
    with pytest.raises(ValueError, match="already quantized"):
        qgnn.quantize_like(qmodel, qmodel.state_dict())
    with pytest.raises(TypeError, match="state dict"):
        qgnn.quantize_like(model, [1])  # type: ignore[arg-type]
    assert not qgnn.is_quantized(model)
    assert qgnn.quantize_like(model, qmodel.state_dict(), inplace=True) is model


@pytest.mark.parametrize("name", ["GCN", "GIN", "GAT", "GraphSAGE"])
def test_eval_changes_no_state(name: str) -> None:
    x, edge_index = features(), graph()
    qmodel = quantized(MODELS[name](), x, edge_index, bits=4)
    before, attributes = state(qmodel), {n: set(vars(m)) for n, m in qmodel.named_modules()}
    expected = qmodel(x, edge_index)
    with torch.inference_mode():
        qmodel(x * 2, edge_index)
    qmodel(x.clone().requires_grad_(), edge_index).sum().backward()
    assert_same_state(qmodel, before)
    assert {n: set(vars(m)) for n, m in qmodel.named_modules()} == attributes
    assert torch.equal(qmodel(x, edge_index), expected)


# Moves ###############################################################################################


@pytest.mark.parametrize("name", MODELS)
def test_moving_precision_and_device(name: str) -> None:
    x, edge_index = features(), graph()
    qmodel = quantized(MODELS[name](), x, edge_index)
    expected = qmodel(x, edge_index)
    double = copy.deepcopy(qmodel).double()
    assert {b.dtype for n, b in double.named_buffers() if n.endswith("kind")} == {torch.uint8}
    assert relative(double(x.double(), edge_index), expected) < 0.01
    assert torch.equal(double.float()(x, edge_index), expected)
    values = state(qmodel)
    meta = copy.deepcopy(qmodel).to("meta")
    assert all(p.is_meta for p in (*meta.parameters(), *meta.buffers()))
    for call in (qgnn.pack_model, qgnn.summary, lambda model: qgnn.calibrate(model, (x, edge_index))):
        with pytest.raises(ValueError, match=r"Expected a model with values \(got '.*' on the device 'meta'\)"):
            call(meta)
    meta.to_empty(device="cpu").load_state_dict(values)
    assert torch.equal(meta(x, edge_index), expected)


@pytest.mark.parametrize("name", MODELS)
def test_models_made_in_inference_mode_outlive_it(name: str, tmp_path: Path) -> None:
    """What is made there can be trained, loaded and copied to outside, as any other model."""
    x, edge_index = features(), graph()
    model = MODELS[name]()
    with torch.inference_mode():
        qmodel = qgnn.calibrate(qgnn.quantize_model(model, 4), (x, edge_index))
        packed = qgnn.pack_model(qmodel.eval())
        qgnn.save_packed(packed, tmp_path / "packed")
        made = [qmodel, packed, qgnn.load_packed(tmp_path / "packed", model), qgnn.restore_model(qmodel)]
        assert torch.is_inference_mode_enabled()
        outputs = [each.eval()(x, edge_index) for each in made]
    for each, expected in zip(made, outputs, strict=True):
        assert not [key for key, value in each.state_dict().items() if value.is_inference()]
        each.load_state_dict(copy.deepcopy(each.state_dict()))
        with torch.no_grad():
            assert torch.equal(each(x, edge_index), expected)
    qgnn.calibrate(qmodel, (2 * x, edge_index)).train()(x, edge_index).square().sum().backward()
    torch.optim.SGD(qmodel.parameters(), lr=0.1).step()


def test_modes_and_gradients_switch_as_in_any_module() -> None:
    qmodel = quantized(Plain(), features(), graph())
    assert not any(m.training for m in qmodel.modules())
    assert all(m.training for m in qmodel.train().modules())
    qmodel.requires_grad_(False)
    out = qmodel.eval()(features(), graph())
    assert not out.requires_grad
    qmodel.requires_grad_(True)
    qmodel(features(), graph()).sum().backward()
    qmodel.zero_grad()
    assert all(p.grad is None for p in qmodel.parameters())


def test_averaged_models() -> None:
    x, edge_index = features(), graph()
    qmodel = qgnn.quantize_model(GCN(WIDTH, 8, 2, OUT), 8)
    averaged = AveragedModel(qmodel, use_buffers=False)
    qmodel.train()(x, edge_index)
    averaged.update_parameters(qmodel)
    assert torch.equal(averaged.eval()(x, edge_index), qmodel.eval()(x, edge_index))


def test_functional_call() -> None:
    x, edge_index = features(), graph()
    qmodel = quantized(GCN(WIDTH, 8, 2, OUT), x, edge_index, bits=4)
    fresh = qgnn.quantize_model(GCN(WIDTH, 8, 2, OUT).eval(), 4)
    out = torch.func.functional_call(fresh, dict(qmodel.state_dict()), (x, edge_index))
    assert torch.equal(out, qmodel(x, edge_index))
