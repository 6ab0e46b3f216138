"""LightningModules that train and evaluate any PyG model that predicts numbers, quantized or float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from .module import OfGraphs, OfNodes, QuantizedModule, label_field

__all__ = ["QuantizedGraphRegressor", "QuantizedNodeRegressor"]

Loss = Literal["mse", "l1", "huber"]
LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


class _QuantizedRegressor(QuantizedModule):
    """What node and graph regressors share: targets of floats, their errors."""

    shown = "mae"

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss = "mse",
        lr: float = 0.01,
        weight_decay: float = 0.0,
        range_lr: float | None = None,
        teacher: nn.Module | None = None,
        distillation_weight: float = 0.5,
        schedule: Literal["cosine"] | None = "cosine",
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"expected loss to be one of {', '.join(map(repr, LOSSES))} (got {loss!r})")
        metrics: dict[str, Any] = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False)}
        super().__init__(
            model, metrics, lr=lr, weight_decay=weight_decay, range_lr=range_lr, teacher=teacher,
            distillation_weight=distillation_weight, schedule=schedule,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["model", "teacher", "metrics"])
        self.loss_name: Loss = loss

    def scores(self, out: Tensor, batch: Data) -> Tensor:
        """``[rows]`` or ``[rows, T]``: a single column is a number per row."""
        out = super().scores(out, batch)
        return out.squeeze(1) if out.dim() == 2 and out.size(1) == 1 else out

    def targets(self: Any, batch: Data, out: Tensor) -> Tensor:
        values = label_field(batch)[self.scored(batch)]
        if not values.is_floating_point():
            raise ValueError(
                f"expected targets `y` of floats (got {values.dtype}); classes are for QuantizedNodeClassifier or "
                f"QuantizedGraphClassifier"
            )
        if values.dim() == 2 and values.size(1) == 1:
            values = values.squeeze(1)
        if out.shape != values.shape:
            raise ValueError(
                f"expected an output of shape {list(values.shape)}, as the targets `y` (got {list(out.shape)})"
            )
        return values

    def loss(self, out: Tensor, targets: Tensor) -> Tensor:
        total = LOSSES[self.loss_name](out, targets, reduction="sum")
        return total / (out.size(1) if out.dim() == 2 else 1)

    def distance(self, out: Tensor, soft: Tensor) -> Tensor:
        return LOSSES[self.loss_name](out, soft)


class QuantizedNodeRegressor(OfNodes, _QuantizedRegressor):
    r"""Trains any PyG model that predicts one or more numbers per node, full-batch or on sampled mini-batches.

    The loss is :math:`(1 - w) L(\hat y, y) + w L(\hat y, \hat y_{teacher})`, labels on the rows of
    ``train_mask`` (where the batch has one), the teacher on all rows that count.  Logs ``<split>_loss``,
    ``<split>_mae`` and ``<split>_rmse``.

    Args:
        model: Returns ``[N]``, ``[N, 1]`` or ``[N, T]``.
        loss: ``"mse"``, ``"l1"`` or ``"huber"``, averaged over rows and targets.
        lr: Learning rate of Adam.
        weight_decay: L2 penalty; ranges have none.
        range_lr: Learning rate of the ranges; ``lr`` by default.
        teacher: Trained float model to distil from; neither trained nor saved.
        distillation_weight: :math:`w` above, in [0, 1].
        schedule: ``"cosine"`` to zero at the trainer's last step, or None for a constant rate.

    Shapes:
        - **targets:** ``y`` of floats, ``[N]``, ``[N, 1]`` or ``[N, T]``

    Raises:
        ValueError: A setting out of range; in a step: targets that are no floats, or an output of another shape.
    """


class QuantizedGraphRegressor(OfGraphs, _QuantizedRegressor):
    r"""Trains any PyG model that predicts one or more numbers per graph, on batches of graphs.

    As :class:`QuantizedNodeRegressor`; the model is given ``batch`` and ``batch_size`` where it names them.

    Shapes:
        - **targets:** ``y`` of floats, ``[B]``, ``[B, 1]`` or ``[B, T]``
    """
