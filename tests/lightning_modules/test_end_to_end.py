"""The main job on a small graph: a float GCN, converted, trained at few bits, as good as before."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import (
    DifferentialMultiplier,
    NodeDataModule,
    QuantizedNodeClassifier,
)


def fit_and_test(make_trainer, module, data, epochs):
    trainer = make_trainer(max_epochs=epochs, callbacks=[DifferentialMultiplier()])
    trainer.fit(module, datamodule=data)
    return trainer.test(module, datamodule=data, verbose=False)[0]["test_acc"]


def test_lightning_is_the_plain_loop(sbm, make_trainer):
    """The same weights, ranges and multipliers, bitwise, without Lightning."""
    torch.manual_seed(1)
    config = qgnn.QuantConfig(bits=4, smp=qgnn.SMPConfig(alpha=0.05))
    model = qgnn.quantize_model(GCN(16, 8, 2, out_channels=3, dropout=0.5), config=config)
    module = QuantizedNodeClassifier(copy.deepcopy(model), lr=0.02, weight_decay=1e-3)
    start = torch.get_rng_state()
    trainer = make_trainer(max_epochs=10, callbacks=[DifferentialMultiplier()])
    trainer.fit(module, datamodule=NodeDataModule(sbm))

    torch.set_rng_state(start)
    qgnn.calibrate(model, sbm, method="ranges")
    optimizer = torch.optim.Adam(qgnn.training.parameter_groups(model, 0.02, 1e-3))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(10):
        logits = model(sbm.x, sbm.edge_index)[sbm.train_mask]
        loss = F.cross_entropy(logits, sbm.y[sbm.train_mask], reduction="sum") / len(logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        qgnn.differential_multiplier_step(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, module.model.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:DifferentialMultiplier has nothing to do")
def test_a_converted_model_keeps_its_accuracy(make_sbm, make_trainer):
    data = NodeDataModule(make_sbm(per_class=60))
    model = GCN(16, 32, num_layers=2, out_channels=3, dropout=0.5)
    module = QuantizedNodeClassifier(model, weight_decay=5e-3)
    float_acc = fit_and_test(make_trainer, module, data, 60)
    assert float_acc > 0.9
    for bits in (4, 2):
        torch.manual_seed(bits)
        qmodel = qgnn.quantize_model(model, bits=bits)
        module = QuantizedNodeClassifier(qmodel, weight_decay=5e-3, teacher=copy.deepcopy(model), temperature=2.0)
        acc = fit_and_test(make_trainer, module, data, 60)
        assert acc >= float_acc - 0.03, f"{bits} bits"
        assert qgnn.is_quantized(module.model)
        for layer in qgnn.smp_layers(qmodel).values():
            assert layer.constraint <= 1.02
