"""Parts compiled by torch.jit.script, before conversion and after it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from core.support import NODES, OUT, WIDTH, features, graph
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, GraphConv, MessagePassing

import qgnn_plugin as qgnn


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2 * WIDTH, 16), nn.BatchNorm1d(16, eps=1e-3), nn.LeakyReLU(0.3), nn.Dropout(0.2),
        nn.Sequential(nn.LayerNorm(16), nn.Linear(16, OUT, bias=False), nn.GELU("tanh")),
    )  # fmt: skip


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2 * WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + 1


class Edges(MessagePassing):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.relation = torch.jit.script(inner)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        return self.relation(torch.cat([x_i, x_j], -1))


def test_what_was_compiled_of_known_layers_is_converted() -> None:
    x, edge_index = features(), graph()
    model = Edges(mlp()).eval()
    expected, state = model(x, edge_index), set(model.state_dict())
    off = qgnn.quantize_model(model, 32)
    torch.testing.assert_close(off(x, edge_index), expected)
    qmodel: Any = qgnn.calibrate(qgnn.quantize_model(model, 8), (x, edge_index)).eval()
    assert isinstance(model.relation, torch.jit.ScriptModule)
    assert torch.equal(model(x, edge_index), expected)
    assert state <= set(qmodel.state_dict())
    assert {"relation.0.weight_quantizer", "relation.4.1.weight_quantizer"} <= set(qgnn.quantizers(qmodel))
    assert float((qmodel(x, edge_index) - expected).norm() / expected.norm()) < 0.1
    packed = qgnn.pack_model(qmodel)
    assert torch.equal(packed(x, edge_index), qmodel(x, edge_index))
    optimizer = torch.optim.Adam(qmodel.parameters())
    qmodel.train()(x, edge_index).sum().backward()
    optimizer.step()
    restored: Any = qgnn.restore_model(copy.deepcopy(qmodel)).eval()
    assert isinstance(restored.relation, torch.jit.ScriptModule)
    for key, value in restored.state_dict().items():
        assert torch.equal(value, qmodel.state_dict()[key])
    torch.jit.script(restored.relation)


def test_packed_files_of_compiled_parts(tmp_path: Any) -> None:
    x, edge_index = features(), graph()
    model = Edges(mlp()).eval()
    packed = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(model), (x, edge_index)).eval())
    qgnn.save_packed(packed, tmp_path / "model.safetensors")
    loaded = qgnn.load_packed(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(x, edge_index), packed(x, edge_index))
    assert isinstance(model.relation, torch.jit.ScriptModule)


def test_what_was_compiled_of_other_code_stays_float_and_is_named() -> None:
    x, edge_index = features(), graph()
    with pytest.warns(UserWarning, match=r"Only 0% of the weights of Edges .* relation \(Own, 144\) stay float"):
        qmodel = qgnn.quantize_model(Edges(Own()))
    assert "relation (Own, 144 weights): compiled by torch.jit.script" in str(qgnn.summary(qmodel))
    assert all(p.is_leaf for p in qmodel.parameters())
    torch.optim.Adam(qmodel.parameters())
    qgnn.calibrate(qmodel, (x, edge_index)).eval()
    packed = qgnn.pack_model(qmodel)
    torch.testing.assert_close(packed(x, edge_index), qmodel(x, edge_index))
    qgnn.restore_model(qmodel)(x, edge_index)


def test_whole_models_loaded_ones_and_errors() -> None:
    x = torch.randn(6, 2 * WIDTH)
    file = io.BytesIO()
    scripted = torch.jit.script(mlp().eval())
    torch.jit.save(scripted, file)
    file.seek(0)
    for given in (scripted, torch.jit.load(file)):
        qmodel = qgnn.calibrate(qgnn.quantize_model(given, 8), [(x,)]).eval()
        assert len(qgnn.quantizers(qmodel)) == 4
        assert isinstance(qgnn.restore_model(qmodel), torch.jit.ScriptModule)
        with pytest.raises(ValueError, match="not compiled with inplace=True"):
            qgnn.quantize_model(given, inplace=True)
    model = Edges(mlp())
    with pytest.raises(ValueError, match="matches no layer"):
        qgnn.quantize_model(model, include="nothing", inplace=True)
    assert isinstance(model.relation, torch.jit.ScriptModule)
    weight = next(model.relation.parameters())
    qgnn.quantize_model(model, inplace=True)
    assert model.relation[0].weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("conv", [GCNConv(WIDTH, OUT), GraphConv(WIDTH, OUT), nn.Linear(WIDTH, OUT)])
def test_compiling_a_converted_or_packed_model_is_refused(conv: nn.Module) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.conv(x, edge_index) if isinstance(self.conv, MessagePassing) else self.conv(x)

    qmodel = qgnn.calibrate(qgnn.quantize_model(Model()), (features(NODES), graph())).eval()
    for model in (qmodel, qgnn.pack_model(qmodel)):
        with pytest.raises(TypeError, match=r"plain model for torch\.jit\.script .*restore_model"):
            torch.jit.script(model)
