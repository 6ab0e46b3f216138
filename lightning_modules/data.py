"""Data module of one graph, trained full-batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch_geometric.data import Data

SPLITS = ("train", "val", "test")


class _OneBatch:
    """A data loader of exactly one batch.

    Lightning takes any sized iterable. A ``DataLoader`` would draw a seed from the global generator
    each epoch, so that the number of validation runs would change the dropout masks of training.
    """

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Data]:
        yield self.data


class NodeDataModule(pl.LightningDataModule):
    r"""Serves one :class:`~torch_geometric.data.Data` as the only batch of every epoch.

    The graph is never collated or copied on the way to the model. It moves to the accelerator once
    per run, as a copy: the caller's ``data`` stays where it is (``Data.to`` works in place, and a
    graph moved while validating would hold inference tensors that no later ``fit`` can use).

    Args:
        data: A graph with ``x``, ``edge_index``, ``y`` and the boolean node masks ``train_mask``,
            ``val_mask`` and ``test_mask`` of shape :math:`[N]`. Without a mask, that stage has no
            loader.
        split: Column of the masks to use where they have the shape :math:`[N, S]`, one column per
            split.

    Raises:
        ValueError: ``data`` has no mask at all, a mask of the wrong shape or type, several splits
            and no ``split``, or an empty training split.
        MisconfigurationException: The trainer uses more than one device: each would repeat the
            same full-batch step. Sample mini-batches instead (``LightningNodeData``).
    """

    def __init__(self, data: Data, *, split: int | None = None) -> None:
        super().__init__()
        self.data = copy.copy(data)
        found = [name for name in SPLITS if self._select_mask(f"{name}_mask", split)]
        if not found:
            raise ValueError(
                "expected `data` with train_mask, val_mask or test_mask (got none); "
                "torch_geometric.transforms.RandomNodeSplit adds them"
            )
        self._placed: dict[torch.device, Data] = {}

    def _select_mask(self, name: str, split: int | None) -> bool:
        """Put the mask's column for ``split`` in place of the mask; False where there is none."""
        mask = self.data.get(name)
        if mask is None:
            return False
        if mask.dtype != torch.bool or mask.dim() not in (1, 2):
            raise ValueError(
                f"expected a boolean `{name}` of shape [N] or [N, splits] "
                f"(got {mask.dtype} of shape {list(mask.shape)})"
            )
        if mask.dim() == 2:
            columns = mask.size(1)
            if split is None and columns > 1:
                raise ValueError(f"expected `split` in [0, {columns}): `{name}` holds {columns}")
            if split is not None and not 0 <= split < columns:
                raise ValueError(f"expected `split` in [0, {columns}) (got {split})")
            mask = mask[:, split or 0]
            self.data[name] = mask
        if mask.size(0) != self.data.num_nodes:
            raise ValueError(
                f"expected `{name}` with one entry per node (got {mask.size(0)} for {self.data.num_nodes} nodes)"
            )
        if name == "train_mask" and not bool(mask.any()):
            raise ValueError("expected at least one training node (got an empty train_mask)")
        return True

    def setup(self, stage: str) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} is full-batch: {self.trainer.world_size} devices would "
                "repeat the same step. Use Trainer(devices=1), or sample mini-batches with "
                "torch_geometric.data.lightning.LightningNodeData."
            )
        self._placed.clear()

    def teardown(self, stage: str) -> None:
        self._placed.clear()

    def transfer_batch_to_device(self, batch: Data, device: torch.device, dataloader_idx: int) -> Data:
        if batch is not self.data:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        placed = self._placed.get(device)
        if placed is None:
            with torch.inference_mode(False):
                placed = self._placed[device] = copy.copy(self.data).to(device)
        return placed

    def _loader(self, *names: str) -> _OneBatch | list[_OneBatch]:
        has_mask = any(f"{name}_mask" in self.data for name in names)
        return _OneBatch(self.data) if has_mask else []

    def train_dataloader(self) -> _OneBatch | list[_OneBatch]:
        return self._loader("train")

    def val_dataloader(self) -> _OneBatch | list[_OneBatch]:
        return self._loader("val")

    def test_dataloader(self) -> _OneBatch | list[_OneBatch]:
        return self._loader("test")

    def predict_dataloader(self) -> _OneBatch:
        return _OneBatch(self.data)
