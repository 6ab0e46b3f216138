"""Folders of ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packing.test_export import fresh
from torch import Tensor, nn
from torch_geometric.nn import GCN, GCNConv

import qgnn_plugin as qgnn


class Net(qgnn.PretrainedMixin, nn.Module):
    def __init__(self, width: int, hidden: int = 8, *, heads: int = 1, **more: Any) -> None:
        super().__init__()
        self.first, self.second = GCNConv(width, hidden * heads), GCNConv(hidden * heads, more["classes"])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


ARGS = (torch.randn(20, 12), torch.randint(20, (2, 60)))
WIDTHS = {"in_channels": 12, "hidden_channels": 8, "num_layers": 2, "out_channels": 3}


def packed(model: nn.Module, bits: int = 4) -> nn.Module:
    return qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(model, bits=bits), ARGS, method="ranges"))


def test_a_folder_is_read_by_class_and_by_model(tmp_path: Path) -> None:
    model = packed(GCN(**WIDTHS))
    qgnn.save_pretrained(model, tmp_path / "new" / "folder", arguments=WIDTHS)
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"config.json", "model.safetensors"}
    for source in (GCN, GCN(**WIDTHS)):
        read = qgnn.from_pretrained(tmp_path / "new" / "folder", source)
        assert torch.equal(read(*ARGS), model(*ARGS))


def test_config_json_says_what_the_model_is(tmp_path: Path) -> None:
    qgnn.save_pretrained(packed(GCN(**WIDTHS), 2), tmp_path, arguments=WIDTHS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["library_name"], config["model_class"], config["arguments"]) == ("qgnn_plugin", "GCN", WIDTHS)
    assert qgnn.QuantConfig.from_dict(config["quantization"]).bits == 2
    mixed = qgnn.QuantConfig(bits=4, overrides={"convs.1*": {"bits": 8}})
    qmodel = qgnn.calibrate(qgnn.quantize_model(GCN(**WIDTHS), config=mixed), ARGS)
    qgnn.save_pretrained(qgnn.pack_model(qmodel), tmp_path)
    layers = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert {name: layer["bits"] for name, layer in layers.items()} == {
        "convs.0": 4, "convs.0.lin": 4, "convs.1": 8, "convs.1.lin": 8,
    }  # fmt: skip


def test_a_mixin_remembers_its_arguments(tmp_path: Path) -> None:
    model: Any = packed(Net(12, heads=2, classes=3))
    model.save_pretrained(tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["arguments"]
    assert arguments == {"width": 12, "heads": 2, "classes": 3}
    assert torch.equal(Net.from_pretrained(tmp_path)(*ARGS), model(*ARGS))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'width'"):
        Net()  # type: ignore[call-arg]


def test_a_fresh_process_reads_it(tmp_path: Path) -> None:
    model = packed(GCN(**WIDTHS))
    qgnn.save_pretrained(model, tmp_path, arguments=WIDTHS)
    torch.save((ARGS, model(*ARGS)), tmp_path / "case.pt")
    code = """
        import sys, torch, qgnn_plugin
        from torch_geometric.nn import GCN
        args, expected = torch.load(sys.argv[1] + "/case.pt")
        print(torch.equal(qgnn_plugin.from_pretrained(sys.argv[1], GCN)(*args), expected))
    """
    assert fresh(code, tmp_path).strip() == "True"


def test_what_cannot_be_read_or_written_says_why(tmp_path: Path) -> None:
    model = packed(GCN(**WIDTHS))
    with pytest.raises(ValueError, match=r"that JSON can hold.*from_pretrained\(folder, model\)"):
        qgnn.save_pretrained(model, tmp_path, arguments={"act": torch.relu})
    with pytest.raises(ValueError, match="that JSON can hold"):
        qgnn.save_pretrained(model, tmp_path, arguments={"dropout": float("nan")})
    for arguments in ([1, 2], {1: 2}, "x"):
        with pytest.raises(TypeError, match="arguments"):
            qgnn.save_pretrained(model, tmp_path, arguments=arguments)
    with pytest.raises(ValueError, match="pack it first"):
        qgnn.save_pretrained(GCN(**WIDTHS), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="written by save_pretrained"):
        qgnn.from_pretrained(tmp_path, GCN)
    qgnn.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r"arguments of GCN.*arguments=\.\.\."):
        qgnn.from_pretrained(tmp_path, GCN)
    for text, message in (("{", "Expected JSON"), ('{"format": 9}', "format 1 of qgnn_plugin")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            qgnn.from_pretrained(tmp_path, GCN)
