"""Weights of packed layers: what the words stand for, read only."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packing.forms import FORMS, LAYERS, WIDTH, Model, forms_of, inputs
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from qgnn_plugin import QuantConfig


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
