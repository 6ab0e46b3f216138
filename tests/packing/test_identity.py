"""A converted, packed or loaded layer is still the user's layer: class, name, attributes, hooks, copies."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import erdos_renyi
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch_geometric import nn as pyg
from torch_geometric.nn import GCNConv, MessagePassing

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.converted import is_quantized, quantized_layers
from qgnn_plugin.layers.base import QuantizedLayer
from qgnn_plugin.packing import PackedLayer
from qgnn_plugin.packing.model import is_packed, packed_layers

NODES, WIDTH = 30, 8
FORMS = ("converted", "packed", "loaded")


class Doubled(MessagePassing):
    """A layer of the user's own."""

    def __init__(self) -> None:
        super().__init__(aggr="add")
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=self.lin(x))

    def message(self, x_j: Tensor) -> Tensor:
        return 2 * x_j


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(WIDTH, WIDTH),
    "PyG Linear": lambda: pyg.Linear(WIDTH, WIDTH, bias=False),
    "GCNConv": lambda: GCNConv(WIDTH, WIDTH),
    "GATConv": lambda: pyg.GATConv(WIDTH, WIDTH, heads=2, concat=False),
    "GATv2Conv": lambda: pyg.GATv2Conv(WIDTH, WIDTH, heads=2, concat=False, share_weights=True),
    "SAGEConv": lambda: pyg.SAGEConv(WIDTH, WIDTH),
    "SAGEConv max": lambda: pyg.SAGEConv(WIDTH, WIDTH, aggr="max"),
    "SAGEConv project": lambda: pyg.SAGEConv(WIDTH, WIDTH, project=True, root_weight=False),
    "GINConv": lambda: pyg.GINConv(mlp(), train_eps=True),
    "APPNP": lambda: pyg.APPNP(3, 0.1),
    "SGConv": lambda: pyg.SGConv(WIDTH, WIDTH, K=2),
    "SSGConv": lambda: pyg.SSGConv(WIDTH, WIDTH, alpha=0.1, K=2),
    "TAGConv": lambda: pyg.TAGConv(WIDTH, WIDTH, K=2),
    "LGConv": lambda: pyg.LGConv(),
    "SMPropagation": lambda: qgnn.SMPropagation(3),
    "GraphConv": lambda: pyg.GraphConv(WIDTH, WIDTH),
    "TransformerConv": lambda: pyg.TransformerConv(WIDTH, WIDTH),
    "EdgeConv": lambda: pyg.EdgeConv(nn.Sequential(nn.Linear(2 * WIDTH, WIDTH))),
    "MFConv": lambda: pyg.MFConv(WIDTH, WIDTH),
    "Doubled": Doubled,
}


