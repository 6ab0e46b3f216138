"""Random generators in checkpoints, so that a resumed run is the uninterrupted one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .framework import TrainerFn, pl

KEY = "qgnn_random_state"


class RandomState(pl.Callback):
    """Saves the state of the random generators with each checkpoint, and restores it on resume.

    Lightning checkpoints hold none, so dropout and shuffling differ after a resume. With this
    callback, a run that is resumed from a checkpoint written between two epochs is bitwise the
    uninterrupted one (on CPU, or with deterministic kernels). Covers torch (CPU and CUDA), numpy
    and :mod:`random` in the main process of every rank. A run resumed on another number of ranks
    keeps its fresh generators.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = _collect()
        if trainer.world_size == 1:
            checkpoint[KEY] = [state]
            return
        states: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(states, state)
        checkpoint[KEY] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get(KEY, [])
        if trainer.state.fn == TrainerFn.FITTING and len(states) == trainer.world_size:
            _restore(states[trainer.global_rank])


def _collect() -> dict[str, Any]:
    """Plain values and tensors only: checkpoints are read with ``weights_only=True``."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state, whoever uses it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(_cpu(state["torch"]))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_cpu(s) for s in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))


def _cpu(state: Tensor) -> Tensor:
    """Generator states are host tensors, whatever device a checkpoint was mapped to."""
    return state.to("cpu", torch.uint8)
