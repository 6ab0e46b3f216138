"""Codes of weights that are not the nearest ones, in every kind of layer: packed as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.support import CONVS, NODES, OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.nn import RGCNConv, TransformerConv

import qgnn_plugin as qgnn
from qgnn_plugin.matching import weight_sites


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


MODELS: dict[str, tuple[Any, Any]] = {
    **{name: (make, lambda: (features(), graph())) for name, make in CONVS.items()},
    "TransformerConv": (lambda: TransformerConv(WIDTH, 4, heads=2), lambda: (features(), graph())),
    "RGCNConv": (
        lambda: RGCNConv(WIDTH, OUT, 3, num_bases=2),
        lambda: (features(), graph(), torch.arange(graph().size(1)) % 3),
    ),
    "MultiheadAttention": (Attends, lambda: (features(),)),
    "Bilinear": (lambda: nn.Bilinear(WIDTH, WIDTH, 3), lambda: (features(), features())),
    "Embedding": (lambda: nn.Embedding(NODES, WIDTH), lambda: (torch.arange(3 * NODES) % NODES,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_as_chosen(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    args = inputs()
    qmodel = qgnn.quantize_model(make().eval(), config=qgnn.QuantConfig(bits=2)).eval()
    qgnn.calibrate(qmodel, [args], method="ranges", forward=lambda model, batch: model(*batch))
    with torch.no_grad():
        nearest, sites = qmodel(*args), weight_sites(qmodel)
        for site in sites:
            site.quantizer.shift = torch.randint(-1, 2, site.matrix().shape, dtype=torch.int16)
        chosen = qmodel(*args)
        if sites:
            assert not torch.allclose(chosen, nearest)
        torch.testing.assert_close(qgnn.pack_model(qmodel)(*args), chosen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["RGCNConv", "Bilinear", "MultiheadAttention"])
def test_weights_of_three_dimensions_are_chosen_for(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    args, model = inputs(), make().eval()
    qmodel = qgnn.quantize_model(model, config=qgnn.QuantConfig(bits=2)).eval()
    qgnn.calibrate(qmodel, [args], method="outputs", steps=40, forward=lambda model, batch: model(*batch))
    assert any(q.shift is not None for q in qgnn.quantizers(qmodel).values())
    with torch.no_grad():
        torch.testing.assert_close(qgnn.pack_model(qmodel)(*args), qmodel(*args), rtol=1e-5, atol=1e-5)
