"""A converted, packed or loaded layer is still the user's layer: class, name, attributes, hooks, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from packing.forms import FORMS, LAYERS, Model, forms_of, inputs, pairs
from torch import nn
from torch_geometric.nn import GCNConv, MessagePassing

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.conversion.converted import is_quantized, quantized_layers
from qgnn_plugin.layers.base import QuantizedLayer
from qgnn_plugin.packing import PackedLayer
from qgnn_plugin.packing.model import is_packed, packed_layers


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
