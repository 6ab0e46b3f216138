"""RangeCalibration: ranges before the sanity check, once, and without side effects."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
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


class Pairs(pl.LightningModule):
    """A module of the user's own, of batches as ``parts`` takes them apart."""

    def __init__(self, model, parts):
        super().__init__()
        self.model, self.parts, self.seen = model, parts, []

    def predict_step(self, batch, batch_idx):
        graphs = self.parts(batch)
        self.seen.append(graphs)
        return [self.model(x, edge_index) for x, edge_index in graphs]

    def training_step(self, batch, batch_idx):
        return sum(out.square().mean() for out in self.predict_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def assert_calibrated_as_trained(module, trainer, loaders):
    """The calibration saw the batches of the first steps."""
    trainer.fit(module, loaders)
    half = len(module.seen) // 2
    for calibrating, training in zip(module.seen[:half], module.seen[half:], strict=True):
        assert len(calibrating) == len(training)
        for (x, _), (other, _) in zip(calibrating, training, strict=True):
            assert torch.equal(x, other)
            assert x.dtype == other.dtype


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_batches_are_of_the_precision_of_the_run(make_sbm, make_trainer, precision):
    data = [(graph.x, graph.edge_index) for graph in map(make_sbm, range(2))]
    module = Pairs(make_model(), lambda batch: [batch])
    trainer = make_trainer(max_epochs=1, precision=precision, callbacks=[RangeCalibration()])
    assert_calibrated_as_trained(module, trainer, DataLoader(data, batch_size=None))


@pytest.mark.parametrize("kind", [list, dict, CombinedLoader])
def test_several_loaders_give_their_batches_together(make_sbm, make_trainer, kind):
    def loader(first):
        data = [(graph.x, graph.edge_index) for graph in map(make_sbm, (first, first + 1))]
        return DataLoader(data, batch_size=None)

    loaders = {"a": loader(0), "b": loader(2)}
    if kind is list:
        loaders, parts = list(loaders.values()), list
    else:
        loaders, parts = kind(loaders), lambda batch: list(batch.values())
    module = Pairs(make_model(), parts)
    assert_calibrated_as_trained(module, make_trainer(max_epochs=1, callbacks=[RangeCalibration()]), loaders)


def test_refuses_to_calibrate_on_nothing():
    with pytest.raises(MisconfigurationException, match="max_batches"):
        RangeCalibration(max_batches=0)


def test_tells_unset_ranges(sbm):
    model = make_model()
    assert has_unset_ranges(model)
    qgnn.calibrate(model, sbm)
    assert not has_unset_ranges(model)
    assert not has_unset_ranges(GCN(16, 8, 2))
