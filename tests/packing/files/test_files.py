"""``save_packed`` and ``load_packed``: round trips, damage, and files that do not belong."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from packing.cases import ATTENTION, CLASSES, FEATURES, HIDDEN, MODELS, Mixed, Shared, packed_pair
from safetensors.torch import save_file
from torch import nn
from torch_geometric.nn import GAT, GCN

import qgnn_plugin
from qgnn_plugin import SMPConfig
from qgnn_plugin.packing import packed_layers
from qgnn_plugin.packing.files import container

BUILD = {**MODELS, **ATTENTION, "shared": Shared, "mixed": Mixed}


@pytest.mark.parametrize(
    "config",
    [
        {"bits": 2, "output_bits": 8},
        {"bits": 4, "granularity": "channel", "weight_levels": "affine", "truncation": "sbt"},
        {"bits": 8, "granularity": "node", "smp": SMPConfig(multiplier=0.3)},
        {"bits": 2, "granularity": "row", "message_levels": "half"},
        {"bits": 4, "message_bits": 32, "overrides": {"*conv*": {"weight_bits": 8}}},
    ],
    ids=["plain", "channel", "node", "row", "mixed bits"],
)
@pytest.mark.parametrize("name", BUILD)
def test_round_trip_is_bitwise(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    if "overrides" in config and name in ("appnp", "shared"):
        config = {k: v for k, v in config.items() if k != "overrides"}
    _, packed, args = packed_pair(name, "rows", **config)
    path = tmp_path / "model.safetensors"
    qgnn_plugin.save_packed(packed, path)
    loaded = qgnn_plugin.load_packed(path, BUILD[name]())
    assert torch.equal(loaded(*args), packed(*args))
    assert loaded._packed_specs == packed._packed_specs
    assert not any(p.requires_grad for p in loaded.parameters())
    assert str(qgnn_plugin.summary(loaded)) == str(qgnn_plugin.summary(packed))
    again = tmp_path / "again.safetensors"
    qgnn_plugin.save_packed(loaded, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    qgnn_plugin.save_packed(packed_pair("gcn", bits=2)[1], path)
    return path


def test_every_damaged_byte_of_the_data_is_found(saved: Path) -> None:
    data = saved.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for at in range(start, len(data), max(1, (len(data) - start) // 40)):
        saved.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match="checksum of tensor"):
            qgnn_plugin.load_packed(saved, MODELS["gcn"]())


def test_damaged_header_is_found(saved: Path) -> None:
    data = saved.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    model = MODELS["gcn"]()
    for at in range(0, header, 61):
        saved.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"damaged|Expected|Unknown"):
            qgnn_plugin.load_packed(saved, model)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_file(saved: Path, keep: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="truncated"):
        qgnn_plugin.load_packed(saved, MODELS["gcn"]())


def test_foreign_files(tmp_path: Path, saved: Path) -> None:
    model = MODELS["gcn"]()
    path = tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="other"):
        qgnn_plugin.load_packed(path, model)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="from elsewhere"):
        qgnn_plugin.load_packed(path, model)
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        qgnn_plugin.load_packed(path, model)
    with pytest.raises(ValueError, match="kind 'embeddings'"):
        qgnn_plugin.PackedEmbeddings.load(saved)


def test_another_layout_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "LAYOUT_VERSION", 99)
    with pytest.raises(ValueError, match="layout 99"):
        qgnn_plugin.load_packed(saved, MODELS["gcn"]())


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (lambda: GAT(FEATURES, HIDDEN, 2, CLASSES), "the model: GCN in the file, GAT"),
        (lambda: GCN(FEATURES, HIDDEN, 3, CLASSES), r"setting 'num_layers' of the model, a GCN: 2 in the file, 3 in"),
        (lambda: GCN(FEATURES, HIDDEN, 1, CLASSES), r"layer 'convs.1.*no such layer"),
        (lambda: GCN(FEATURES, HIDDEN, 2, CLASSES), r"setting 'norm' of the model.*'batch_norm' in the file, None in"),
        (lambda: GCN(FEATURES, 40, 2, CLASSES, norm="batch_norm"), r"'hidden_channels' of the model.*12 in the file"),
    ],
)
def test_wrong_architecture_names_the_first_difference(saved: Path, model: Any, difference: str) -> None:
    with pytest.raises(ValueError, match=difference):
        qgnn_plugin.load_packed(saved, model())


def test_wrong_arguments(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pack_model"):
        qgnn_plugin.save_packed(MODELS["gcn"](), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="float architecture"):
        qgnn_plugin.load_packed(saved, qgnn_plugin.quantize_model(MODELS["gcn"]()))
    with pytest.raises(TypeError, match="float model"):
        qgnn_plugin.load_packed(saved, {"a": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [io.BytesIO(), 3, None, ["a"]], ids=["file", "number", "none", "list"])
def test_paths_are_paths(saved: Path, path: Any) -> None:
    packed = qgnn_plugin.load_packed(saved, MODELS["gcn"]())
    graph = torch.randn(3, FEATURES), torch.tensor([[0, 1], [1, 2]])
    table = qgnn_plugin.PackedEmbeddings.from_float(torch.randn(20, 8), bits=4)
    calls = [
        lambda: qgnn_plugin.save_packed(packed, path),
        lambda: qgnn_plugin.load_packed(path, MODELS["gcn"]()),
        lambda: qgnn_plugin.save_pretrained(packed, path),
        lambda: qgnn_plugin.from_pretrained(path, MODELS["gcn"]()),
        lambda: qgnn_plugin.export_onnx(packed, graph, path),
        lambda: qgnn_plugin.export_package(packed, graph, path),
        lambda: table.save(path),
        lambda: qgnn_plugin.PackedEmbeddings.load(path),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=rf"Expected a path.*\(got {type(path).__name__}\)"):
            call()


@pytest.mark.parametrize("model", [None, GCN, {"a": 1}, torch.zeros(1)], ids=lambda model: type(model).__name__)
def test_models_are_modules(tmp_path: Path, model: Any) -> None:
    for call in (qgnn_plugin.packed_bytes, lambda m: qgnn_plugin.save_packed(m, tmp_path / "new")):
        with pytest.raises(TypeError, match=rf"made by pack_model \(got a {type(model).__name__}\)"):
            call(model)


def test_writing_is_atomic(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    packed = packed_pair("gcn", bits=8)[1]

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            qgnn_plugin.save_packed(packed, saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_loaded_model_survives_a_new_file(saved: Path) -> None:
    _, packed, args = packed_pair("gcn", bits=2)
    qgnn_plugin.save_packed(packed, saved)
    loaded = qgnn_plugin.load_packed(saved, MODELS["gcn"](), verify=False)
    qgnn_plugin.save_packed(packed_pair("gcn", bits=8)[1], saved)
    assert torch.equal(loaded(*args), packed(*args))


def test_a_file_is_as_small_as_its_bits(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    for bits, ratio in ((2, 11.0), (4, 6.5)):
        qmodel = qgnn_plugin.quantize_model(model, bits=bits).eval()
        qgnn_plugin.calibrate(qmodel, [torch.randn(64, 256)], forward=lambda m, x: m(x))
        packed = qgnn_plugin.pack_model(qmodel)
        path = tmp_path / "linear.safetensors"
        qgnn_plugin.save_packed(packed, path)
        assert qgnn_plugin.packed_bytes(packed).ratio > ratio
        assert qgnn_plugin.packed_bytes(packed).float / path.stat().st_size > ratio


@pytest.mark.parametrize("name", ["gcn", "sage", "gat", "gatv2", "gin", "appnp"])
def test_packed_models_change_neither_dtype_nor_mode(name: str) -> None:
    """By the layer's name; devices and memory may change."""
    _, packed, args = packed_pair(name, bits=4)
    expected = packed(*args)
    for change in ("half", "double", "bfloat16"):
        with pytest.raises(ValueError, match=r"packed \w+ to stay in float32 \(got (float|bfloat)(16|64)"):
            getattr(packed, change)()
    with pytest.raises(ValueError, match="to stay in float32"):
        packed.to(torch.float16)
    for layer in packed_layers(packed).values():
        with pytest.raises(ValueError, match=rf"packed '{layer._packed.spec.name}' to stay in float32"):
            layer.half()
    for same in (packed.float(), packed.cpu(), packed.to(torch.float32), packed.share_memory()):
        assert torch.equal(same(*args), expected)
    assert all(t.is_meta for t in packed_pair(name, bits=4)[1].to("meta").state_dict().values())
    with pytest.raises(RuntimeError, match=r"packed '.*' in eval mode \(got training mode\).*\.eval\(\)"):
        packed.train()(*args)
    assert torch.equal(packed.eval()(*args), expected)
