"""Models by name, and what of that a file may decide."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch_geometric.nn import GAT, GCNConv

from qgnn_plugin.cli.building import Origin, model_class, origin_of
from qgnn_plugin.cli.loading import Readers


def _options(**changes: Any) -> Namespace:
    return Namespace(**{"model": "GCN", "hidden": 16, "layers": 3, "dropout": 0.1, "model_args": {}, **changes})


def test_arguments_go_by_the_names_that_the_class_has() -> None:
    model = origin_of(_options(model="GAT", model_args={"v2": True}), 5, 4).build()
    assert isinstance(model, GAT)
    assert (model.in_channels, model.hidden_channels, model.num_layers, model.out_channels) == (5, 16, 3, 4)
    assert model.convs[0].heads == 8
    assert type(model.convs[0]).__name__ == "GATv2Conv"
    layer = origin_of(_options(model="GCNConv"), 5, 4).build()  # has no hidden channels
    assert isinstance(layer, GCNConv)
    assert (layer.in_channels, layer.out_channels) == (5, 4)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"GCN2Conv requires .got none for channels, alpha"):
        origin_of(_options(model="GCN2Conv"), 5, 4)
    with pytest.raises(ValueError, match=r"arguments that .*GCN takes"):
        origin_of(_options(model_args={"nonsense": 1, "hidden_channels": 8}), 5, 4).build()


def test_import_paths_see_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self, num_features, num_classes):\n"
    (tmp_path / "my_own_net.py").write_text(source + "        super().__init__(num_features, num_classes)\n")
    monkeypatch.chdir(tmp_path)
    origin = origin_of(_options(model="my_own_net.Net"), 5, 4)
    assert origin.arguments == {"num_features": 5, "num_classes": 4}
    model = origin.build()
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (4, 5)


def test_files_import_nothing_but_pyg() -> None:
    """A file is data: the class that it names is only imported where that is PyG's own, or the user asks for it."""
    readers = Readers(_options(model=None), 5, 4)
    pyg = {"class": "torch_geometric.nn.models.basic_gnn.GCN", "arguments": {"in_channels": 5}}
    assert readers.origin(Path("f"), pyg).class_path.endswith("GCN")
    with pytest.raises(ValueError, match=r"names os.system, which is no class of PyG: .* pass --model os.system"):
        readers.origin(Path("f"), {"class": "os.system", "arguments": {}})
    for nonsense in ("text", {"class": 3, "arguments": {}}, {"class": "a.B"}):
        with pytest.raises(ValueError, match="class and arguments of its model"):
            readers.origin(Path("f"), nonsense)


def test_origins_are_plain_values() -> None:
    origin = origin_of(_options(), 5, 4)
    assert Origin.of_file(origin.to_dict()) == origin
    assert model_class(origin.class_path).__name__ == "GCN"
