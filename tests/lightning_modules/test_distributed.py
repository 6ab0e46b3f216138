"""Two processes on one machine: multipliers agree, and are those of the joint batch."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from torch_geometric.data import Batch
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import DifferentialMultiplier, QuantizedNodeClassifier


def first(batches):
    return batches[0]


class Report(pl.Callback):
    """Writes each rank's state to a file."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        state = {"model": pl_module.state_dict(), "steps": trainer.global_step}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


def make_model():
    torch.manual_seed(0)
    smp = qgnn.SMPConfig(alpha=0.05, eta_lambda=0.01)
    model = GCN(16, 8, 2, out_channels=3)
    return qgnn.quantize_model(model, config=qgnn.QuantConfig(bits=8, smp=smp))


def fit(make_trainer, model, batches, folder, **options):
    """Train ``model`` in place for a few steps; what each rank ended with."""
    folder.mkdir()
    callbacks = [DifferentialMultiplier(), Report(folder)]
    trainer = make_trainer(max_epochs=3, callbacks=callbacks, **options)
    module = QuantizedNodeClassifier(model, lr=1e-3)
    trainer.fit(module, DataLoader(batches, collate_fn=first))
    return [torch.load(path) for path in sorted(folder.iterdir())]


@pytest.fixture
def graphs(make_sbm):
    """Of equal label counts, so that the mean over ranks is the mean over the joint batch."""
    return [make_sbm(0, per_class=30), make_sbm(1, per_class=45)]


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [True, False])
def test_two_ranks_are_one_joint_batch(make_trainer, tmp_path, graphs, calibrated):
    model = make_model()
    if calibrated:
        qgnn.calibrate(model, Batch.from_data_list(graphs))
    ddp = {"devices": 2, "strategy": "ddp_spawn"}
    left, right = fit(make_trainer, copy.deepcopy(model), graphs, tmp_path / "two", **ddp)
    assert left["steps"] == 3
    for name, value in left["model"].items():
        assert torch.equal(value, right["model"][name]), name
    if calibrated:
        joint = [Batch.from_data_list(graphs)]
        (single,) = fit(make_trainer, model, joint, tmp_path / "one")
        names = [name for name in left["model"] if name.endswith("multiplier")]
        assert names
        for name in names:
            assert single["model"][name] > 0
            torch.testing.assert_close(left["model"][name], single["model"][name], rtol=1e-3, atol=0)
