"""quantize_model: what is converted, and what stays."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core.support import (
    CONVS,
    NODES,
    OUT,
    WIDTH,
    Plain,
    Summed,
    assert_same_state,
    features,
    graph,
    names,
    quantized,
    state,
)
from torch import Tensor, nn
from torch_geometric.nn import (
    APPNP,
    GAT,
    GCN,
    GIN,
    FiLMConv,
    GATConv,
    GCNConv,
    GraphConv,
    GraphSAGE,
    Linear,
    MessagePassing,
    SAGEConv,
    SGConv,
)
from torch_geometric.typing import OptTensor

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, QuantizedLayer, SMPConfig
from qgnn_plugin.layers import QuantizedMessagePassing, register_layer
from qgnn_plugin.layers.linear import QuantizedLinear

PLAIN_LAYERS = [
    "encoder", "convs.0", "convs.0.lin", "convs.1", "convs.1.lin_rel", "convs.1.lin_root",
    "heads.main", "heads.other", "shared",
]  # fmt: skip


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
    conv = Summed(WIDTH, OUT)
    for bits in (32, 8):
        config = QuantConfig(bits=4, output_bits=bits)
        qconv = qgnn.quantize_model(conv, config=config)
        assert inspect.signature(qconv.forward) == inspect.signature(conv.forward)


@pytest.mark.parametrize("training", [True, False])
def test_what_conversion_adds_has_the_mode_of_its_layer(training: bool) -> None:
    """Sites of every step lie in a dictionary, which is a module, too."""
    smp = SMPConfig(state_bits=8)
    for layer in (APPNP(3, 0.1), SGConv(WIDTH, OUT, K=2), FiLMConv(WIDTH, OUT)):
        qlayer = qgnn.quantize_model(layer.train(training), config=QuantConfig(bits=4, smp=smp))
        assert {module.training for module in qlayer.modules()} == {training}


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


@pytest.mark.parametrize("field", ["weight_bits", "message_bits"])
@pytest.mark.parametrize("model", [GCN, GraphSAGE, GAT, GIN])
def test_overrides_change_something_or_say_so(model: type[nn.Module], field: str) -> None:
    """A convolution's weights are those of the layers inside it: the pattern of its name reaches none."""
    float_model = model(WIDTH, 8, num_layers=2, out_channels=OUT)
    before = {name: site.bits for name, site in qgnn.quantizers(qgnn.quantize_model(float_model, 4)).items()}
    layers = {name.rpartition(".")[0] for name in before}
    outcomes = set()
    for pattern in (*layers, "*", "convs.1*", "convs.1.*"):
        config = QuantConfig(bits=4, overrides={pattern: {field: 8}})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            qmodel = qgnn.quantize_model(float_model, config=config)
        changed = before != {name: site.bits for name, site in qgnn.quantizers(qmodel).items()}
        said = [str(w.message) for w in caught if f"'{pattern}' changes nothing" in str(w.message)]
        assert changed != bool(said), pattern
        assert all(f"'{field}' in the override" in text for text in said)
        outcomes.add(changed)
    assert outcomes == {True, False}


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


class Bootstrapped(nn.Module):
    """A target encoder that follows the other one by averages, as in BGRL and momentum contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.other = GCN(WIDTH, 8, 2, OUT), GCN(WIDTH, 8, 2, OUT)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @torch.no_grad()
    def follow(self) -> None:
        for a, b in zip(self.online.parameters(), self.target.parameters(), strict=True):
            b.mul_(0.5).add_(a, alpha=0.5)


@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_of_a_part_has_the_parameters_of_the_part(trained: bool) -> None:
    model = Bootstrapped()
    if trained:
        nn.init.normal_(model.online.convs[0].bias)
    qmodel: Any = qgnn.quantize_model(model)
    for online, target in zip(qmodel.online.named_parameters(), qmodel.target.named_parameters(), strict=True):
        assert online[0] == target[0]
    assert len(list(qmodel.other.parameters())) > len(list(qmodel.target.parameters()))  # what follows another part
    run = lambda m, _: (m.online(features(), graph()), m.target(features(), graph()))  # noqa: E731
    qgnn.calibrate(qmodel, [0], forward=run)
    for parameter in qmodel.online.parameters():
        parameter.data.add_(0.25)
    before = [b.clone() for b in qmodel.target.parameters()]
    qmodel.follow()
    for a, b, was in zip(qmodel.online.parameters(), qmodel.target.parameters(), before, strict=True):
        torch.testing.assert_close(b, (a + was) / 2)


def test_parts_that_follow_one_another_are_no_copies() -> None:
    conv = GCNConv(WIDTH, WIDTH)
    tied = nn.ModuleDict({"a": conv, "b": GCNConv(WIDTH, WIDTH)})
    tied["b"].lin.weight = conv.lin.weight  # type: ignore[union-attr]
    for model in (tied, nn.ModuleList([conv, copy.deepcopy(conv)])):
        first, second = qgnn.quantize_model(model).children()
        assert isinstance(second.lin.input_quantizer.log_scale, nn.Parameter)  # type: ignore[union-attr]
        assert not isinstance(first.lin.input_quantizer.log_scale, nn.Parameter)  # type: ignore[union-attr]


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
            return F.linear(x * x, self.weight.square(), self.bias)

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


class Delegating(nn.Module):
    """A wrapper whose attributes, but for its own, are those of what it wraps."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, *args: Any) -> Any:
        return 2 * self.wrapped(*args)


class Named(nn.Module):
    """A model whose layers stand in a dictionary and are attributes as well; others raise a KeyError."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"conv": Delegating(GCNConv(8, 8)), "head": Delegating(nn.Linear(8, 3))})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # of copying
                raise
            return super().__getattr__("parts")[name]

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.head(self.conv(x, edge_index)) * self.conv.out_channels


def test_attributes_that_users_look_up_are_left_to_them(tmp_path: Path) -> None:
    """What conversion asks of a module is its own, whatever its ``__getattr__`` says of other names."""
    torch.manual_seed(0)
    x, edge_index, model = torch.randn(20, 8), torch.randint(20, (2, 60)), Named().eval()
    assert torch.equal(qgnn.quantize_model(model, 32)(x, edge_index), model(x, edge_index))
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), (x, edge_index)).eval()
    packed = qgnn.pack_model(qmodel)
    assert type(packed.conv) is Delegating
    assert "100%" in str(qgnn.summary(packed))
    with torch.no_grad():
        assert torch.equal(packed(x, edge_index), qmodel(x, edge_index))
        qgnn.save_packed(packed, tmp_path / "m.safetensors")
        assert torch.equal(qgnn.load_packed(tmp_path / "m.safetensors", model)(x, edge_index), packed(x, edge_index))
    assert torch.equal(qgnn.restore_model(qmodel)(x, edge_index), model(x, edge_index))


@pytest.mark.parametrize(("make", "name"), [(nn.Linear, "input"), (Linear, "x")])
def test_linear_layers_are_called_by_the_name_of_their_own_argument(make: type[nn.Module], name: str) -> None:
    x, model = features(), make(WIDTH, OUT)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, bits=8), (x,)).eval()
    packed = qgnn.pack_model(qmodel)
    for called in (qgnn.quantize_model(model, bits=32), qmodel, packed):
        assert torch.equal(called(**{name: x}), called(x))
        with pytest.raises(TypeError, match=r"tensor of features|NoneType"):
            called()
