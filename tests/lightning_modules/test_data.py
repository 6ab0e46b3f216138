"""NodeDataModule: one graph, one batch, nothing moved or drawn behind the caller's back."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch_geometric.data import Data

from qgnn_plugin.lightning_modules import NodeDataModule


class Probe(pl.LightningModule):
    """Counts the batches of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[tuple[str, Data]] = []

    def training_step(self, batch, batch_idx):
        self.batches.append(("train", batch))
        return self.weight * batch.x.sum()

    def validation_step(self, batch, batch_idx):
        self.batches.append(("val", batch))

    def test_step(self, batch, batch_idx):
        self.batches.append(("test", batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_graph_itself_is_the_batch_of_every_stage(sbm, make_trainer):
    probe, trainer = Probe(), make_trainer(max_epochs=2, num_sanity_val_steps=0)
    module = NodeDataModule(sbm)
    trainer.fit(probe, datamodule=module)
    trainer.test(probe, datamodule=module, verbose=False)
    assert [stage for stage, _ in probe.batches] == ["train", "val"] * 2 + ["test"]
    for _, batch in probe.batches:
        assert batch.x.data_ptr() == sbm.x.data_ptr()


def test_epochs_draw_nothing_from_the_generators(sbm, make_trainer):
    before = torch.get_rng_state()
    make_trainer(max_epochs=3).fit(Probe(), datamodule=NodeDataModule(sbm))
    assert torch.equal(torch.get_rng_state(), before)


def test_moves_a_copy_once_per_run(sbm):
    module = NodeDataModule(sbm)
    module.setup("fit")
    with torch.inference_mode():  # as in trainer.validate
        first = module.transfer_batch_to_device(module.data, torch.device("meta"), 0)
    again = module.transfer_batch_to_device(module.data, torch.device("meta"), 0)
    assert first is again
    assert first.x.is_meta
    assert not first.x.is_inference()
    assert sbm.x.device.type == module.data.x.device.type == "cpu"


def test_a_stage_without_mask_has_no_loader(sbm, make_trainer):
    del sbm.val_mask
    probe = Probe()
    make_trainer(max_epochs=2).fit(probe, datamodule=NodeDataModule(sbm))
    assert [stage for stage, _ in probe.batches] == ["train", "train"]


def test_selects_one_of_several_splits(sbm):
    first = sbm.train_mask
    second = torch.roll(first, 1)
    sbm.train_mask = torch.stack([first, second], 1)
    assert torch.equal(NodeDataModule(sbm, split=1).data.train_mask, second)
    assert sbm.train_mask.dim() == 2  # the caller's data is as before


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({"train_mask": None, "val_mask": None, "test_mask": None}, None, "got none"),
        ({"train_mask": torch.zeros(120, dtype=torch.long)}, None, "boolean `train_mask`"),
        ({"train_mask": torch.ones(7, dtype=torch.bool)}, None, "one entry per node"),
        ({"train_mask": torch.zeros(120, dtype=torch.bool)}, None, "empty train_mask"),
        ({"val_mask": torch.ones(120, 4, dtype=torch.bool)}, None, r"`split` in \[0, 4\)"),
        ({"val_mask": torch.ones(120, 4, dtype=torch.bool)}, 4, r"got 4"),
    ],
)
def test_refuses_bad_masks(sbm, change, split, message):
    for name, value in change.items():
        sbm[name] = value
    with pytest.raises(ValueError, match=message):
        NodeDataModule(sbm, split=split)


def test_refuses_several_devices(sbm):
    class Trainer:
        world_size = 2

    module = NodeDataModule(sbm)
    module.trainer = Trainer()
    with pytest.raises(MisconfigurationException, match="SampledNodeDataModule"):
        module.setup("fit")
