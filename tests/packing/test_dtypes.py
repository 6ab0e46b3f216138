"""Models of other float dtypes, and float32 models while torch's default dtype is another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from core.support import CONVS, OUT, WIDTH, features, graph, quantized, relative
from torch import Tensor, nn
from torch_geometric.nn import GCN, GraphConv, TransformerConv

import qgnn_plugin as qgnn

DTYPES = (torch.float64, torch.bfloat16, torch.float16)
LAYERS = {
    **CONVS,
    "Linear": lambda: nn.Linear(WIDTH, OUT),
    "GraphConv": lambda: GraphConv(WIDTH, OUT),
    "TransformerConv": lambda: TransformerConv(WIDTH, OUT),
    "GCN": lambda: GCN(WIDTH, OUT, 2),
}
WITHOUT_WEIGHTS = ("APPNP", "APPNP cached", "LGConv")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _arguments(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = features().to(dtype)
    return (x,) if name == "Linear" else (x, graph())


def _run(layer: nn.Module, args: tuple[Tensor, ...], path: Path, packs: bool = True) -> None:
    """Convert, calibrate, train, pack, save and load."""
    with torch.no_grad():
        expected = layer.eval()(*args)
    qmodel = quantized(layer, *args)
    out = qmodel(*args)
    assert out.dtype == expected.dtype
    assert relative(out, expected) < 0.1
    with qgnn.compressed_activations():
        loss = qmodel.train()(*args).float().square().mean()
    if any(p.requires_grad for p in qmodel.parameters()):  # not of a layer without weights on its own
        loss.backward()
    assert all(p.dtype == q.dtype for p, q in zip(layer.parameters(), qmodel.parameters(), strict=False))
    qmodel.eval()
    if not packs:
        return
    model = qgnn.pack_model(qmodel)
    assert torch.equal(model(*args), out)
    qgnn.save_packed(model, path)
    assert torch.equal(qgnn.load_packed(path, layer)(*args), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_models_of_another_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _run(LAYERS[name]().to(dtype), _arguments(name, dtype), tmp_path / "packed", name not in WITHOUT_WEIGHTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_models_made_in_another_default_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with default_dtype(dtype):
        _run(LAYERS[name](), _arguments(name, dtype), tmp_path / "packed")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_float32_models_in_another_default_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layer, args = LAYERS[name](), _arguments(name, torch.float32)
    with default_dtype(dtype):
        _run(layer, args, tmp_path / "packed")


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_packed_propagations_say_that_they_take_float32(name: str) -> None:
    args = _arguments(name, torch.float64)
    model = qgnn.pack_model(quantized(LAYERS[name](), *args))
    with pytest.raises(TypeError, match=r"Expected a float32 tensor at .*\.float\(\)"):
        model(*args)
