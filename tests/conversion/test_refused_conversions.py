"""What conversion refuses, before anything is changed."""

import pytest
import torch
import torch.nn.functional as F
from core.support import NODES, OUT, WIDTH, Plain, assert_same_state, features, graph, names, quantized, state
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, Linear, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.layers import register_layer
from qgnn_plugin.layers.linear import QuantizedLinear


class Unconvertible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)


class Tripling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias)


class Tripled(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Tripling(3, 3), nn.LayerNorm(3))


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
        (Tripled, {}, ValueError, r"only.* Tripling \(a Linear that computes something else\).*register_layer"),
        (Plain, {"include": "convs", "exclude": "convs.?"}, ValueError, "Nothing to convert.*encoder, convs.0"),
        (Plain, {"include": "encodr"}, ValueError, "'encodr' matches no layer; did you mean 'encoder'.*heads.main"),
        (Plain, {"exclude": ["encoder", "heads.mian"]}, ValueError, "did you mean 'heads.main'"),
        (Plain, {"include": GATConv}, ValueError, "GATConv.*matches no layer. Layers that can be converted: encoder"),
        (Plain, {"include": "norm"}, ValueError, "'norm' matches no layer"),
        (Plain, {"bits": 3}, ValueError, r"'bits' to be one of 1, 2, 4, 8 or 32 = off \(got 3\)"),
        (Plain, {"bits": 2, "config": QuantConfig(bits=8)}, ValueError, "'bits' or 'config', not both"),
        (Plain, {"bits": 4, "config": QuantConfig(bits=8)}, ValueError, r"not both \(got bits=4 and .* of 8 bits"),
        (Plain, {"bits": 4, "config": QuantConfig(bits=4)}, ValueError, "not both"),
        (Plain, {"bits": QuantConfig(bits=4), "config": QuantConfig(bits=4)}, ValueError, "not both"),
        (Plain, {"config": {"bits": 8}}, TypeError, r"a QuantConfig as 'config' \(got dict\).*from_dict"),
        (Plain, {"bits": "4"}, ValueError, r"'bits' to be one of 1, 2, 4, 8 or 32 = off \(got '4'\)"),
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
