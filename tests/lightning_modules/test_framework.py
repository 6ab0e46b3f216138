"""Both names of Lightning, each in a process of its own, and Lightning's own tools around a user's module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")

RUN = """
import sys, warnings
warnings.simplefilter("ignore")
{first}
import torch
from torch_geometric.data import Data
from torch_geometric.nn import GCN
import qgnn_plugin as qgnn
from qgnn_plugin.lightning_modules import (
    DifferentialMultiplier, NodeDataModule, QuantizedNodeClassifier, RangeCalibration, RandomState, load_converted,
)
{framework}
torch.manual_seed(0)
x = torch.randn(40, 8)
data = Data(x=x, edge_index=torch.randint(40, (2, 160)), y=(x[:, 0] > 0).long())
data.train_mask = data.val_mask = data.test_mask = torch.arange(40) < 30


class Task(F.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, edge_index):
        return self.model(x, edge_index)

    def training_step(self, batch, index):
        loss = torch.nn.functional.cross_entropy(self(batch.x, batch.edge_index), batch.y)
        self.log("loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch, index):
        self.log("val", torch.nn.functional.cross_entropy(self(batch.x, batch.edge_index), batch.y), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.Adam(qgnn.training.parameter_groups(self.model, lr=0.01))


options = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1])
qmodel = lambda: qgnn.quantize_model(GCN(8, 8, 2, 2), bits=4)
trainer = F.Trainer(max_epochs=3, callbacks=[DifferentialMultiplier()], enable_checkpointing=False, **options)
module = QuantizedNodeClassifier(qmodel())
trainer.fit(module, NodeDataModule(data))
assert 0 <= trainer.test(module, NodeDataModule(data), verbose=False)[0]["test_acc"] <= 1

best = cb.ModelCheckpoint(sys.argv[1], monitor="val", save_last=True)
task = Task(qmodel())
trainer = F.Trainer(
    max_epochs=4, precision="bf16-mixed", accumulate_grad_batches=1, gradient_clip_val=1.0,
    callbacks=[
        RangeCalibration(), DifferentialMultiplier(), RandomState(), best, cb.EarlyStopping("val", patience=3),
        cb.StochasticWeightAveraging(1e-2, swa_epoch_start=2),
    ], **options,
)
trainer.fit(task, NodeDataModule(data))
task.eval()
expected = task(data.x, data.edge_index)
assert qgnn.pack_model(task)(data.x, data.edge_index).equal(expected)
loaded = load_converted(Task, best.last_model_path, model=GCN(8, 8, 2, 2)).eval()
assert torch.isfinite(loaded(data.x, data.edge_index)).all()
again = F.Trainer(max_epochs=6, callbacks=[DifferentialMultiplier()], enable_checkpointing=False, **options)
again.fit(Task(qmodel()), NodeDataModule(data), ckpt_path=best.last_model_path)
assert again.current_epoch == 6
print("done")
"""

NAMES = {
    "lightning": (
        "import lightning as L",
        "import lightning.pytorch as F; import lightning.pytorch.callbacks as cb",
    ),
    "pytorch_lightning": (
        "import pytorch_lightning",
        "import pytorch_lightning as F; import pytorch_lightning.callbacks as cb",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_trains_under_both_names(name: str, tmp_path: Path) -> None:
    first, framework = NAMES[name]
    script = tmp_path / "run.py"
    script.write_text(RUN.format(first=first, framework=framework))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path / "checkpoints"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")


def test_the_variable_decides_and_is_checked(tmp_path: Path) -> None:
    code = "import lightning; from qgnn_plugin.lightning_modules.framework import FRAMEWORK; print(FRAMEWORK)"
    for value, expected in (("pytorch_lightning", "pytorch_lightning"), ("", "lightning.pytorch"), ("torch", None)):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "QGNN_LIGHTNING": value},
        )  # fmt: skip
        if expected is None:
            assert "Expected QGNN_LIGHTNING to be one of" in done.stderr
        else:
            assert done.stdout.split()[-1] == expected, done.stderr[-2000:]
