"""RangeCalibration: ranges before the sanity check, once, and without side effects."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from torch_geometric.data import Data
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import NodeDataModule, QuantizedNodeClassifier, RangeCalibration
from qgnn_plugin.lightning_modules.calibration import has_unset_ranges


def make_model():
    return qgnn.quantize_model(GCN(16, 8, 2, out_channels=3, dropout=0.5), bits=4)


def ranges(model):
    return [parameter.detach().clone() for parameter in qgnn.range_parameters(model)]


@pytest.fixture
def calls(monkeypatch):
    """The batches of each calibration."""
    seen = []
    original = qgnn.calibrate

    def calibrate(model, data, **kwargs):
        batches = [data] if isinstance(data, Data) else list(data)
        seen.append(batches)
        return original(model, batches, **kwargs)

    monkeypatch.setattr(qgnn, "calibrate", calibrate)
    return seen


def test_a_fresh_model_passes_the_sanity_check(sbm, make_trainer, calls):
    """Evaluation needs ranges: without calibration the sanity check would be an error."""
    module = QuantizedNodeClassifier(make_model())
    trainer = make_trainer(num_sanity_val_steps=1)
    trainer.fit(module, datamodule=NodeDataModule(sbm))
    assert len(calls) == 1
    make_trainer().fit(module, datamodule=NodeDataModule(sbm))
    assert len(calls) == 1  # already set


def test_ranges_are_those_of_calibrate(sbm, make_trainer):
    model, other = make_model(), make_model()
    other.load_state_dict(model.state_dict())
    qgnn.calibrate(other, sbm)
    make_trainer(max_steps=0).fit(QuantizedNodeClassifier(model), datamodule=NodeDataModule(sbm))
    for ours, theirs in zip(ranges(model), ranges(other), strict=True):
        assert torch.equal(ours, theirs)


def test_a_calibrated_model_is_left_alone(sbm, make_trainer, calls):
    model = make_model()
    qgnn.calibrate(model, sbm)
    calls.clear()
    before = ranges(model)
    make_trainer(max_steps=0).fit(QuantizedNodeClassifier(model), datamodule=NodeDataModule(sbm))
    assert not calls
    for old, new in zip(before, ranges(model), strict=True):
        assert torch.equal(old, new)


def test_reads_a_few_batches_and_no_randomness(make_sbm, make_trainer, calls):
    data = [make_sbm(seed) for seed in range(5)]

    def loader():
        return DataLoader(data, collate_fn=lambda batches: batches[0], shuffle=True)

    orders = []
    for calibrated in (False, True):
        model = make_model()
        if calibrated:
            qgnn.calibrate(model, data)
        callback = RangeCalibration(max_batches=2)

        class Module(QuantizedNodeClassifier):
            def training_step(self, batch, batch_idx):
                orders[-1].append(float(batch.x[0, 0]))
                return super().training_step(batch, batch_idx)

        orders.append([])
        module = Module(model)
        torch.manual_seed(7)
        make_trainer(max_epochs=2, callbacks=[callback]).fit(module, loader())
    assert len(calls[0]) == 2
    assert orders[0] == orders[1]


def test_refuses_to_calibrate_on_nothing():
    with pytest.raises(MisconfigurationException, match="max_batches"):
        RangeCalibration(max_batches=0)


def test_tells_unset_ranges(sbm):
    model = make_model()
    assert has_unset_ranges(model)
    qgnn.calibrate(model, sbm)
    assert not has_unset_ranges(model)
    assert not has_unset_ranges(GCN(16, 8, 2))
