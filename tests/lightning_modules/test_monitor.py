"""Ranges and multipliers reach the loggers of Lightning, and come back from their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from graphs import erdos_renyi
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch_geometric.data import Data
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.analysis.history import History, quantization_series
from qgnn_plugin.lightning_modules import (
    DifferentialMultiplier,
    NodeDataModule,
    QuantizationMonitor,
    QuantizedNodeClassifier,
)


def _data() -> Data:
    mask = torch.arange(40) % 2 == 0
    edges = erdos_renyi(40, 160).edge_index
    data = Data(x=torch.rand(40, 6), edge_index=edges, y=torch.arange(40) % 3)
    return Data(**data.to_dict(), train_mask=mask, val_mask=~mask, test_mask=~mask)


def _train(tmp_path: Path, steps: int, monitor: QuantizationMonitor) -> torch.nn.Module:
    data = _data()
    qmodel = qgnn.calibrate(qgnn.quantize_model(GCN(6, 8, 2, 3), bits=4), data)
    trainer = pl.Trainer(
        max_epochs=steps,
        callbacks=[DifferentialMultiplier(log=False), monitor],
        logger=[CSVLogger(tmp_path, "csv", version=0), TensorBoardLogger(tmp_path, "board", version=0)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(QuantizedNodeClassifier(qmodel), NodeDataModule(data))
    return qmodel


@pytest.mark.filterwarnings("ignore")
def test_series_reach_csv_and_tensorboard(tmp_path: Path) -> None:
    qmodel = _train(tmp_path, 4, QuantizationMonitor(2, _data()))
    history = History.load(tmp_path / "csv" / "version_0" / "metrics.csv")
    last = {f"qgnn/{kind}/{name}" for kind in ("error", "energy", "float_energy") for name in ("convs.0", "convs.1")}
    # The names in a LightningModule have its attribute in front; the last values are those of the trained model.
    for name, value in quantization_series(qmodel).items():
        prefix, kind, site = name.split("/")
        series = history.series[f"{prefix}/{kind}/model.{site}"]
        assert series.steps == [2, 4]
        if kind != "violation":  # measured in the last training step
            assert series.values[-1] == pytest.approx(value)
    assert {name for name in history.series if name.split("/")[1] in ("error", "energy", "float_energy")} == last

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board" / "version_0")).Reload()
    assert last <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("qgnn/high/model.convs.0.message")] == [2, 4]
    assert "qgnn/values/convs.0.message" in events.Tags()["histograms"]


def test_no_step_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="every_n_steps >= 1"):
        QuantizationMonitor(0)
