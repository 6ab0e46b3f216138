"""Weights that a hook or a parametrization computes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from packing.forms import FORMS, WIDTH, Model, forms_of, inputs
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch_geometric.nn import GCNConv


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
