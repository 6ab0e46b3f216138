"""quantize_model and restore_model: what is converted, what stays, what is refused."""

import copy
import inspect
from typing import Any

import pytest
import torch
from core.support import (
    CONVS,
    NODES,
    OUT,
    WIDTH,
    Plain,
    assert_same_state,
    features,
    graph,
    quantized,
    state,
)
from torch import nn
from torch_geometric.nn import GCN, GATConv, GCNConv, GraphConv, Linear, MessagePassing, SAGEConv
from torch_geometric.typing import OptTensor

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, QuantizedLayer
from qgnn_plugin.conversion import quantized_layers
from qgnn_plugin.layers import QuantizedMessagePassing, register_layer
from qgnn_plugin.layers.linear import QuantizedLinear

PLAIN_LAYERS = [
    "encoder", "convs.0", "convs.0.lin", "convs.1", "convs.1.lin_rel", "convs.1.lin_root",
    "heads.main", "heads.other", "shared",
]  # fmt: skip


def names(model: nn.Module) -> list[str]:
    return list(quantized_layers(model))


# What is converted ###################################################################################


def test_every_layer_is_converted_once_and_nothing_else_changes() -> None:
    model = Plain()
    before = state(model)
    hooks = []
    model.encoder.register_forward_hook(lambda *_: hooks.append(1))
    qmodel = qgnn.quantize_model(model, 4)
    assert names(qmodel) == PLAIN_LAYERS
    assert not qgnn.is_quantized(model)
    assert_same_state(model, before)
    assert type(qmodel) is Plain
    assert qmodel.shared is qmodel.again
    assert isinstance(qmodel.encoder, Linear)
    assert isinstance(qmodel.convs[0], GCNConv)
    assert isinstance(qmodel.heads["main"], nn.Linear)
    assert isinstance(qmodel.norm, nn.BatchNorm1d)
    after = qmodel.state_dict()
    assert set(before) < set(after)
    for name, value in before.items():
        assert torch.equal(after[name], value)
    extra = {name.rsplit(".", 1)[1] for name in set(after) - set(before)}
    settings = {"_extra_state", "_quantization_state"}  # of a site and of a layer, in bytes
    assert extra - settings <= {"log_scale", "offset", "kind", "skew", "unit", "multiplier", "slack"}
    qmodel.train()(features(), graph())
    assert hooks == [1]


def test_inplace_keeps_the_module_its_parameters_and_order() -> None:
    model = Plain()
    parameters = dict(model.named_parameters())
    assert qgnn.quantize_model(model, 4, inplace=True) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert qgnn.is_quantized(model)


@pytest.mark.parametrize("name", CONVS)
def test_a_lone_layer_is_converted(name: str) -> None:
    conv = CONVS[name]()
    qconv = qgnn.quantize_model(conv, 4)
    assert isinstance(qconv, type(conv))
    assert isinstance(qconv, QuantizedLayer)
    assert set(conv.state_dict()) < set(qconv.state_dict())
    parameters = inspect.signature(qconv.forward).parameters
    assert list(parameters) == list(inspect.signature(conv.forward).parameters)


def test_generic_layers_keep_their_signature() -> None:
    conv = GraphConv(WIDTH, OUT)
    for bits in (32, 8):
        config = QuantConfig(bits=4, output_bits=bits)
        qconv = qgnn.quantize_model(conv, config=config)
        assert inspect.signature(qconv.forward) == inspect.signature(conv.forward)


@pytest.mark.parametrize("training", [True, False])
def test_mode_device_and_dtype_follow_each_layer(training: bool) -> None:
    model = Plain().double().train(training)
    model.convs[0].train(not training)
    qmodel = qgnn.quantize_model(model, 4)
    for name, module in model.named_modules():
        assert qmodel.get_submodule(name).training == module.training
    for name, quantizer in qgnn.quantizers(qmodel).items():
        inside = name.startswith("convs.0.")
        assert quantizer.training == (training != inside), name
        assert quantizer.log_scale.dtype == torch.float64
        assert quantizer.log_scale.device == model.encoder.weight.device
    meta = qgnn.quantize_model(Plain().to("meta"), 4)
    assert all(p.is_meta for p in qgnn.range_parameters(meta))


