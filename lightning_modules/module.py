"""What the LightningModules of this package share: inputs, teacher, optimizer, logging."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torchmetrics import Metric

from qgnn_plugin.conversion.checkpoints import ConvertsOnLoad
from qgnn_plugin.inputs import Inputs, model_inputs
from qgnn_plugin.training import parameter_groups

from .calibration import RangeCalibration
from .distillation import Teacher
from .framework import MisconfigurationException, pl
from .random_state import RandomState

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class QuantizedModule(ConvertsOnLoad, pl.LightningModule):
    r"""Base of modules that train any PyG model, quantized or float, for one task.

    The loss is :math:`(1 - w) L + w L_{soft}`: the task's loss on labels, and on all rows that count the distance to
    what ``teacher`` says.  A task says what a batch's targets are (:meth:`targets`), what it loses (:meth:`loss`,
    :meth:`distance`), and which metrics it has.

    Logs ``<split>_loss`` and ``<split>_<metric>``.  Two callbacks come with it: :class:`RangeCalibration` and
    :class:`RandomState`.

    Args:
        model: Called as :meth:`model_inputs` says.
        metrics: The task's metrics by name, one copy for each split.
        lr: Learning rate of Adam.
        weight_decay: L2 penalty; ranges have none.
        range_lr: Learning rate of the ranges; ``lr`` by default.
        teacher: Trained float model to distil from; neither trained nor saved.
        distillation_weight: :math:`w`, in [0, 1].
        schedule: ``"cosine"`` to zero at the trainer's last step, or None for a constant rate.
    """

    shown: ClassVar[str]  # the metric of the progress bar

    def __init__(
        self,
        model: nn.Module,
        metrics: dict[str, Metric],
        *,
        lr: float,
        weight_decay: float,
        range_lr: float | None,
        teacher: nn.Module | None,
        distillation_weight: float,
        schedule: Literal["cosine"] | None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module as 'model' (got {type(model).__name__})")
        if not 0 <= distillation_weight <= 1:
            raise ValueError(f"expected distillation_weight in [0, 1] (got {distillation_weight})")
        if schedule not in ("cosine", None):
            raise ValueError(f"expected schedule 'cosine' or None (got {schedule!r})")
        self.model = model
        self.lr, self.weight_decay, self.range_lr = lr, weight_decay, range_lr
        self.distillation_weight, self.schedule = distillation_weight, schedule
        self.teacher = None if teacher is None else Teacher(teacher, model)
        self._metrics_of = tuple(metrics)
        for split in SPLITS:
            for name, metric in metrics.items():
                setattr(self, f"{split}_{name}", metric.clone())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns; takes what the model's own ``forward`` takes."""
        return self.model(*args, **kwargs)

    # What a task says #################################################################################################

    def targets(self, batch: Data, out: Tensor) -> Tensor:
        """The targets of the scored rows, to compare ``out`` with.

        Raises:
            ValueError: If the batch has none, or if they do not fit ``out``.
        """
        raise NotImplementedError

    def loss(self, out: Tensor, targets: Tensor) -> Tensor:
        """The sum of losses over rows."""
        raise NotImplementedError

    def distance(self, out: Tensor, soft: Tensor) -> Tensor:
        """How far ``out`` is from what the teacher says, averaged over rows."""
        raise NotImplementedError

    def scores(self, out: Tensor, batch: Data) -> Tensor:
        """The rows of the model's output that count."""
        return out

    def labelled(self, batch: Data, split: Split) -> Tensor | None:
        """Boolean mask of the scored rows whose label ``split`` may use; None for all of them."""
        return None

    def is_constant(self, batch: Data) -> bool:
        """Whether the same batch comes again each epoch, so that the teacher need run only once."""
        return False

    def model_inputs(self, batch: Data) -> Inputs:
        """Positional and keyword arguments of the model for ``batch``. Override for other fields.

        By default those of :func:`qgnn_plugin.inputs.model_inputs`: ``x``, the adjacency, and the
        fields such as ``edge_weight`` that the batch has and the model's ``forward`` names.
        """
        return model_inputs(self.model, batch)

    # Steps ############################################################################################################

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        args, kwargs = self.model_inputs(batch)
        out = self.scores(self(*args, **kwargs), batch)
        loss = self._evaluate(out, batch, "train")
        weight = self.distillation_weight
        if self.teacher is None or weight == 0:
            return loss
        soft = self.scores(self.teacher(args, kwargs, constant=self.is_constant(batch)), batch)
        return (1 - weight) * loss + weight * self.distance(out, soft)

    def validation_step(self, batch: Data, batch_idx: int) -> None:
        self._evaluate(self.predict_step(batch, batch_idx), batch, "val")

    def test_step(self, batch: Data, batch_idx: int) -> None:
        self._evaluate(self.predict_step(batch, batch_idx), batch, "test")

    def predict_step(self, batch: Data, batch_idx: int) -> Tensor:
        """What the model says of the scored rows."""
        args, kwargs = self.model_inputs(batch)
        return self.scores(self(*args, **kwargs), batch)

    def _evaluate(self, out: Tensor, batch: Data, split: Split) -> Tensor:
        """The mean loss over the labelled rows, which is logged along with the metrics."""
        targets = self.targets(batch, out)
        mask = self.labelled(batch, split)
        if mask is not None:
            out, targets = out[mask], targets[mask]
        count = targets.size(0)
        # Not the mean: a sampled batch may hold no labelled node, and 0 / 0 would end the training.
        loss = self.loss(out, targets) / max(count, 1)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": count}
        self.log(f"{split}_loss", loss.detach(), sync_dist=True, prog_bar=True, **options)
        for name in self._metrics_of:
            metric = getattr(self, f"{split}_{name}")
            if count:
                metric.update(out.detach(), targets)
            self.log(f"{split}_{name}", metric, prog_bar=split != "train" and name == self.shown, **options)
        return loss

    # Training #########################################################################################################

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

    def configure_optimizers(self) -> Any:
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


