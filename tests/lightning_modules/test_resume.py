"""Crash and resume is the uninterrupted run, bitwise: dropout, shuffling, ranges, multipliers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torch_geometric.nn import GCN, Sequential

import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import (
    DifferentialMultiplier,
    NodeDataModule,
    QuantizedNodeClassifier,
)

EPOCHS, CRASH = 8, 5


class Crash(pl.Callback):
    """Ends the run in the middle of an epoch's step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.current_epoch == CRASH:
            raise RuntimeError("power cut")


class History(pl.Callback):
    """Every figure of every epoch."""

    def __init__(self) -> None:
        self.epochs: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer, pl_module):
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs[trainer.current_epoch] = values


def make_module(mode: str = "full") -> QuantizedNodeClassifier:
    torch.manual_seed(3)
    if mode == "damped":
        return QuantizedNodeClassifier(qgnn.quantize_model(damped_propagation(), bits=2), num_classes=3)
    teacher = GCN(16, 8, 2, out_channels=3)
    smp = qgnn.SMPConfig(alpha=0.05, eta_lambda=0.01)
    config = qgnn.QuantConfig(bits=2, smp=smp)
    model = qgnn.quantize_model(GCN(16, 8, 2, out_channels=3, dropout=0.5), config=config)
    return QuantizedNodeClassifier(model, teacher=teacher)


def damped_propagation() -> torch.nn.Module:
    smp = qgnn.SMPConfig(alpha=0.05, eta_lambda=0.01, damping=0.1, slack=0.3, eta_slack=0.01)
    propagation = qgnn.SMPropagation(4, dropout=0.3, smp=smp)
    layers = [(torch.nn.Linear(16, 3), "x -> x"), (propagation, "x, edge_index -> x")]
    return Sequential("x, edge_index", layers)


def batches(data):
    """Shuffled mini-batches, each with its own seeds."""
    graphs = []
    for count in (60, 80, 100, 120):
        graph = data.clone()
        graph.batch_size = count
        graphs.append(graph)
    return DataLoader(graphs, collate_fn=lambda graphs: graphs[0], shuffle=True)


def run(make_trainer, data, folder: Path, mode: str, *, crash=False, resume=False):
    pl.seed_everything(17 if not resume else 99, verbose=False)
    module, history = make_module(mode), History()
    at_validation = mode == "validation"  # where Lightning saves if a monitor is given
    saver = ModelCheckpoint(folder, save_last=True, every_n_epochs=1, save_on_train_epoch_end=not at_validation)
    callbacks = [DifferentialMultiplier(), history, saver, *([Crash()] if crash else [])]
    trainer = make_trainer(
        max_epochs=EPOCHS,
        callbacks=callbacks,
        enable_checkpointing=True,
        accumulate_grad_batches=3 if mode == "accumulated" else 1,
    )
    if mode in ("full", "validation", "damped"):
        source = {"datamodule": NodeDataModule(data)}
    else:
        source = {"train_dataloaders": batches(data), "val_dataloaders": batches(data)}
    ckpt_path = folder / "last.ckpt" if resume else None
    if crash:
        with pytest.raises(RuntimeError, match="power cut"):
            trainer.fit(module, **source)
    else:
        trainer.fit(module, **source, ckpt_path=ckpt_path)
    return module, trainer, history


def assert_equal(left, right, where: str) -> None:
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key, value in left.items():
            assert_equal(value, right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


@pytest.mark.parametrize("mode", ["full", "validation", "sampled", "accumulated", "damped"])
def test_resumed_run_is_the_uninterrupted_one(sbm, make_trainer, tmp_path, mode):
    module, trainer, history = run(make_trainer, sbm, tmp_path / "whole", mode)
    run(make_trainer, sbm, tmp_path / "parts", mode, crash=True)
    resumed, other, tail = run(make_trainer, sbm, tmp_path / "parts", mode, resume=True)

    assert trainer.global_step == other.global_step
    assert_equal(dict(module.state_dict()), dict(resumed.state_dict()), "state")
    assert_equal(trainer.optimizers[0].state_dict(), other.optimizers[0].state_dict(), "adam")
    schedules = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (trainer, other)]
    assert_equal(*schedules, "schedule")
    for epoch in range(CRASH, EPOCHS):
        assert_equal(history.epochs[epoch], tail.epochs[epoch], f"epoch {epoch}")
    assert all(float(layer.multiplier) > 0 for layer in qgnn.smp_layers(module).values())


def test_a_checkpoint_restores_every_generator(sbm, make_trainer, tmp_path):
    module = make_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=NodeDataModule(sbm))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    draws = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002

    class Draw(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.draws = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002

    pl.seed_everything(5, verbose=False)
    draw = Draw()
    trainer = make_trainer(max_epochs=2, callbacks=[draw])
    trainer.fit(make_module(), datamodule=NodeDataModule(sbm), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(draw.draws[0], draws[0])
    assert np.array_equal(draw.draws[1], draws[1])
    assert draw.draws[2] == draws[2]


def test_evaluating_a_checkpoint_leaves_the_generators_alone(sbm, make_trainer, tmp_path):
    module = make_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=NodeDataModule(sbm))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer.test(module, datamodule=NodeDataModule(sbm), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(torch.get_rng_state(), before)