def test_frozen_weights_stay_frozen() -> None:
    model = Plain()
    model.encoder.weight.requires_grad_(False)
    qmodel = qgnn.quantize_model(model, 4)
    assert not qmodel.encoder.weight.requires_grad
    assert qmodel.encoder.weight_quantizer.log_scale.requires_grad


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("encoder", ["encoder"]),
        ("convs", PLAIN_LAYERS[1:6]),
        ("convs.0", PLAIN_LAYERS[1:3]),
        ("*.0", PLAIN_LAYERS[1:3]),
        (["heads.*", "shared"], PLAIN_LAYERS[6:]),
        (GCNConv, PLAIN_LAYERS[1:3]),
        (MessagePassing, PLAIN_LAYERS[1:6]),
        ([nn.Linear, "encoder"], ["encoder", *PLAIN_LAYERS[6:]]),
        ("convs.0.lin", ["convs.0.lin"]),
    ],
)
def test_include(include: object, expected: list[str]) -> None:
    assert names(qgnn.quantize_model(Plain(), 4, include=include)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exclude", "missing"),
    [
        ("convs", PLAIN_LAYERS[1:6]),
        (MessagePassing, PLAIN_LAYERS[1:6]),
        ("convs.1.lin_*", ["convs.1.lin_rel", "convs.1.lin_root"]),
        (nn.Linear, PLAIN_LAYERS[6:]),
        (["encoder", GCNConv], PLAIN_LAYERS[:3]),
    ],
)
def test_exclude(exclude: object, missing: list[str]) -> None:
    qmodel = qgnn.quantize_model(Plain(), 4, exclude=exclude)  # type: ignore[arg-type]
    assert names(qmodel) == [name for name in PLAIN_LAYERS if name not in missing]
    assert not any(isinstance(qmodel.get_submodule(n), QuantizedLayer) for n in missing)


def test_exclude_wins_over_include() -> None:
    qmodel = qgnn.quantize_model(Plain(), 4, include="convs", exclude="convs.1")
    assert names(qmodel) == PLAIN_LAYERS[1:3]


def test_overrides_reach_every_site_of_a_layer_and_inner_layers() -> None:
    model = nn.ModuleDict({"a": SAGEConv(WIDTH, OUT), "b": GCNConv(WIDTH, OUT), "c": nn.Linear(3, 3)})
    config = QuantConfig(
        bits=4,
        overrides={
            "a*": {"bits": 8},
            "a.lin_l": {"weight_bits": 2, "weight_levels": "symmetric"},
            "b": {"message_levels": "half", "granularity": "node", "smp": None},
            "*": {"learn_ranges": False},
        },
    )
    qmodel = qgnn.quantize_model(model, config=config)
    sites = qgnn.quantizers(qmodel)
    assert sites["a.lin_l.weight_quantizer"].bits == 2
    assert sites["a.lin_l.weight_quantizer"].levels == "symmetric"
    assert sites["a.lin_r.weight_quantizer"].bits == 8
    assert sites["a.input_quantizer"].bits == 8
    assert sites["b.lin.weight_quantizer"].bits == 4
    assert sites["b.message_quantizer"].levels == "half"
    assert sites["b.message_quantizer"].granularity == "node"
    assert list(qgnn.smp_layers(qmodel)) == ["a"]
    assert not any(p.requires_grad for p in qgnn.range_parameters(qmodel))
    assert not hasattr(qmodel["b"], "multiplier")


def test_later_overrides_win() -> None:
    config = QuantConfig(overrides={"*": {"bits": 2}, "c": {"bits": 8}})
    sites = qgnn.quantizers(qgnn.quantize_model(nn.ModuleDict({"c": nn.Linear(2, 2)}), config=config))
    assert {q.bits for q in sites.values()} == {8}


