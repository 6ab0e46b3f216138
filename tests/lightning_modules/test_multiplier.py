"""DifferentialMultiplier: when it acts, on what, and what it says."""

from __future__ import annotations

import copy
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from torch_geometric.data import Batch
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import (
    DifferentialMultiplier,
    NodeDataModule,
    QuantizedNodeClassifier,
)


def make_model(**smp):
    """A model whose constraint is violated from the start."""
    smp = {"alpha": 1e-3, "eta_lambda": 1e-3, **smp}
    config = qgnn.QuantConfig(bits=8, smp=qgnn.SMPConfig(**smp))
    return qgnn.quantize_model(GCN(16, 8, 2, out_channels=3), config=config)


def multipliers(model):
    return {name: float(layer.multiplier) for name, layer in qgnn.smp_layers(model).items()}


def first(batches):
    return batches[0]


class Own(pl.LightningModule):
    """A user's own module, with as many optimizers as asked for."""

    def __init__(self, model, optimizers: int = 1) -> None:
        super().__init__()
        self.net, self.count = model, optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch, batch_idx):
        logits = self.net(batch.x, batch.edge_index)
        return F.cross_entropy(logits[batch.train_mask], batch.y[batch.train_mask])

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(self.count)]


@pytest.fixture
def calls(monkeypatch):
    """The updates that the callback asks for."""
    seen = []
    original = qgnn.differential_multiplier_step

    def step(*args, **kwargs):
        seen.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(qgnn, "differential_multiplier_step", step)
    return seen


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 10), (2, 6), (3, 4), (5, 2)])
def test_once_per_optimizer_step(sbm, make_trainer, calls, accumulate, steps):
    """Five batches in each of two epochs; an incomplete group steps at the end of its epoch."""
    loader = DataLoader([sbm] * 5, collate_fn=first)
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[DifferentialMultiplier()])
    trainer.fit(QuantizedNodeClassifier(make_model()), loader)
    assert trainer.global_step == len(calls) == steps


def test_an_accumulated_step_is_the_step_of_the_joint_batch(make_sbm, make_trainer):
    graphs = [make_sbm(0, per_class=30), make_sbm(1, per_class=50)]
    model = make_model()
    qgnn.calibrate(model, Batch.from_data_list(graphs))
    results = []
    for batches in (graphs, [Batch.from_data_list(graphs)]):
        module = Own(copy.deepcopy(model))
        trainer = make_trainer(max_epochs=1, accumulate_grad_batches=len(batches), callbacks=[DifferentialMultiplier()])
        trainer.fit(module, DataLoader(batches, collate_fn=first))
        assert trainer.global_step == 1
        results.append(multipliers(module))
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert all(value > 0 for value in results[0].values())


def test_the_sanity_check_moves_nothing(sbm, make_trainer):
    class Check(pl.Callback):
        seen = None

        def on_train_start(self, trainer, pl_module):
            self.seen = multipliers(pl_module)

    check, module = Check(), QuantizedNodeClassifier(make_model(multiplier=0.25))
    trainer = make_trainer(num_sanity_val_steps=2, callbacks=[DifferentialMultiplier(), check])
    trainer.fit(module, datamodule=NodeDataModule(sbm))
    assert set(check.seen.values()) == {0.25}
    assert 0.25 not in multipliers(module).values()


def test_evaluation_moves_nothing(sbm, make_trainer):
    module = QuantizedNodeClassifier(make_model())
    trainer = make_trainer(max_epochs=1, callbacks=[DifferentialMultiplier()])
    trainer.fit(module, datamodule=NodeDataModule(sbm))
    before = multipliers(module)
    trainer.validate(module, datamodule=NodeDataModule(sbm), verbose=False)
    trainer.test(module, datamodule=NodeDataModule(sbm), verbose=False)
    assert multipliers(module) == before


def test_a_second_run_updates_from_its_first_step(sbm, make_trainer, calls):
    callback, module = DifferentialMultiplier(), QuantizedNodeClassifier(make_model())
    for _ in range(2):
        make_trainer(max_epochs=3, callbacks=[callback]).fit(module, datamodule=NodeDataModule(sbm))
    assert len(calls) == 6


def test_works_with_the_users_own_module_and_logs(sbm, make_trainer):
    module = Own(make_model())
    trainer = make_trainer(callbacks=[DifferentialMultiplier()])
    trainer.fit(module, DataLoader([sbm], collate_fn=first))
    layers = qgnn.smp_layers(module)
    assert layers
    for name, layer in layers.items():
        assert name.startswith("net.")
        logged = trainer.callback_metrics
        assert float(logged[f"qgnn/lambda/{name}"]) == pytest.approx(float(layer.multiplier))
        assert float(logged[f"qgnn/violation/{name}"]) == pytest.approx(layer.violation, rel=1e-5)
        assert layer.multiplier > 0


