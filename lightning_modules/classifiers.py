"""LightningModules that train and evaluate any PyG classifier, quantized or float."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch_geometric.data import Data
from torchmetrics.classification import MulticlassAccuracy

from qgnn_plugin.checkpoints import ConvertsOnLoad
from qgnn_plugin.inputs import model_inputs
from qgnn_plugin.training import distillation_loss, parameter_groups

from .calibration import RangeCalibration
from .distillation import Teacher
from .random_state import RandomState

Split = Literal["train", "val", "test"]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class _QuantizedClassifier(ConvertsOnLoad, pl.LightningModule):
    """What node and graph classifiers share: all but the choice of rows and labels."""

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
        super().__init__()
        if num_classes is None:
            num_classes = getattr(model, "out_channels", None)
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(
                f"expected num_classes >= 2 (got {num_classes!r}): {type(model).__name__} has no "
                "such `out_channels` to take it from, pass num_classes="
            )
        if temperature <= 0 or not 0 <= distillation_weight <= 1:
            raise ValueError(
                "expected temperature > 0 and distillation_weight in [0, 1] "
                f"(got {temperature} and {distillation_weight})"
            )
        if schedule not in ("cosine", None):
            raise ValueError(f"expected schedule 'cosine' or None (got {schedule!r})")
        self.save_hyperparameters(ignore=["model", "teacher"])
        self.model = model
        self.num_classes = num_classes
        self.lr, self.weight_decay, self.range_lr = lr, weight_decay, range_lr
        self.distillation_weight, self.temperature = distillation_weight, temperature
        self.schedule = schedule
        self.teacher = None if teacher is None else Teacher(teacher, model)
        for split in ("train", "val", "test"):
            metric = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            setattr(self, f"{split}_acc", metric)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Class logits of the model; takes what the model's own ``forward`` takes."""
        return self.model(*args, **kwargs)

    def model_inputs(self, batch: Data) -> Inputs:
        """Positional and keyword arguments of the model for ``batch``. Override for other fields.

        By default those of :func:`qgnn_plugin.inputs.model_inputs`: ``x``, the adjacency, and the
        fields such as ``edge_weight`` that the batch has and the model's ``forward`` names.
        """
        return model_inputs(self.model, batch)

    def scored(self, batch: Data) -> slice:
        """The rows of the model's output that count."""
        return slice(None)

    def labelled(self, batch: Data, split: Split) -> Tensor | None:
        """Boolean mask of the scored rows whose label ``split`` may use; None for all of them."""
        return None

    def is_constant(self, batch: Data) -> bool:
        """Whether the same batch comes again each epoch, so that the teacher need run only once."""
        return False

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        args, kwargs = self.model_inputs(batch)
        logits = self(*args, **kwargs)[self.scored(batch)]
        loss = self._evaluate(logits, batch, "train")
        weight = self.distillation_weight
        if self.teacher is None or weight == 0:
            return loss
        soft = self.teacher(args, kwargs, constant=self.is_constant(batch))[self.scored(batch)]
        distilled = distillation_loss(logits, soft, temperature=self.temperature)
        return (1 - weight) * loss + weight * distilled

    def validation_step(self, batch: Data, batch_idx: int) -> None:
        self._evaluate(self.predict_step(batch, batch_idx), batch, "val")

    def test_step(self, batch: Data, batch_idx: int) -> None:
        self._evaluate(self.predict_step(batch, batch_idx), batch, "test")

    def predict_step(self, batch: Data, batch_idx: int) -> Tensor:
        """Logits of the scored rows, ``[rows, num_classes]``."""
        args, kwargs = self.model_inputs(batch)
        return self(*args, **kwargs)[self.scored(batch)]

    def _evaluate(self, logits: Tensor, batch: Data, split: Split) -> Tensor:
        """Cross-entropy over the labelled rows, which is logged along with the accuracy."""
        labels = self._labels(batch)
        if logits.shape != (labels.numel(), self.num_classes):
            raise ValueError(
                f"expected logits of shape [{labels.numel()}, {self.num_classes}] "
                f"(got {list(logits.shape)}): one row per label, one column per class"
            )
        mask = self.labelled(batch, split)
        if mask is not None:
            logits, labels = logits[mask], labels[mask]
        count = labels.numel()
        # Not the mean: a sampled batch may hold no labelled node, and 0 / 0 would end the training.
        loss = F.cross_entropy(logits, labels, reduction="sum") / max(count, 1)
        accuracy = getattr(self, f"{split}_acc")
        if count:
            accuracy.update(logits.detach(), labels)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": count}
        self.log(f"{split}_loss", loss.detach(), sync_dist=True, prog_bar=True, **options)
        self.log(f"{split}_acc", accuracy, prog_bar=split != "train", **options)
        return loss

    def _labels(self, batch: Data) -> Tensor:
        labels = batch.y[self.scored(batch)]
        if labels.dim() == 2 and labels.size(1) == 1:
            labels = labels.squeeze(1)
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"expected integer labels `y` of shape [N] or [N, 1] (got {labels.dtype} of shape {list(labels.shape)})"
            )
        return labels

    def on_fit_start(self) -> None:
        if not any(module.training for module in self.model.modules()):
            self.model.train()  # Lightning keeps the mode; a model frozen in part keeps its own
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_fit_end(self) -> None:
        if self.teacher is not None:
            self.teacher.forget()

    def configure_callbacks(self) -> Sequence[pl.Callback]:
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [kind() for kind in (RangeCalibration, RandomState) if kind not in present]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = parameter_groups(self.model, self.lr, self.weight_decay, self.range_lr)
        optimizer = torch.optim.Adam(groups, lr=self.lr)
        if self.schedule is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 0:
            raise MisconfigurationException(
                "schedule='cosine' needs to know the last step: set Trainer(max_steps=...), or "
                "max_epochs with a loader that has a length; or pass schedule=None"
            )
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class QuantizedNodeClassifier(_QuantizedClassifier):
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

    def scored(self, batch: Data) -> slice:
        # Not getattr: the `batch_size` of a collated Batch is its number of graphs.
        return slice(batch.batch_size) if "batch_size" in batch else slice(None)

    def labelled(self, batch: Data, split: Split) -> Tensor | None:
        mask = batch.get(f"{split}_mask")
        if mask is None:
            return None
        if mask.dim() != 1:
            raise ValueError(
                f"expected a `{split}_mask` of shape [N] (got {list(mask.shape)}): choose a split, "
                "for example with NodeDataModule(data, split=0)"
            )
        return mask[self.scored(batch)]

    def is_constant(self, batch: Data) -> bool:
        return "batch_size" not in batch


class QuantizedGraphClassifier(_QuantizedClassifier):
    r"""Trains any PyG graph classifier, quantized or float, on batches of graphs.

    As :class:`QuantizedNodeClassifier`, with one row of logits and one label ``y`` per graph. Where
    its ``forward`` names them, the model is given ``batch``, the graph that each node belongs to,
    and ``batch_size``, the number of graphs.

    Shapes:
        - **input:** what ``model`` takes
        - **output:** logits :math:`[B, C]`
    """

    def model_inputs(self, batch: Data) -> Inputs:
        args, kwargs = super().model_inputs(batch)
        if "batch_size" in inspect.signature(self.model.forward).parameters:
            kwargs["batch_size"] = batch.num_graphs
        return args, kwargs
