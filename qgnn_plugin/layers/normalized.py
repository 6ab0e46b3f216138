"""Weights that are computed before every call: by weight_norm, spectral_norm or pruning, or by a parametrization.

A packed layer holds what comes out of that in eval mode; what it is computed from stays behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["compute_weight", "effective_weight", "is_recomputed", "still", "weight_hooks", "without_sources"]

NAME = "weight"
SOURCES = ("orig", "g", "v", "u", "mask")  # of the tensors it is computed from, after its name
_STATE_HOOKS = (SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook)


def weight_hooks(layer: Any) -> list[Any]:
    """The hooks of ``layer`` that compute its weight."""
    return [hook for hook in layer._forward_pre_hooks.values() if _computes(hook)]


def _computes(hook: Any) -> bool:
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name == NAME
    return isinstance(hook, (SpectralNorm, WeightNorm)) and hook.name == NAME


def is_recomputed(layer: Any) -> bool:
    """Whether more than one hook has a part in the weight, so that none tells what it is."""
    return len(weight_hooks(layer)) > 1


def compute_weight(layer: Any) -> None:
    """What a call of ``layer`` begins with, for those who pass its ``__call__`` by."""
    for hook in weight_hooks(layer) if layer._forward_pre_hooks else ():
        hook(layer, ())


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Let parametrized weights be read without a trace: in training mode spectral normalization iterates with each."""
    inside = [m for lists in model.modules() if isinstance(lists, ParametrizationList) for m in lists.modules()]
    training = [module for module in inside if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def effective_weight(layer: Any) -> Tensor:
    """The weight of ``layer`` in eval mode, as its next call would find it."""
    for hook in weight_hooks(layer):
        if isinstance(hook, SpectralNorm):
            return hook.compute_weight(layer, do_power_iteration=False)
        return hook.apply_mask(layer) if isinstance(hook, BasePruningMethod) else hook.compute_weight(layer)
    return layer.weight


def without_sources(state: dict[str, Any]) -> None:
    """Take from a layer's ``__dict__``, a copy, what its weight is computed from."""
    hooks = state["_forward_pre_hooks"]
    if any(_computes(hook) for hook in hooks.values()):
        state["_forward_pre_hooks"] = type(hooks)((key, hook) for key, hook in hooks.items() if not _computes(hook))
        for name in ("_load_state_dict_pre_hooks", "_state_dict_hooks"):
            kept = ((k, h) for k, h in state[name].items() if not isinstance(getattr(h, "hook", h), _STATE_HOOKS))
            state[name] = type(state[name])(kept)
        for held in (state, state["_parameters"], state["_buffers"]):
            for source in (NAME, *(f"{NAME}_{suffix}" for suffix in SOURCES)):
                held.pop(source, None)
    parametrized = state["_modules"].get("parametrizations")
    if isinstance(parametrized, torch.nn.ModuleDict) and list(parametrized) == [NAME]:
        state["_modules"].pop("parametrizations")
