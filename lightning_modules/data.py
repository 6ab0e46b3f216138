"""Data modules of one graph: full-batch, by sampled neighbourhoods, and split by links."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch_geometric.data import Data

from qgnn_plugin.data import neighbor_loader

from .framework import MisconfigurationException, pl

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


class _FullBatch(pl.LightningDataModule):
    """Graphs that are the only batch of their loader: never collated, moved to a device once per run, as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self._placed: dict[tuple[int, torch.device], Data] = {}

    def setup(self, stage: str) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} is full-batch: {self.trainer.world_size} devices would "
                "repeat the same step. Use Trainer(devices=1), or sample mini-batches with "
                "SampledNodeDataModule."
            )
        self._placed.clear()

    def teardown(self, stage: str) -> None:
        self._placed.clear()

    def graphs(self) -> tuple[Data, ...]:
        """The graphs that loaders serve."""
        raise NotImplementedError

    def transfer_batch_to_device(self, batch: Data, device: torch.device, dataloader_idx: int) -> Data:
        if not any(batch is graph for graph in self.graphs()):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        key = (id(batch), device)
        if key not in self._placed:
            with torch.inference_mode(False):
                self._placed[key] = copy.copy(batch).to(device)
        return self._placed[key]


class NodeDataModule(_FullBatch):
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
            same full-batch step. Sample mini-batches instead (:class:`SampledNodeDataModule`).
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

    def graphs(self) -> tuple[Data, ...]:
        return (self.data,)

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


class SampledNodeDataModule(pl.LightningDataModule):
    r"""Serves sampled neighbourhoods of one graph, by a sampler that needs neither pyg-lib nor torch-sparse.

    Training draws ``num_neighbors`` in-edges per node and hop, anew in each epoch; validation and test take
    ``eval_neighbors``, all of them by default, so that their figures are exact.  On several devices each has its share
    of the seeds.

    Args:
        data: A graph with dense ``x``, ``edge_index``, ``y`` and the masks ``train_mask``, ``val_mask``, ``test_mask``.
        num_neighbors: In-edges to draw per node in each hop; -1 for all of them.
        batch_size: Seeds per batch.
        seeds: ``"train"``: training nodes; ``"all"``: every node, for distillation (labels are still those of
            ``train_mask`` alone).
        eval_neighbors: As ``num_neighbors``, for validation, test and prediction.
        seed: Seed of order and neighbours.
        split: Column of the masks, as in :class:`NodeDataModule`.
        **loader: Further arguments of ``torch.utils.data.DataLoader``, such as ``num_workers``.

    Raises:
        ValueError: ``data`` or an argument malformed.
    """

    def __init__(
        self,
        data: Data,
        num_neighbors: Sequence[int] = (10, 10),
        *,
        batch_size: int = 512,
        seeds: str = "train",
        eval_neighbors: Sequence[int] | None = None,
        seed: int = 0,
        split: int | None = None,
        **loader: Any,
    ) -> None:
        super().__init__()
        if seeds not in ("train", "all"):
            raise ValueError(f"expected seeds 'train' or 'all' (got {seeds!r})")
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1 (got {batch_size})")
        self.data = NodeDataModule(data, split=split).data  # its checks, and its column of the masks
        self.num_neighbors, self.batch_size, self.seeds, self.seed = list(num_neighbors), batch_size, seeds, seed
        self.eval_neighbors = [-1] * len(self.num_neighbors) if eval_neighbors is None else list(eval_neighbors)
        self.loader = loader

    def train_dataloader(self) -> Any:
        if "train_mask" not in self.data:
            return []
        nodes = self.data.train_mask if self.seeds == "train" else None
        return neighbor_loader(
            self.data, self.num_neighbors, nodes, self.batch_size, shuffle=True, seed=self.seed, **self.loader
        )

    def _evaluation(self, name: str) -> Any:
        if name not in self.data:
            return []
        return neighbor_loader(
            self.data, self.eval_neighbors, self.data[name], self.batch_size, seed=self.seed, **self.loader
        )

    def val_dataloader(self) -> Any:
        return self._evaluation("val_mask")

    def test_dataloader(self) -> Any:
        return self._evaluation("test_mask")

    def predict_dataloader(self) -> Any:
        return neighbor_loader(self.data, self.eval_neighbors, None, self.batch_size, seed=self.seed, **self.loader)


class LinkDataModule(_FullBatch):
    r"""Serves the three graphs of a split by links, full-batch.

    Args:
        train: The graph that messages run on while training, with the pairs ``edge_label_index`` to learn; what
            :class:`torch_geometric.transforms.RandomLinkSplit` returns first.
        val, test: The same for validation and test; None for no such stage.

    Raises:
        ValueError: A graph without ``edge_label_index``.
        MisconfigurationException: The trainer uses more than one device.
    """

    def __init__(self, train: Data, val: Data | None = None, test: Data | None = None) -> None:
        super().__init__()
        for name, graph in zip(SPLITS, (train, val, test), strict=True):
            if graph is not None and "edge_label_index" not in graph:
                raise ValueError(
                    f"expected pairs `edge_label_index` in the {name} graph (got none); "
                    f"torch_geometric.transforms.RandomLinkSplit makes them"
                )
        self.train, self.val, self.test = train, val, test

    def graphs(self) -> tuple[Data, ...]:
        return tuple(graph for graph in (self.train, self.val, self.test) if graph is not None)

    def train_dataloader(self) -> _OneBatch:
        return _OneBatch(self.train)

    def val_dataloader(self) -> _OneBatch | list[_OneBatch]:
        return [] if self.val is None else _OneBatch(self.val)

    def test_dataloader(self) -> _OneBatch | list[_OneBatch]:
        return [] if self.test is None else _OneBatch(self.test)

    def predict_dataloader(self) -> _OneBatch:
        return _OneBatch(next(graph for graph in (self.test, self.val, self.train) if graph is not None))
