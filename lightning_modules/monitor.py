"""Ranges, multipliers, errors and energies of a quantized model, to any logger of Lightning."""

from __future__ import annotations

from typing import Any

import torch

import qgnn_plugin as qgnn
from qgnn_plugin.analysis.findings import site_values
from qgnn_plugin.analysis.history import quantization_series
from qgnn_plugin.conversion.converted import is_quantized

from .framework import MisconfigurationException, pl


class QuantizationMonitor(pl.Callback):
    r"""Logs what moves in a quantized model while it trains, to TensorBoard, CSV or any other logger of the trainer.

    With every ``every_n_steps``-th optimizer step, ``qgnn/low/<site>`` and ``qgnn/high/<site>``, the ends of every
    range, and ``qgnn/lambda/<layer>`` and ``qgnn/violation/<layer>`` of the smoothness constraint
    (:func:`qgnn_plugin.analysis.history.quantization_series`).  With ``data``, at the end of training also
    ``qgnn/error/<layer>``, ``qgnn/energy/<layer>`` and ``qgnn/float_energy/<layer>``
    (:func:`qgnn_plugin.error_report`), and, to loggers that take histograms, the values at every site.

    :func:`qgnn_plugin.report` draws what Lightning's ``CSVLogger`` has written of it.

    Args:
        every_n_steps: Optimizer steps from one record to the next.
        data: One graph to measure errors and energies on.

    Raises:
        MisconfigurationException: ``every_n_steps`` below 1.
    """

    def __init__(self, every_n_steps: int = 1, data: Any = None) -> None:
        if every_n_steps < 1:
            raise MisconfigurationException(f"expected every_n_steps >= 1 (got {every_n_steps})")
        self.every_n_steps, self.data = every_n_steps, data
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:  # gradients are still accumulating
            return
        self._step = step
        if step % self.every_n_steps == 0:
            self._log(trainer, quantization_series(pl_module), step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.data is None or not trainer.is_global_zero or not is_quantized(pl_module):
            return
        model = getattr(pl_module, "model", pl_module)
        data = self.data.to(pl_module.device) if hasattr(self.data, "to") else self.data
        found: dict[str, float] = {}
        for layer in qgnn.error_report(model, data).layers:
            values = {"error": layer.relative, "energy": layer.energy, "float_energy": layer.float_energy}
            found |= {f"qgnn/{name}/{layer.name}": value for name, value in values.items() if value is not None}
        self._log(trainer, found, trainer.global_step)
        for logger in trainer.loggers:
            add = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if add is not None:
                for site in site_values(model, data):
                    add(f"qgnn/values/{site.name}", site.values, trainer.global_step)

    @staticmethod
    @torch.no_grad()
    def _log(trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        # Not pl_module.log: that keeps to log_every_n_steps, which a full-batch epoch of one step never reaches.
        if trainer.is_global_zero and values:
            for logger in trainer.loggers:
                logger.log_metrics(values, step)