def test_input_site_is_the_first_layers_and_output_site_the_last_ones() -> None:
    config = QuantConfig(bits=4, input_bits=8, output_bits=2, message_bits=32)
    qmodel = qgnn.quantize_model(Plain(), config=config)
    sites = qgnn.quantizers(qmodel)
    assert sites["encoder.input_quantizer"].bits == 8
    assert sites["convs.0.lin.input_quantizer"].bits == 4
    assert sites["convs.0.message_quantizer"].bits == 32
    assert [name for name in sites if "output" in name] == ["shared.output_quantizer"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_outputs_take_few_values(bits: int) -> None:
    x, edge_index = features(), graph()
    config = QuantConfig(bits=8, output_bits=bits)
    for conv in (GCNConv(WIDTH, OUT), GraphConv(WIDTH, OUT), nn.Linear(WIDTH, OUT)):
        args = (x,) if isinstance(conv, nn.Linear) else (x, edge_index)
        out = quantized(conv, *args, config=config)(*args)
        assert out.unique().numel() <= 2**bits
    attention = quantized(GATConv(WIDTH, OUT), x, edge_index, config=config)
    out, (_, alpha) = attention(x, edge_index, return_attention_weights=True)
    assert out.unique().numel() <= 2**bits
    assert torch.equal(out, attention(x, edge_index))
    assert float(alpha.sum()) == pytest.approx(NODES, rel=1e-5)  # one per node, not quantized


def test_registered_layers() -> None:
    class Bilinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * x)

    model = nn.Sequential(Bilinear(WIDTH, OUT), nn.Linear(OUT, OUT))
    assert names(qgnn.quantize_model(model, 8)) == ["1"]  # it computes something else than Linear

    class QuantizedBilinear(QuantizedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x * x)

    register_layer(Bilinear, QuantizedBilinear)
    assert names(qgnn.quantize_model(model, 8)) == ["0", "1"]
    with pytest.raises(TypeError, match=r"a torch.nn.Module class \(got 3\)"):
        register_layer(3, QuantizedBilinear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a QuantizedLayer class"):
        register_layer(Bilinear, nn.Linear)  # type: ignore[arg-type]


class Doubling(GCNConv):
    """Computes something else than GCNConv, where the fused path would not see it."""

    def message(self, x_j: torch.Tensor, edge_weight: OptTensor) -> torch.Tensor:
        return 2 * super().message(x_j, edge_weight)


class Renamed(GCNConv):
    """Only its constructor differs."""

    def __init__(self, width: int) -> None:
        super().__init__(width, OUT)


def test_subclasses_that_behave_differently_take_the_generic_path() -> None:
    x, edge_index = features(), graph()
    different = quantized(Doubling(WIDTH, OUT), x, edge_index)
    assert isinstance(different, QuantizedMessagePassing)
    same = quantized(Renamed(WIDTH), x, edge_index)
    assert not isinstance(same, QuantizedMessagePassing)
    for qconv in (different, same):
        expected = qgnn.restore_model(qconv)(x, edge_index)
        assert (qconv(x, edge_index) - expected).norm() < 0.03 * expected.norm()


# What is refused #####################################################################################


class Unconvertible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)


class Clashing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.conv = GCNConv(WIDTH, OUT)
        self.conv.message_quantizer = None


class Bound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.conv = GCNConv(WIDTH, OUT)
        self.conv.propagate = lambda *args, **kwargs: torch.zeros(NODES, OUT)


class Breaking(QuantizedLinear):
    """Fails half-way through."""

    @classmethod
    def attach(cls, layer, sites, own_input=True):  # type: ignore[no-untyped-def]
        super().attach(layer, sites)
        layer.register_buffer("half_way", torch.ones(1))
        raise OSError("half-way")


class Broken(nn.Linear):
    pass


register_layer(Broken, Breaking)

Lazy = type("Lazy", (nn.Sequential,), {})