class OfNodes:
    """Mixin of modules whose rows are nodes, full-batch or sampled.

    Which nodes count:

    * a sampled batch (one that has ``batch_size``): its first ``batch_size`` nodes, the seeds;
    * any other: all of its nodes;
    * and among these, labels are those of ``train_mask``, ``val_mask`` or ``test_mask`` where the
      batch has that mask, else all of them. Seeds drawn from *all* nodes thus distil on the whole
      graph and learn from its training labels.
    """

    def scored(self, batch: Data) -> slice:
        """The rows of the model's output that count."""
        # Not getattr: the `batch_size` of a collated Batch is its number of graphs.
        return slice(batch.batch_size) if "batch_size" in batch else slice(None)

    def scores(self, out: Tensor, batch: Data) -> Tensor:
        return super().scores(out[self.scored(batch)], batch)  # type: ignore[misc]

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


class OfGraphs:
    """Mixin of modules whose rows are graphs: the model is given ``batch``, the graph of each node, and ``batch_size``,
    the number of graphs, where its ``forward`` names them.
    """

    def scored(self, batch: Data) -> slice:
        """All rows."""
        return slice(None)

    def model_inputs(self: Any, batch: Data) -> Inputs:
        if "batch_size" in inspect.signature(self.model.forward).parameters:
            batch = copy.copy(batch)
            batch["batch_size"] = batch.num_graphs
        return super().model_inputs(batch)  # type: ignore[misc]


def label_field(batch: Data, name: str = "y") -> Tensor:
    """The labels of a batch.

    Raises:
        ValueError: If it has none.
    """
    labels = batch.get(name)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"expected labels `{name}` in the batch (got fields {', '.join(sorted(batch.keys())) or 'none'})"
        )
    return labels
