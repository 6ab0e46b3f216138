"""Names of the layer's own that conversion and packing use as well."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from packing.forms import FORMS, WIDTH, Model, forms_of, inputs, pairs
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, MessagePassing

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig


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


class NamedWeight(MessagePassing):
    """With private names, as implementations of graph attention have them."""

    def __init__(self) -> None:
        super().__init__(aggr="add")
        self._weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self._config, self._width, self._force = {"gain": 2.0}, 0.5, 3.0

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.propagate(edge_index, x=x @ self._weight)
        return out * self._config["gain"] * self._width + self._force

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
@pytest.mark.parametrize("make", [Named, NamedWeight, NamedConv, NamedLinear])
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


class Validated(nn.Linear):
    """A layer that extends methods of torch's, as those do whose children are made once their sizes are known."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.drop, self.asked = nn.Dropout(0.0), set()

    def named_children(self) -> Any:
        self.asked.add("named_children")
        return super().named_children()

    def children(self) -> Any:
        self.asked.add("children")
        return reversed(list(super().children()))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.add("_apply")
        return super()._apply(*args, **kwargs)


class ValidatedWeight(Validated):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("make", [Validated, ValidatedWeight])
@torch.no_grad()
def test_methods_of_torch_that_a_layer_extends(make: Any) -> None:
    model, args = Model(make()).eval(), inputs()
    model.layer.extra = nn.Identity()
    forms = forms_of(model, args)
    expected = forms["converted"](*args)
    for form in FORMS:
        layer: Any = forms[form].layer
        assert torch.equal(forms[form](*args), expected)
        for ask, seen in {"named_children": dict, "children": list}.items():
            layer.asked.clear()
            theirs, own = seen(getattr(layer, ask)()), seen(getattr(model.layer, ask)())
            assert ask in layer.asked
            assert [*map(repr, theirs)] == [*map(repr, own)]
        layer.asked.clear()
        layer.to("cpu")
        assert "_apply" in layer.asked
        assert form == "converted" or qgnn.summary(forms[form]).layers[1].reason is None


def test_names_that_are_needed_are_refused() -> None:
    class Arguments(MessagePassing):
        def quantized_arguments(self) -> None: ...

    class Site(nn.Linear):
        input_quantizer = None

    class Constant(nn.Linear):
        units = 4  # of the class, where the mixin's would be read

    class Kept(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self._conversion = "mine"

    for make in (Arguments, lambda: Site(2, 2), lambda: Constant(2, 2), Kept):
        model = nn.Sequential(make())
        before = {name: copy.copy(value) for name, value in vars(model[0]).items()}
        with pytest.raises(ValueError, match=r"to be free on '0', a (Arguments|Site|Constant|Kept); rename"):
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