def lazy() -> nn.Module:
    return Lazy(GCNConv(-1, OUT), Linear(-1, OUT), nn.Linear(2, 2))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (Unconvertible, {}, ValueError, r"Nothing to convert in Unconvertible.*only LayerNorm, Unc.*register_layer"),
        (Plain, {"include": "convs", "exclude": "convs.?"}, ValueError, "Nothing to convert.*encoder, convs.0"),
        (Plain, {"include": "encodr"}, ValueError, "'encodr' matches no layer; did you mean 'encoder'.*heads.main"),
        (Plain, {"exclude": ["encoder", "heads.mian"]}, ValueError, "did you mean 'heads.main'"),
        (Plain, {"include": GATConv}, ValueError, "GATConv.*matches no layer. Layers that can be converted: encoder"),
        (Plain, {"include": "norm"}, ValueError, "'norm' matches no layer"),
        (Plain, {"bits": 3}, ValueError, r"'bits' to be one of 2, 4, 8 or 32 = off \(got 3\)"),
        (Plain, {"bits": 2, "config": QuantConfig(bits=8)}, ValueError, "'bits' or 'config', not both"),
        (Plain, {"bits": 4, "config": QuantConfig(bits=8)}, ValueError, r"not both \(got bits=4 and .* of 8 bits"),
        (Plain, {"bits": 4, "config": QuantConfig(bits=4)}, ValueError, "not both"),
        (Plain, {"bits": QuantConfig(bits=4), "config": QuantConfig(bits=4)}, ValueError, "not both"),
        (Plain, {"config": {"bits": 8}}, TypeError, r"a QuantConfig as 'config' \(got dict\).*from_dict"),
        (Plain, {"bits": "4"}, ValueError, r"'bits' to be one of 2, 4, 8 or 32 = off \(got '4'\)"),
        (Plain, {"config": QuantConfig(overrides={"convs.9": {}})}, ValueError,
         "'convs.9' matches no layer.*Did you mean 'convs.[01]'"),
        (lazy, {}, ValueError, r"initialized layers \(got lazy ones: 0.lin, 1\); run the model once"),
        (Clashing, {}, ValueError, "message_quantizer to be free on 'conv', a GCNConv; rename"),
        (Bound, {}, ValueError, "class of 'conv', a GCNConv, to define propagate.*in a subclass"),
        (lambda: nn.Sequential(nn.Linear(2, 2), Broken(2, 2)), {}, OSError, "half-way"),
        (lambda: nn.Sequential(SAGEConv(4, 4)), {"exclude": "0.lin_r"}, ValueError,
         r"'0.lin_r' to be converted with '0'.*overrides=\{'0.lin_r'"),
        (lambda: qgnn.quantize_model(Plain(), 4), {}, ValueError,
         r"already quantized: encoder, convs.0, .*, \.\.\.\); call .*restore_model"),
    ],
)  # fmt: skip
def test_errors_change_nothing(make, options, error, message, inplace) -> None:  # type: ignore[no-untyped-def]
    model = make()
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    is_lazy = isinstance(model, Lazy)
    before = None if is_lazy else state(model)
    with pytest.raises(error, match=message):
        qgnn.quantize_model(model, **options, inplace=inplace)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    if before is not None:
        assert_same_state(model, before)


@pytest.mark.parametrize("model", [3, None, "GCN", GCNConv])
def test_only_modules_are_converted(model: object) -> None:
    with pytest.raises(TypeError, match=r"a torch.nn.Module \(got"):
        qgnn.quantize_model(model)  # type: ignore[arg-type]


def test_lazy_layers_convert_once_initialized() -> None:
    model = nn.ModuleList([GCNConv(-1, OUT), GATConv((-1, -1), OUT, add_self_loops=False)])
    x, edge_index = features(), graph()
    model[0](x, edge_index)
    model[1]((x, x), edge_index)
    assert len(names(qgnn.quantize_model(model, 4))) == 5


def test_inputs_on_another_device_are_named() -> None:
    qmodel = quantized(Plain(), features(), graph())
    with pytest.raises(ValueError, match=r"where 'encoder\.input' has its range \(got meta\)"):
        qmodel(features().to("meta"), graph().to("meta"))


# Back again ##########################################################################################


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
