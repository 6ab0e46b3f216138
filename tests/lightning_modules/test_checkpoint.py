"""Checkpoints of converted LightningModules are loaded by their classes, converted as they were."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.lightning_modules import QuantizedNodeClassifier, load_converted

X, EDGES = torch.randn(30, 6), torch.randint(0, 30, (2, 120))
DEEP = QuantConfig(bits=4, smp=SMPConfig(initial_residual=0.1, identity_map=0.5))
MIXED = QuantConfig(bits=4, output_bits=8, overrides={"*convs.1*": {"weight_bits": 8}})


class Task(pl.LightningModule):
    """A user's own module: a network, hyperparameters, and hooks of its own."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        if type(self).__init__ is Task.__init__:
            self.save_hyperparameters()
        self.net = GCN(6, width, layers, 3)
        self.seen: list[str] = []

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.net(x, edge_index)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self(X, EDGES).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen.append("loaded")


class Stacked(Task):
    """Its own forward runs the layers, so that it is the scope of their stack."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in self.net.convs:
            x = conv(x, edge_index)
        return x


class Named(Task):
    """Hyperparameters in one argument."""

    def __init__(self, options: dict[str, int]) -> None:
        super().__init__(options["width"])
        self.save_hyperparameters(options)


def trained(task: Any, path: Any) -> Tensor:
    trainer = pl.Trainer(
        max_epochs=1, logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader([0]))
    trainer.save_checkpoint(path)
    with torch.no_grad():
        return task.eval()(X, EDGES)


CASES = {
    "whole": (lambda: qgnn.quantize_model(Task(width=12), 4), Task),
    "mixed": (lambda: qgnn.quantize_model(Task(), MIXED), Task),
    "deep": (lambda: qgnn.quantize_model(Task(layers=5), DEEP), Task),
    "scope": (lambda: qgnn.quantize_model(Stacked(layers=5), DEEP), Stacked),
    "named": (lambda: qgnn.quantize_model(Named({"width": 7}), 4), Named),
}


@pytest.mark.parametrize("name", CASES)
def test_the_class_of_a_converted_module_loads_its_checkpoint(name: str, tmp_path: Any) -> None:
    build, plain = CASES[name]
    task: Any = build()
    expected = trained(task, tmp_path / "task.ckpt")
    assert type(task).__name__ == plain.__name__
    assert isinstance(task, plain)
    for loaded in (
        type(task).load_from_checkpoint(tmp_path / "task.ckpt"),
        load_converted(plain, tmp_path / "task.ckpt"),
        type(type(task).load_from_checkpoint(tmp_path / "task.ckpt")).load_from_checkpoint(tmp_path / "task.ckpt"),
    ):
        assert type(loaded) is type(task)
        assert loaded.seen == ["loaded"]
        assert loaded.hparams == task.hparams
        assert torch.equal(loaded.eval()(X, EDGES), expected)
        for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), through_torch_save(loaded)):
            assert type(other) is type(task)
            assert torch.equal(other(X, EDGES), expected)
        restored = qgnn.restore_model(loaded)
        assert type(restored) is plain
        assert set(restored.state_dict()) == {n for n, _ in restored.named_parameters()}


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_module_whose_network_was_converted(tmp_path: Any) -> None:
    task = Task()
    task.net = qgnn.quantize_model(task.net, 4)
    expected = trained(task, tmp_path / "task.ckpt")
    with pytest.raises(RuntimeError, match="_quantization_state"):
        Task.load_from_checkpoint(tmp_path / "task.ckpt")
    loaded = load_converted(Task, tmp_path / "task.ckpt")
    assert torch.equal(loaded.eval()(X, EDGES), expected)
    with pytest.raises(TypeError, match="LightningModule class"):
        load_converted(GCN, tmp_path / "task.ckpt")  # type: ignore[type-var]


def test_float_checkpoints_stay_float(tmp_path: Any) -> None:
    expected = trained(task := Task(), tmp_path / "task.ckpt")
    for cls in (type(qgnn.quantize_model(task, 4)), Task):
        loaded: Any = load_converted(cls, tmp_path / "task.ckpt")
        assert not qgnn.is_quantized(loaded)
        assert torch.equal(loaded.eval()(X, EDGES), expected)


def test_classifiers_take_a_float_model_or_the_right_one(tmp_path: Any) -> None:
    qmodel = qgnn.quantize_model(GCN(6, 8, 2, 3), 4)
    task = QuantizedNodeClassifier(qgnn.calibrate(qmodel, (X, EDGES)).eval())
    saved = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    torch.save({**saved, "pytorch-lightning_version": "2.5.0"}, tmp_path / "task.ckpt")
    expected = task(X, EDGES)
    for model in (GCN(6, 8, 2, 3), qgnn.quantize_model(GCN(6, 8, 2, 3), 4)):
        loaded = QuantizedNodeClassifier.load_from_checkpoint(tmp_path / "task.ckpt", model=model)
        assert torch.equal(loaded.eval()(X, EDGES), expected)
    other = qgnn.quantize_model(GCN(6, 8, 2, 3), 8)
    with pytest.raises(RuntimeError, match=r"bits=8 at 'convs.0.lin.input' \(got bits=4\)"):
        QuantizedNodeClassifier.load_from_checkpoint(tmp_path / "task.ckpt", model=other)
    with pytest.raises(ValueError, match=r"got another at 'model.convs.0'"):
        QuantizedNodeClassifier.load_from_checkpoint(tmp_path / "task.ckpt", model=nn.Linear(6, 3), num_classes=3)


def test_modules_handed_to_a_trainer_are_not_converted(tmp_path: Any) -> None:
    trained(qgnn.quantize_model(Task(), 4), tmp_path / "task.ckpt")
    fresh: Any = qgnn.restore_model(qgnn.quantize_model(Task(), 4))
    fresh.__class__ = type(qgnn.quantize_model(Task(), 4))
    trainer = pl.Trainer(max_epochs=2, logger=False, accelerator="cpu", enable_progress_bar=False,
                         enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(RuntimeError, match="Unexpected key"):
        trainer.fit(fresh, torch.utils.data.DataLoader([0]), ckpt_path=tmp_path / "task.ckpt")


def test_a_packed_module_says_that_it_is_not_trained() -> None:
    packed: Any = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(Task()), (X, EDGES), method="ranges").eval())
    trainer = pl.Trainer(fast_dev_run=True, logger=False, accelerator="cpu", enable_progress_bar=False,
                         enable_model_summary=False)  # fmt: skip
    with pytest.raises(ValueError, match=r"Expected a model to train \(got a packed Task\).*pack_model was given"):
        trainer.fit(packed, torch.utils.data.DataLoader([0]))


class Evaluated(Task):
    def validation_step(self, batch: Any, index: int) -> None:
        self.seen.append(self(X, EDGES).sum().item())


def test_a_module_without_ranges_passes_the_sanity_check(make_trainer: Any) -> None:
    """In floats, and says so; after a step of training, and anywhere else, ranges are asked for."""
    plain = Evaluated()
    task, loader = qgnn.quantize_model(plain, bits=2), torch.utils.data.DataLoader([0])
    with pytest.warns(UserWarning, match="sanity check runs without quantization.*RangeCalibration"):
        make_trainer(num_sanity_val_steps=1, max_epochs=1).fit(task, loader, loader)
    plain.validation_step(0, 0)
    assert task.seen[0] == pytest.approx(plain.seen[0], rel=1e-4)
    assert all(site.is_set and not site.passes_unset for site in qgnn.quantizers(task).values())
    with pytest.raises(RuntimeError, match="unset"):
        make_trainer().validate(qgnn.quantize_model(plain), loader)
