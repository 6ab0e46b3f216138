"""Files of published versions load, and what they hold computes what it did."""

from __future__ import annotations

import copy
import gzip
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.models import CLASSES, INTEGER, MODELS, inputs
from torch import Tensor

import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import QuantizedNodeClassifier
from qgnn_plugin.packing.model import packed_layers

VERSIONS = sorted(path for path in Path(__file__).parent.iterdir() if path.name.startswith("v") and path.is_dir())


def load(path: Path, weights_only: bool = True) -> Any:
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=weights_only)


def check(name: str, found: Tensor, expected: Tensor) -> None:
    """Bitwise where all that is summed are integers; elsewhere the order of float sums is the machine's."""
    if name in INTEGER:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models(name: str, folder: Path) -> None:
    """As a packed file, as a state dict in a new conversion, and as a pickle, which packs to the same."""
    build, config = MODELS[name]
    converted, packed = load(folder / "expected.pt.gz")[name]
    check(name, qgnn.load_packed(folder / f"{name}.safetensors", build())(*inputs()), packed)
    qmodel = qgnn.quantize_model(build(), config=config).eval()
    qmodel.load_state_dict(load(folder / f"{name}.state.pt.gz"))
    for model in (qmodel, load(folder / f"{name}.model.pt.gz", weights_only=False)):
        check(name, model(*inputs()), converted)
        check(name, qgnn.pack_model(model)(*inputs()), packed)


@pytest.mark.parametrize("name", ["gcn", "gat", "hops", "layer", "mixed"])
@torch.no_grad()
def test_pickles_of_packed_models(name: str, folder: Path) -> None:
    """Of the time when packed layers were no subclasses of the layer's own class, which they are from then on."""
    model, (_, packed) = (
        load(folder / f"{name}.packed.pt.gz", weights_only=False),
        load(folder / "expected.pt.gz")[name],
    )
    check(name, model(*inputs()), packed)
    check(name, copy.deepcopy(model)(*inputs()), packed)
    for layer in packed_layers(model).values():
        assert isinstance(layer, type(layer).float_class)


@pytest.mark.parametrize("name", ["embeddings_node", "embeddings_tensor"])
def test_embeddings(name: str, folder: Path) -> None:
    table = qgnn.PackedEmbeddings.load(folder / f"{name}.safetensors")
    torch.testing.assert_close(table.dequantize(), load(folder / "expected.pt.gz")[name], rtol=0, atol=0)


@torch.no_grad()
def test_lightning_checkpoint(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "classifier.ckpt"
    path.write_bytes(gzip.decompress((folder / "classifier.ckpt.gz").read_bytes()))
    build, config = MODELS["gcn"]
    model = qgnn.quantize_model(build(), config=config)
    task = QuantizedNodeClassifier.load_from_checkpoint(path, model=model, num_classes=CLASSES)
    assert torch.equal(task.eval()(*inputs()), load(folder / "expected.pt.gz")["classifier"])
