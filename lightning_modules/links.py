"""A LightningModule that trains any PyG encoder to predict links, quantized or float."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import negative_sampling
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from .module import Inputs, QuantizedModule

__all__ = ["QuantizedLinkPredictor"]

Decoder = Callable[[Tensor, Tensor], Tensor]


def dot_product(z: Tensor, edges: Tensor) -> Tensor:
    """Scores ``[L]`` of the pairs ``edges`` ``[2, L]``: dot products of their embeddings ``z`` ``[N, C]``."""
    return (z[edges[0]] * z[edges[1]]).sum(-1)


class QuantizedLinkPredictor(QuantizedModule):
    r"""Trains any PyG encoder to predict which pairs of nodes are linked, full-batch or on sampled mini-batches.

    A batch has the pairs ``edge_label_index`` and their labels ``edge_label``, as
    :class:`torch_geometric.transforms.RandomLinkSplit` and ``LinkNeighborLoader`` make them.  Where a training batch
    has no pair with label 0, as many random pairs that are no edges are drawn anew in each step.  The loss is
    :math:`(1 - w) BCE + w BCE_{soft}`, with what ``teacher`` says of the same pairs.  Logs ``<split>_loss``,
    ``<split>_auc`` and ``<split>_ap``.

    Args:
        model: Returns embeddings ``[N, C]``.
        decoder: ``decoder(z, edges)`` gives the scores ``[L]`` of pairs ``[2, L]``; their dot products by default.
        lr: Learning rate of Adam.
        weight_decay: L2 penalty; ranges have none.
        range_lr: Learning rate of the ranges; ``lr`` by default.
        teacher: Trained float encoder to distil from; neither trained nor saved.
        distillation_weight: :math:`w` above, in [0, 1].
        schedule: ``"cosine"`` to zero at the trainer's last step, or None for a constant rate.

    Raises:
        ValueError: A setting out of range; in a step: no pairs, labels that are no 0 and 1, or scores of another shape.
    """

    shown = "auc"

    def __init__(
        self,
        model: nn.Module,
        *,
        decoder: Decoder | None = None,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        range_lr: float | None = None,
        teacher: nn.Module | None = None,
        distillation_weight: float = 0.5,
        schedule: Literal["cosine"] | None = "cosine",
    ) -> None:
        metrics: dict[str, Any] = {"auc": BinaryAUROC(), "ap": BinaryAveragePrecision()}
        super().__init__(
            model, metrics, lr=lr, weight_decay=weight_decay, range_lr=range_lr, teacher=teacher,
            distillation_weight=distillation_weight, schedule=schedule,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["model", "teacher", "metrics", "decoder"])
        self.decoder = dot_product if decoder is None else decoder

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        return super().training_step(_with_negatives(batch), batch_idx)

    def model_inputs(self, batch: Data) -> Inputs:
        _pairs(batch)
        return super().model_inputs(batch)

    def scores(self, out: Tensor, batch: Data) -> Tensor:
        pairs = _pairs(batch)
        scores = self.decoder(out, pairs)
        if scores.shape != (pairs.size(1),):
            raise ValueError(f"expected scores of shape [{pairs.size(1)}], one per pair (got {list(scores.shape)})")
        return scores

    def targets(self, batch: Data, out: Tensor) -> Tensor:
        labels = batch.get("edge_label")
        if labels is None:
            labels = torch.ones(out.size(0), dtype=torch.long, device=out.device)
        if labels.shape != out.shape or not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError(
                f"expected `edge_label` of 0 and 1, of shape {list(out.shape)} (got {labels.dtype} of shape "
                f"{list(labels.shape)})"
            )
        return labels.long()

    def loss(self, out: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, targets.to(out.dtype), reduction="sum")

    def distance(self, out: Tensor, soft: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, soft.sigmoid())


def _pairs(batch: Data) -> Tensor:
    pairs = batch.get("edge_label_index")
    if not isinstance(pairs, Tensor) or pairs.dim() != 2 or pairs.size(0) != 2:
        got = list(pairs.shape) if isinstance(pairs, Tensor) else f"fields {', '.join(sorted(batch.keys()))}"
        raise ValueError(
            f"expected pairs of nodes `edge_label_index` of shape [2, L] in the batch (got {got}); "
            f"torch_geometric.transforms.RandomLinkSplit makes them"
        )
    return pairs


def _with_negatives(batch: Data) -> Data:
    """The batch, with random pairs of label 0 where it has none."""
    pairs, labels = _pairs(batch), batch.get("edge_label")
    if labels is not None and not bool(labels.bool().all()):
        return batch
    drawn = negative_sampling(batch.edge_index, batch.num_nodes, pairs.size(1), method="sparse")
    batch = copy.copy(batch)  # its tensors are shared, the caller's batch stays
    batch.edge_label_index = torch.cat([pairs, drawn], dim=1)
    batch.edge_label = torch.cat([pairs.new_ones(pairs.size(1)), drawn.new_zeros(drawn.size(1))])
    return batch

