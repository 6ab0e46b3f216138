"""Ranges from the training data before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import nn

import qgnn_plugin as qgnn
from qgnn_plugin.inputs import is_data, run_model
from qgnn_plugin.quantizers import QLRQuantizer

from .framework import CombinedLoader, MisconfigurationException, isolate_rng, pl

Forward = Callable[[Any, Any], Any]


class RangeCalibration(pl.Callback):
    """Sets the ranges of a quantized model from training batches when ``fit`` starts, if unset.

    A resumed or already calibrated model is left alone. Calibration reads inputs and no labels. It
    comes before the sanity check (whose eval mode needs ranges), draws nothing from the random
    generators of the run, and leaves the ranges of rank 0 on every rank: ranges taken from each
    rank's own first batch would differ for good, since only gradients are averaged.

    Args:
        max_batches: Training batches to calibrate on, at most.
        forward: ``forward(pl_module, batch)`` runs the model once; ``predict_step`` by default,
            where that is not overridden, ``pl_module`` is called with what
            :func:`qgnn_plugin.inputs.model_inputs` finds in the batch.

    Raises:
        MisconfigurationException: ``max_batches`` below 1; no training batches to calibrate on; no way
            to run ``pl_module``.
    """

    def __init__(self, max_batches: int = 8, forward: Forward | None = None) -> None:
        if max_batches < 1:
            raise MisconfigurationException(f"expected max_batches >= 1 (got {max_batches})")
        self.max_batches = max_batches
        self.forward: Forward = forward or _predict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not has_unset_ranges(pl_module):
            return
        with isolate_rng(), trainer.precision_plugin.forward_context():
            # Of single sites: codes for the outputs of today's weights are none for those that training leads to.
            qgnn.calibrate(pl_module, _batches(trainer, self.max_batches), method="ranges", forward=self.forward)
        if trainer.world_size > 1:
            # Not tensor by tensor: a quantizer mirrors what it has on the host while loading.
            pl_module.load_state_dict(trainer.strategy.broadcast(pl_module.state_dict()))


def has_unset_ranges(module: nn.Module) -> bool:
    """Whether a quantizer in ``module`` still waits for its range."""
    return any(isinstance(m, QLRQuantizer) and not m.is_set for m in module.modules())


def _predict(pl_module: Any, batch: Any) -> Any:
    cls = type(pl_module)
    if cls.predict_step is not pl.LightningModule.predict_step:
        return pl_module.predict_step(batch, 0)
    if cls.forward is pl.LightningModule.forward:
        raise MisconfigurationException(
            f"expected a LightningModule with forward or predict_step to calibrate ranges with (got {cls.__name__}); "
            f"say how it runs: RangeCalibration(forward=lambda module, batch: ...)"
        )
    return run_model(pl_module, batch) if is_data(batch) else pl_module.predict_step(batch, 0)


def _batches(trainer: pl.Trainer, count: int) -> Iterator[Any]:
    """The first training batches, in the form that steps will see."""
    trainer.fit_loop.setup_data()  # the loader as the run will use it, sharded over ranks
    if trainer.train_dataloader is None:
        raise MisconfigurationException("expected a train_dataloader to calibrate ranges on")
    # Of several loaders as many as have a part of each.
    for batch, _, _ in islice(iter(CombinedLoader(trainer.train_dataloader, "min_size")), count):
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
