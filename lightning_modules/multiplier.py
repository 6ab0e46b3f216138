"""The differential multiplier method as a Lightning callback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qgnn_plugin as qgnn
from qgnn_plugin.smp import ConstraintState, MultiplierState, SmoothLayer

from .framework import MisconfigurationException, pl, rank_zero_warn

CHECKPOINT_KEY = "qgnn_constraints"


class DifferentialMultiplier(pl.Callback):
    r"""Moves the multipliers of smoothness-constrained layers, once per optimizer step.

    After each step, every such layer ascends in its multiplier,

    .. math::
        \lambda \leftarrow \max(0, \lambda + \eta_\lambda (g / b + s^2 - 1)),

    on the constraint :math:`g \le b` that its training forward measured; :math:`g` and :math:`b`
    are averaged over accumulated batches and over ranks (in one reduction for all layers), as
    gradients are, so the update is that of the joint batch
    (:func:`qgnn_plugin.differential_multiplier_step`; Platt and Barr, 1987; arXiv 2308.14949).
    Works with any LightningModule that holds a quantized model. Multiplier and slack are buffers of
    the layers, so checkpoints hold them and a resumed run goes on where it stopped.

    Logs ``qgnn/lambda/<layer>`` and ``qgnn/violation/<layer>`` with each step.  Warns once per
    layer when its multiplier has passed half of ``SMPConfig.max_multiplier`` without meeting the
    bound: it is about to saturate, and the bound cannot be met.

    Args:
        log: Whether to log.

    Raises:
        MisconfigurationException: The LightningModule has more than one optimizer: "a step" would
            be ambiguous.
    """

    def __init__(self, *, log: bool = True) -> None:
        self.log = log
        self._step = 0
        self._measured: dict[str, list[ConstraintState]] = {}
        self._silent = False
        self._saturated: set[str] = set()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} acts once per optimizer step and expects one optimizer "
                f"(got {len(trainer.optimizers)}). Use one optimizer with a parameter group each, "
                "or call qgnn_plugin.differential_multiplier_step where a step ends."
            )
        if not qgnn.smp_layers(pl_module):
            rank_zero_warn(
                f"{type(self).__name__} has nothing to do: {type(pl_module).__name__} holds no "
                "smoothness-constrained layer. Convert its model with "
                "quantize_model(model, config=QuantConfig(smp=SMPConfig(...)))."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step  # of this run, a resumed one included
        self._measured.clear()
        self._silent = False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        layers = qgnn.smp_layers(pl_module)
        for name, layer in layers.items():
            if layer._constraint_state is not None and not layer._is_resting:
                self._measured.setdefault(name, []).append(layer._constraint_state)
        if trainer.global_step == self._step:  # gradients are still accumulating
            return
        self._step = trainer.global_step
        for name, measured in self._measured.items():
            layers[name]._constraint_state = _mean(measured)
        self._measured.clear()

        def reduce(value: Tensor) -> Tensor:
            return trainer.strategy.reduce(value, reduce_op="mean")

        states = qgnn.differential_multiplier_step(pl_module, reduce=reduce if trainer.world_size > 1 else None)
        for name, state in states.items():
            if self.log:
                pl_module.log(f"qgnn/lambda/{name}", state.multiplier)
                pl_module.log(f"qgnn/violation/{name}", state.violation)
            if (state.saturating or state.saturated) and name not in self._saturated:
                self._warn_saturated(name, state, layers[name])
        if layers and not states and not self._silent:
            self._silent = True
            rank_zero_warn(
                f"{type(self).__name__} moves nothing: no constraint was measured in a training "
                "step. Layers measure it in training mode."
            )

    def _warn_saturated(self, name: str, state: MultiplierState, layer: SmoothLayer) -> None:
        self._saturated.add(name)
        assert layer._smp is not None
        rank_zero_warn(
            f"The smoothness multiplier of {name!r} saturates: {state.multiplier:.3g} of at most "
            f"{layer._highest_multiplier:.3g}, with a violation of {state.violation:.3g}. The layer "
            "cannot meet its bound: raise SMPConfig(alpha=...) or lower SMPConfig(eta_lambda=...)."
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep which forward pass measures next, and what the last that did has found."""
        checkpoint[CHECKPOINT_KEY] = {
            name: {
                "updates": layer._updates,
                "rests": layer._rests,
                "measured": None if (state := layer._constraint_state) is None else [state.energy, state.bound],
            }
            for name, layer in qgnn.smp_layers(pl_module).items()
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = checkpoint.get(CHECKPOINT_KEY, {})  # none in a checkpoint of an earlier version
        for name, layer in qgnn.smp_layers(pl_module).items():
            if name in kept:
                layer._updates, layer._rests = kept[name]["updates"], kept[name]["rests"]
                if (measured := kept[name]["measured"]) is not None:
                    layer._constraint_state = ConstraintState(*(v.to(layer._smoothing_force.device) for v in measured))

    def state_dict(self) -> dict[str, Any]:
        return {"saturated": sorted(self._saturated)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saturated = set(state_dict["saturated"])


def _mean(states: list[ConstraintState]) -> ConstraintState:
    if len(states) == 1:
        return states[0]
    return ConstraintState(
        torch.stack([state.energy for state in states]).mean(0),
        torch.stack([state.bound for state in states]).mean(0),
    )
