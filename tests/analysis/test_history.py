"""Series of ranges and multipliers, and their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.analysis.history import History, quantization_series


def test_series_are_the_ends_of_ranges() -> None:
    model = qgnn.quantize_model(GCN(4, 8, 2, 3), bits=4)
    assert not [name for name in quantization_series(model) if "/low/" in name]  # nothing is set yet
    x, edge_index = torch.randn(9, 4), torch.tensor([[0, 1, 2], [1, 2, 0]])
    qgnn.calibrate(model, (x, edge_index))
    found = quantization_series(model)
    scale, lower = model.convs[1].message_quantizer.range()
    assert found["qgnn/low/convs.1.message"] == pytest.approx(float(lower.min()))
    assert found["qgnn/high/convs.1.message"] == pytest.approx(float((lower + 15 * scale).max()))
    assert found["qgnn/lambda/convs.0"] == 0
    assert quantization_series(GCN(4, 8, 2, 3)) == {}


def test_files_round_trip(tmp_path: Path) -> None:
    history = History()
    history.add(1, {"qgnn/low/a": -0.1, "qgnn/high/a": 1 / 3})
    history.add(3, {"qgnn/low/a": -0.2})
    history.save(tmp_path / "h.csv")
    loaded = History.load(tmp_path / "h.csv")
    assert loaded.series == history.series
    assert loaded.with_prefix("qgnn/low/")["a"].steps == [1, 3]


@pytest.mark.parametrize("text", ["step,loss\n1,2\n", "qgnn/low/a\n1\n", ""])
def test_files_of_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text(text)
    with pytest.raises(ValueError, match="columns that begin with 'qgnn/'"):
        History.load(tmp_path / "h.csv")