def test_raising_the_multiplier_meets_the_bound(sbm, make_trainer):
    """Frozen weights: the multipliers alone bring each constraint to its bound."""
    model = make_model(alpha=0.3, eta_lambda=0.05)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    class Frozen(Own):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * self.anchor

        def configure_optimizers(self):
            return torch.optim.SGD([self.anchor], lr=0.1)

    module = Frozen(model)
    module.anchor = torch.nn.Parameter(torch.zeros(()))
    trainer = make_trainer(max_epochs=300, callbacks=[DifferentialMultiplier()])
    trainer.fit(module, DataLoader([sbm], collate_fn=first))
    for layer in qgnn.smp_layers(model).values():
        assert layer.constraint <= 1.02


@pytest.mark.parametrize("optimizers", [2, 3])
def test_several_optimizers_are_refused(sbm, make_trainer, optimizers):
    trainer = make_trainer(callbacks=[DifferentialMultiplier()])
    with pytest.raises(MisconfigurationException, match=f"one optimizer.*got {optimizers}"):
        trainer.fit(Own(make_model(), optimizers), DataLoader([sbm], collate_fn=first))


def test_warns_once_per_layer_that_saturates(sbm, make_trainer):
    model = make_model(alpha=1e-6, eta_lambda=1.0, max_multiplier=1.0)
    trainer = make_trainer(max_epochs=4, callbacks=[DifferentialMultiplier()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Own(model), DataLoader([sbm], collate_fn=first))
    messages = [str(w.message) for w in caught if "saturates" in str(w.message)]
    assert len(messages) == len(qgnn.smp_layers(model))
    assert "'net.convs.0'" in messages[0]


def test_warns_before_a_multiplier_saturates(sbm, make_trainer):
    model = make_model(alpha=1e-6, eta_lambda=1e-6, max_multiplier=10.0, multiplier=6.0)
    trainer = make_trainer(max_epochs=1, callbacks=[DifferentialMultiplier()])
    with pytest.warns(UserWarning, match=r"saturates: 6(\.\d+)? of at most 10"):
        trainer.fit(Own(model), DataLoader([sbm], collate_fn=first))
    assert all(value < 10 for value in multipliers(model).values())


@pytest.mark.parametrize("bits", [None, 4])
def test_propagation_layers_in_float_and_quantized(sbm, make_trainer, bits):
    """Every step is constrained; accumulated batches are averaged step by step."""
    smp = qgnn.SMPConfig(alpha=0.01, eta_lambda=0.01)
    model = torch.nn.ModuleDict({"lin": torch.nn.Linear(16, 3), "prop": qgnn.SMPropagation(4, smp=smp)})
    if bits is not None:
        model = qgnn.quantize_model(model, bits)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x, edge_index):
            return self.layers["prop"](self.layers["lin"](x), edge_index)

    trainer = make_trainer(accumulate_grad_batches=2, callbacks=[DifferentialMultiplier()])
    trainer.fit(Own(Net()), DataLoader([sbm] * 4, collate_fn=first))
    layer = model["prop"]
    assert layer.constraint_state.energy.shape == (4,)
    assert float(layer.multiplier) > 0
    logged = trainer.callback_metrics
    assert float(logged["qgnn/lambda/net.layers.prop"]) == pytest.approx(float(layer.multiplier))
    assert float(logged["qgnn/violation/net.layers.prop"]) == pytest.approx(layer.violation, rel=1e-5)


def test_warns_where_there_is_nothing_to_do(sbm, make_trainer):
    model = qgnn.quantize_model(GCN(16, 8, 2, out_channels=3), config=qgnn.QuantConfig(smp=None))
    trainer = make_trainer(max_epochs=1, callbacks=[DifferentialMultiplier()])
    with pytest.warns(UserWarning, match="nothing to do"):
        trainer.fit(Own(model), DataLoader([sbm], collate_fn=first))


def test_warns_where_nothing_is_measured(sbm, make_trainer):
    model = make_model()
    qgnn.calibrate(model, sbm)
    module = Own(model.eval())
    trainer = make_trainer(max_epochs=2, callbacks=[DifferentialMultiplier()])
    with pytest.warns(UserWarning, match="moves nothing"):
        trainer.fit(module, DataLoader([sbm], collate_fn=first))


def test_state_is_plain_and_restores():
    callback = DifferentialMultiplier()
    callback._saturated = {"b", "a"}
    state = callback.state_dict()
    assert state == {"saturated": ["a", "b"]}
    other = DifferentialMultiplier()
    other.load_state_dict(state)
    assert other.state_dict() == state
