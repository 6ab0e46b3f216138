"""LightningModules that train and evaluate any PyG classifier, quantized or float."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torchmetrics.classification import MulticlassAccuracy

from qgnn_plugin.training import distillation_loss

from .module import OfGraphs, OfNodes, QuantizedModule, label_field

__all__ = ["QuantizedGraphClassifier", "QuantizedNodeClassifier"]


class _QuantizedClassifier(QuantizedModule):
    """What node and graph classifiers share: cross-entropy, soft labels, accuracy."""

    shown = "acc"

    def __init__(
        self,
        model: nn.Module,
        num_classes: int | None = None,
        *,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        range_lr: float | None = None,
        teacher: nn.Module | None = None,
        distillation_weight: float = 0.5,
        temperature: float = 1.0,
        schedule: Literal["cosine"] | None = "cosine",
    ) -> None:
        if num_classes is None:
            num_classes = getattr(model, "out_channels", None)
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(
                f"expected num_classes >= 2 (got {num_classes!r}): {type(model).__name__} has no "
                "such `out_channels` to take it from, pass num_classes=; a model of one output per row is "
                "trained by QuantizedNodeRegressor or QuantizedGraphRegressor"
            )
        if temperature <= 0:
            raise ValueError(f"expected temperature > 0 (got {temperature})")
        metrics: dict[str, Any] = {"acc": MulticlassAccuracy(num_classes, average="micro", validate_args=False)}
        super().__init__(
            model, metrics, lr=lr, weight_decay=weight_decay, range_lr=range_lr, teacher=teacher,
            distillation_weight=distillation_weight, schedule=schedule,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["model", "teacher", "metrics"])
        self.num_classes, self.temperature = num_classes, temperature

    def targets(self: Any, batch: Data, out: Tensor) -> Tensor:
        labels = label_field(batch)[self.scored(batch)]
        if labels.dim() == 2 and labels.size(1) == 1:
            labels = labels.squeeze(1)
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"expected integer labels `y` of shape [N] or [N, 1] (got {labels.dtype} of shape "
                f"{list(labels.shape)}); numbers to predict are for QuantizedNodeRegressor or QuantizedGraphRegressor"
            )
        if out.shape != (labels.numel(), self.num_classes):
            raise ValueError(
                f"expected logits of shape [{labels.numel()}, {self.num_classes}] "
                f"(got {list(out.shape)}): one row per label, one column per class"
            )
        return labels

    def loss(self, out: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(out, targets, reduction="sum")

    def distance(self, out: Tensor, soft: Tensor) -> Tensor:
        return distillation_loss(out, soft, temperature=self.temperature)


class QuantizedNodeClassifier(OfNodes, _QuantizedClassifier):
    r"""Trains any PyG node classifier, quantized or float, full-batch or on sampled mini-batches.

    The loss is :math:`(1 - w) CE + w T^2 CE_{soft}`: cross-entropy over the labelled training
    nodes, and over all nodes that count the soft labels of ``teacher``
    (:func:`qgnn_plugin.training.distillation_loss`); without a teacher, :math:`CE`. Labels outside
    the training nodes are never read in training. Which nodes count:

    * a sampled batch (one that has ``batch_size``): its first ``batch_size`` nodes, the seeds;
    * any other: all of its nodes;
    * and among these, labels are those of ``train_mask``, ``val_mask`` or ``test_mask`` where the
      batch has that mask, else all of them. Seeds drawn from *all* nodes thus distil on the whole
      graph and learn from its training labels.

    Logs ``train_loss``, ``train_acc``, and the same for ``val`` and ``test``. Two callbacks come
    with it: :class:`RangeCalibration` and :class:`RandomState`. A model that is in eval mode
    altogether (as after an evaluation) is put in training mode when ``fit`` starts.

    Args:
        model: Called as ``model(x, edge_index, ...)``, see :meth:`model_inputs`; returns logits.
        num_classes: Number of classes; ``model.out_channels`` by default.
        lr: Learning rate of Adam.
        weight_decay: L2 penalty; ranges have none.
        range_lr: Learning rate of the ranges; ``lr`` by default.
        teacher: Trained float model to distil from. Neither trained nor saved; put in eval mode and
            on the device of the run. On full-batch data it runs once, its logits are kept.
        distillation_weight: :math:`w` above, in [0, 1].
        temperature: :math:`T` above.
        schedule: ``"cosine"`` to zero at the trainer's last step, or None for a constant rate.

    Shapes:
        - **input:** what ``model`` takes
        - **output:** logits :math:`[N, C]`

    Raises:
        ValueError: ``num_classes`` missing, a temperature or weight out of range, a teacher that
            shares parameters with the model; in a step: labels or logits of the wrong shape.
        MisconfigurationException: A cosine schedule without an end.
    """


class QuantizedGraphClassifier(OfGraphs, _QuantizedClassifier):
    r"""Trains any PyG graph classifier, quantized or float, on batches of graphs.

    As :class:`QuantizedNodeClassifier`, with one row of logits and one label ``y`` per graph. Where
    its ``forward`` names them, the model is given ``batch``, the graph that each node belongs to,
    and ``batch_size``, the number of graphs.

    Shapes:
        - **input:** what ``model`` takes
        - **output:** logits :math:`[B, C]`
    """