class Model(nn.Module):
    """One layer between two maps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.layer(x, edge_index) if isinstance(self.layer, MessagePassing) else self.layer(x)
        return self.head(x)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(NODES, WIDTH), erdos_renyi(NODES, 4 * NODES).edge_index


@pytest.fixture(scope="module")
def made() -> Callable[[str], dict[str, nn.Module]]:
    """The forms of a model around a layer, made once."""
    known: dict[str, dict[str, nn.Module]] = {}

    def forms(name: str) -> dict[str, nn.Module]:
        if name not in known:
            known[name] = forms_of(Model(LAYERS[name]()), inputs())
        return known[name]

    return forms


def forms_of(model: nn.Module, args: tuple[Any, ...], **options: Any) -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = qgnn.calibrate(qgnn.quantize_model(model, **options), [args], steps=5).eval()
        packed = qgnn.pack_model(converted)
    return {"float": model.eval(), "converted": converted, "packed": packed, "loaded": reloaded(packed, model)}


def reloaded(packed: nn.Module, model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        qgnn.save_packed(packed, Path(folder, "model.safetensors"))
        return qgnn.load_packed(Path(folder, "model.safetensors"), model)


def pairs(first: nn.Module, second: nn.Module) -> list[tuple[Any, Any]]:
    """The modules of a float model, and what they are in another form."""
    theirs = dict(second.named_modules(remove_duplicate=False))
    return [(module, theirs[name]) for name, module in first.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_users(name: str, form: str, made: Any) -> None:
    forms = made(name)
    for plain, layer in pairs(forms["float"], forms[form]):
        assert isinstance(layer, type(plain))
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(layer), attribute) == getattr(type(plain), attribute)
        assert not set(vars(plain)) - set(vars(layer))
        for attribute in dir(plain):
            assert hasattr(layer, attribute)
        for attribute, value in vars(plain).items():
            if isinstance(value, (bool, int, float, str, tuple)) and attribute != "training":
                assert vars(layer)[attribute] == value
    layer = forms[form].layer
    assert isinstance(layer, QuantizedLayer if form == "converted" else (QuantizedLayer, PackedLayer))
    assert repr(layer).startswith(repr(forms["float"].layer)[:-1].split("\n")[0].rstrip("(")) or "\n" in repr(layer)
    assert "bits=4" in repr(forms[form].first)
    assert ("packed" in repr(forms[form].first)) == (form != "converted")


@pytest.mark.parametrize("name", LAYERS)
def test_off_nothing_shows(name: str, made: Any) -> None:
    model = made(name)["float"]
    assert repr(qgnn.quantize_model(model, bits=32)) == repr(model)


def test_repr_says_what_is_quantized() -> None:
    assert repr(qgnn.quantize_model(GCNConv(16, 32), bits=4)) == "GCNConv(16, 32, bits=4)"
    # Once set, the range that the codes span.
    config = qgnn.QuantConfig(bits=8, granularity="tensor")
    for x, shown in ((torch.linspace(-1, 2, 256), "input=[-1, 2]"), (torch.arange(10.0) % 2, "input=0/1")):
        model = nn.Sequential(nn.Linear(1, 1, bias=False))
        qmodel = qgnn.calibrate(qgnn.quantize_model(model, config=config), (x.unsqueeze(1),))
        assert shown in repr(qmodel[0])
        assert shown in repr(qgnn.pack_model(qmodel)[0])
    config = QuantConfig(bits=8, weight_bits=2)
    assert repr(qgnn.quantize_model(nn.Linear(3, 4), config=config)) == (
        "Linear(in_features=3, out_features=4, bias=True, bits=8 input/2 weight)"
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_copies_and_pickles_are_still_quantized(name: str, form: str, made: Any) -> None:
    model, args = made(name)[form], inputs()
    expected = model(*args)
    assert not torch.equal(expected, made(name)["float"](*args))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in [*twins, copy.deepcopy(twins[1]), model]:
        assert torch.equal(twin(*args), expected)
        for first, second in pairs(model, twin):
            assert type(first) is type(second)
        if isinstance(twin.layer, MessagePassing):
            assert "propagate" in vars(type(twin.layer))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_kinds_are_told_apart(name: str, made: Any) -> None:
    forms = made(name)
    assert is_quantized(forms["converted"])
    assert not is_packed(forms["converted"])
    assert is_packed(forms["packed"])
    assert not packed_layers(forms["converted"])
    assert set(packed_layers(forms["packed"])) & set(quantized_layers(forms["packed"])) == set()
    assert not is_quantized(forms["float"])
    with pytest.raises(ValueError, match=r"plain model .got a packed"):
        qgnn.quantize_model(forms["packed"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_hooks_run_on_every_layer(name: str, form: str) -> None:
    model, seen = Model(LAYERS[name]()), []

    def before(module: nn.Module, args: Any) -> None:
        seen.append(("before", args[0].shape))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        seen.append(("after", output.shape))
        return output + 1

    for layer in (model.first, model.layer, model.head):
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after, with_kwargs=True)
    forms = forms_of(model, inputs())
    args = inputs()
    expected = forms["converted"](*args)
    seen.clear()
    assert torch.equal(forms[form](*args), expected)
    assert [kind for kind, _ in seen] == ["before", "after"] * 3
    assert all(isinstance(shape, torch.Size) for _, shape in seen)


# Parameters of a packed model #########################################################################################


def packed_linear(bias: bool = True, **options: Any) -> tuple[Any, Any]:
    model = nn.Sequential(nn.Linear(WIDTH, 5, bias=bias))
    forms = forms_of(model, (inputs()[0],), **options)
    return forms["converted"][0], forms["packed"][0]


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 4}, {"bits": 8}, {"config": QuantConfig(weight_bits=32)}])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_weight_is_what_the_words_stand_for(bias: bool, options: Any) -> None:
    converted, packed = packed_linear(bias, **options)
    expected, x = converted.weight_quantizer(converted.weight).dequantize(), inputs()[0]
    weight = packed.weight
    assert (weight.shape, weight.dtype, weight.device) == (expected.shape, expected.dtype, expected.device)
    assert not weight.requires_grad
    assert torch.equal(weight, expected)
    assert torch.equal(F.linear(x, weight), F.linear(x, expected))
    assert torch.equal(x @ weight.t(), x @ expected.t())
    assert torch.equal(torch.stack([weight, weight]), torch.stack([expected, expected]))
    assert weight.tolist() == expected.tolist()
    assert (weight.numpy() == expected.numpy()).all()
    for plain in (copy.deepcopy(weight), weight.clone(), weight + 0, pickle.loads(pickle.dumps(weight))):
        assert type(plain) is Tensor
        assert torch.equal(plain.add_(1), expected + 1)
    parameter = next(packed.parameters())
    assert parameter.dtype == torch.float32
    assert parameter.device == expected.device
    assert not any(p.requires_grad for p in packed.parameters())


WRITES: dict[str, Callable[[Any], Any]] = {
    "assignment": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(5, WIDTH))),
    "assignment of a tensor": lambda layer: setattr(layer, "weight", torch.zeros(5, WIDTH)),
    "assignment of data": lambda layer: setattr(layer.weight, "data", torch.zeros(5, WIDTH)),
    "copy to data": lambda layer: layer.weight.data.copy_(torch.zeros(5, WIDTH)),
    "in place": lambda layer: layer.weight.mul_(2),
    "operator": lambda layer: layer.weight.__iadd__(1),
    "element": lambda layer: layer.weight.__setitem__(0, 0.0),
    "view": lambda layer: layer.weight[0].zero_(),
    "transposed": lambda layer: layer.weight.t().fill_(0),
    "detached": lambda layer: layer.weight.detach().zero_(),
    "chunk": lambda layer: layer.weight.chunk(2)[0].zero_(),
    "xavier": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "normal": lambda layer: nn.init.normal_(layer.weight),
    "constant": lambda layer: nn.init.constant_(layer.weight, 1),
    "out": lambda layer: torch.add(torch.ones(5, WIDTH), 1, out=layer.weight),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "set": lambda layer: layer.weight.set_(torch.zeros(5, WIDTH)),
    "gradient": lambda layer: layer.weight.requires_grad_(),
    "reset": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("how", WRITES)
@torch.no_grad()
def test_writes_to_a_packed_weight_raise(how: str) -> None:
    _, packed = packed_linear()
    before = packed.weight.clone()
    with pytest.raises(ValueError, match=r"packed '0'.*(pack it again|\.clone\(\))"):
        WRITES[how](packed)
    assert torch.equal(packed.weight, before)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("APPNP", "LGConv", "SMPropagation")])
def test_reset_parameters(name: str, made: Any) -> None:
    forms = made(name)
    with pytest.raises(ValueError, match=r"no reset_parameters\(\) on the packed"):
        forms["packed"].first.reset_parameters()
    converted = copy.deepcopy(forms["converted"])
    converted.layer.reset_parameters()
    assert not any(site.is_set for _, site in converted.layer.own_quantizers())


@torch.no_grad()
def test_forwards_may_ask_parameters_and_weights() -> None:
    class Asks(Model):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            x = x.to(next(self.parameters()).device, self.layer.lin.weight.dtype)
            return super().forward(x, edge_index).view(-1, self.head.weight.size(0))

    args = inputs()
    forms = forms_of(Asks(GCNConv(WIDTH, WIDTH)), args)
    for form in FORMS[1:]:
        assert torch.equal(forms[form](*args), forms["converted"](*args))


# Modules and parameters with two names ################################################################################


class Listed(nn.Module):
    """Edge networks in a list besides the convolutions that use them, and one convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU()) for _ in range(2)])
        self.convs = nn.ModuleList([pyg.EdgeConv(network) for network in self.networks])
        self.shared = GCNConv(WIDTH, WIDTH)
        self.again = nn.ModuleList([self.shared, self.shared])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in (*self.convs, *self.again):
            x = conv(x, edge_index)
        return x


@torch.no_grad()
def test_a_module_of_two_names_stays_one() -> None:
    args = inputs()
    forms = forms_of(Listed(), args)
    for form in FORMS:
        model: Any = forms[form]
        assert model.convs[0].nn is model.networks[0]
        assert model.again[0] is model.again[1] is model.shared
        assert torch.equal(model(*args), forms["converted"](*args))


class Tied(nn.Module):
    """A weight that two maps share, and a table with it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(NODES, WIDTH)
        self.first, self.second, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, NODES)
        self.second.weight, self.out.weight = self.first.weight, self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.table(index)).relu()))


@torch.no_grad()
def test_tied_weights() -> None:
    index = torch.arange(NODES)
    forms = forms_of(Tied(), (index,))
    converted: Any = forms["converted"]
    assert converted.first.weight is converted.second.weight
    assert converted.out.weight is converted.table.weight
    rows = converted.table(index)  # the shared floats, each as its own site has them
    for form in FORMS:
        model: Any = forms[form]
        assert torch.equal(model(index), converted(index))
        assert torch.equal(model.table(index), rows)
        assert model.table.weight.shape == converted.table.weight.shape


# Layers that never ran ################################################################################################


class Leftover(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.old = pyg.SAGEConv(WIDTH, WIDTH)
        self.projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor, edge_index: Tensor, project: bool = False) -> Tensor:
        x = self.conv(x, edge_index)
        return self.projection(x) if project else self.head(x)


@torch.no_grad()
def test_layers_that_never_ran_stay_float() -> None:
    args, model = inputs(), Leftover().eval()
    converted = qgnn.calibrate(qgnn.quantize_model(model), args).eval()
    with pytest.warns(UserWarning, match="never ran .*'old', .*'projection.0', 'projection.2'; calibrate"):
        packed: Any = qgnn.pack_model(converted)
    reasons = {layer.name: layer.reason for layer in qgnn.summary(packed).layers}
    assert {name for name, reason in reasons.items() if reason == "never ran"} == {
        "old", "old.lin_l", "old.lin_r", "projection.0", "projection.2"
    }  # fmt: skip
    assert type(packed.projection[0]) is nn.Linear
    assert type(packed.old) is pyg.SAGEConv
    for form in (packed, reloaded(packed, model), copy.deepcopy(packed)):
        assert torch.equal(form(*args), converted(*args))
        hidden = converted.conv(*args)
        assert torch.equal(form(*args, project=True), model.projection(hidden))
        assert torch.equal(form.old.lin_l.weight, model.old.lin_l.weight)


@torch.no_grad()
def test_what_ran_in_part_is_packed() -> None:
    x, edge_index = inputs()
    relations = [("a", "to", "b"), ("b", "to", "a"), ("a", "with", "a")]
    hetero = pyg.HeteroConv({r: pyg.SAGEConv((WIDTH, WIDTH), WIDTH) for r in relations})
    nodes = {"a": x, "b": torch.randn(NODES, WIDTH)}
    args = (nodes, {relations[0]: edge_index, relations[1]: edge_index.flip(0)})
    forms = forms_of(hetero, args)
    expected = forms["converted"](*args)
    for form in FORMS:
        found = forms[form](*args)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    degrees = forms_of(Model(pyg.MFConv(WIDTH, WIDTH)), (x, edge_index))  # a weight per degree
    assert any(layer.reason == "never ran" for layer in qgnn.summary(degrees["packed"]).layers)
    sources = forms_of(Sources(), (x, edge_index))  # whose map of targets has none
    for form in FORMS:
        assert torch.equal(sources[form](x, edge_index), sources["converted"](x, edge_index))


class Sources(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.SAGEConv((WIDTH, WIDTH), WIDTH)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv((x, None), edge_index, size=(NODES, NODES))


def test_a_model_that_never_ran_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every range to be set .got none at 'conv.message'"):
        qgnn.pack_model(qgnn.quantize_model(Leftover()))


# Names of the layer's own #############################################################################################


class Named(MessagePassing):
    """A layer whose attributes have names that conversion knows."""

    penalty = 0.25

    def __init__(self) -> None:
        super().__init__(aggr="add")
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.layer_name, self.quant_config, self.smp, self.constraint_state = "mine", {"a": 1}, 0.5, "state"
        self.multiplier = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("slack", torch.tensor(3.0))
        self.force, self.constraint, self.deep_place, self.step_size = 7.0, "c", "place", 0.1

    def smooth(self, x: Tensor) -> Tensor:
        return x * self.smp

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.smooth(self.propagate(edge_index, x=self.lin(x)))
        return x * self.multiplier + self.slack * self.penalty * self.force

    def message(self, x_j: Tensor) -> Tensor:
        return x_j


class NamedConv(GCNConv):
    violation = "v"

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.layer_name, self.quant_config, self.multiplier, self.slack, self.smp = "conv", 1, 2, 3, None


class NamedLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.layer_name, self.quant_config, self.site, self.spec, self.defers = "linear", 2, "s", "p", "d"


@pytest.mark.parametrize("smp", [None, SMPConfig(), SMPConfig(multiplier=0.1)], ids=["none", "idle", "acts"])
@pytest.mark.parametrize("make", [Named, NamedConv, NamedLinear])
@torch.no_grad()
def test_names_of_the_layers_own(make: Any, smp: SMPConfig | None) -> None:
    model, args = Model(make()).eval(), inputs()
    off = QuantConfig(bits=32, smp=smp if smp is None or smp.multiplier == 0 else None)
    assert torch.equal(qgnn.quantize_model(model, config=off)(*args), model(*args))
    forms = forms_of(model, args, config=QuantConfig(bits=8, smp=smp))
    expected = forms["converted"](*args)
    for form in (*(forms[name] for name in FORMS), pickle.loads(pickle.dumps(forms["packed"]))):
        assert torch.equal(form(*args), expected)
        for name, value in vars(model.layer).items():
            if not name.startswith("_") and isinstance(value, (str, int, float, dict)) and name != "training":
                assert getattr(form.layer, name) == value
    twin = qgnn.quantize_model(model, config=QuantConfig(bits=8, smp=smp)).eval()
    twin.load_state_dict(forms["converted"].state_dict())
    assert torch.equal(twin(*args), expected)
    restored = qgnn.restore_model(forms["converted"])
    assert torch.equal(restored(*args), model(*args))
    for first, second in pairs(model, restored):
        assert sorted(vars(first)) == sorted(vars(second))
        assert list(first.state_dict()) == list(second.state_dict())


def test_multipliers_move_whatever_their_name() -> None:
    model, args = Model(Named()), inputs()
    converted: Any = qgnn.quantize_model(model, config=QuantConfig(bits=8, smp=SMPConfig(alpha=0.001)))
    converted.train()(*args)
    state = qgnn.differential_multiplier_step(converted)["layer"]
    assert state.multiplier > 0
    assert float(converted.layer.multiplier.detach()) == 2
    assert "layer.qgnn_multiplier" in converted.state_dict()
    converted.layer.reset_parameters()
    assert float(converted.state_dict()["layer.qgnn_multiplier"]) == 0


def test_names_that_are_needed_are_refused() -> None:
    class Arguments(MessagePassing):
        def quantized_arguments(self) -> None: ...

    class Site(nn.Linear):
        input_quantizer = None

    for make in (Arguments, lambda: Site(2, 2)):
        model = nn.Sequential(make())
        before = {name: copy.copy(value) for name, value in vars(model[0]).items()}
        with pytest.raises(ValueError, match=r"to be free on '0', a (Arguments|Site); rename"):
            qgnn.quantize_model(model, inplace=True)
        assert {name: vars(model[0])[name] for name in before if name != "inspector"} == {
            name: value for name, value in before.items() if name != "inspector"
        }


@torch.no_grad()
def test_names_that_packing_needs_leave_a_layer_in_floats() -> None:
    class Product(nn.Linear):
        def product(self) -> int:
            return 5

    x = inputs()[0]
    forms = forms_of(nn.Sequential(Product(WIDTH, WIDTH), nn.Linear(WIDTH, 2)), (x,))
    assert "product" in qgnn.summary(forms["packed"]).layers[0].reason
    for form in FORMS:
        assert forms[form][0].product() == 5
        assert torch.equal(forms[form](x), forms["converted"](x))


# Weights that are computed ############################################################################################


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.3)
    return prune.l1_unstructured(layer, "bias", 0.5)


@pytest.mark.parametrize(
    "norm",
    [nn.utils.spectral_norm, nn.utils.weight_norm, pruned, parametrizations.weight_norm, parametrizations.orthogonal],
    ids=["spectral_norm", "weight_norm", "pruned", "parametrized", "orthogonal"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_computed_weights_are_packed_as_they_come_out(norm: Any, grad: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, args = Model(norm(nn.Linear(WIDTH, WIDTH))), inputs()
        with torch.set_grad_enabled(grad):
            model.train(grad)(*args)  # as after training, or after an evaluation
    with torch.no_grad():
        forms = forms_of(model, args)
        expected = forms["converted"](*args)
        for form in (*(forms[name] for name in FORMS), copy.deepcopy(forms["packed"])):
            assert torch.equal(form(*args), expected)
        keys = {key.removeprefix("layer.") for key in forms["packed"].state_dict() if key.startswith("layer.w")}
        assert keys == {"words", "weight_scale"}


@torch.no_grad()
def test_computed_tensors_that_a_layer_keeps() -> None:
    model, args = Model(GCNConv(WIDTH, WIDTH)), inputs()
    model.layer.kept = {"last": model.first(args[0]).exp()}  # type: ignore[assignment]
    with torch.enable_grad():
        model.layer.attention = [model.first(args[0]) * 2]  # type: ignore[assignment]
    forms = forms_of(model, args)
    for form in FORMS:
        layer: Any = forms[form].layer
        assert torch.equal(layer.attention[0], model.layer.attention[0])  # type: ignore[index]
        assert not layer.attention[0].requires_grad
