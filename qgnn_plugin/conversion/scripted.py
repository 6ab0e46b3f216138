"""Parts of a model that :func:`torch.jit.script` compiled, as the modules they were compiled from.

Compiled code cannot be converted.  What it was compiled from is known where it is made of :mod:`torch.nn`'s own layers,
as an MLP is that was compiled for speed: these are put in its place, and compiled again when the model is restored.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .copying import copy_model

__all__ = ["close_scripted", "open_scripted", "opened_copy"]

MARK = "_was_scripted"
MISSING = object()

# Layers whose forward is told by their constants, parameters, buffers and children.
KNOWN = {
    f"{cls.__module__}.{cls.__qualname__}": cls
    for cls in (
        nn.Sequential, nn.Linear, nn.Identity, nn.Flatten,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
        nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.PReLU, nn.Softmax,
        nn.LogSoftmax, nn.Dropout, nn.AlphaDropout, nn.LayerNorm, nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm,
    )
}  # fmt: skip


NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm)
OPTIONAL_PARAMETERS = ("weight", "bias")
OPTIONAL_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def open_scripted(model: nn.Module) -> nn.Module:
    """Put eager modules in the place of compiled ones that hold linear layers, in place where ``model`` is not one.

    Returns:
        ``model``, or what stands for it.
    """
    for parent in list(model.modules()):
        if isinstance(parent, torch.jit.ScriptModule):
            continue
        for name, child in parent._modules.items():
            if isinstance(child, torch.jit.ScriptModule):
                parent._modules[name] = _opened(child)
    return _opened(model)


def opened_copy(model: nn.Module) -> nn.Module:
    """``model``, or a copy of it after :func:`open_scripted` where it holds compiled parts."""
    if not any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return model
    return open_scripted(copy_model(model))


def close_scripted(model: nn.Module) -> nn.Module:
    """Undo :func:`open_scripted`."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and MARK in child.__dict__:
                parent._modules[name] = _compiled(child)
    return _compiled(model) if MARK in model.__dict__ else model


def _opened(module: nn.Module) -> nn.Module:
    if not isinstance(module, torch.jit.ScriptModule):
        return module
    eager = _eager(module)
    if eager is None or not any(isinstance(inner, nn.Linear) for inner in eager.modules()):
        return module
    eager.__dict__[MARK] = True
    return eager


def _compiled(module: nn.Module) -> nn.Module:
    del module.__dict__[MARK]
    return torch.jit.script(module)


def _eager(module: Any) -> nn.Module | None:
    """What ``module`` was compiled from, with its own parameters; :obj:`None` where that is not known."""
    name = re.sub(r"^__torch__\.|___torch_mangle_\d+\.", "", module._c._type().qualified_name())
    cls = KNOWN.get(name)
    if cls is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    eager: Any = cls.__new__(cls)
    nn.Module.__init__(eager)
    eager.training = module.training
    for key, parameter in module.named_parameters(recurse=False):
        if not isinstance(parameter, nn.Parameter):  # of a copy
            parameter = nn.Parameter(parameter.detach(), parameter.requires_grad)
        eager.register_parameter(key, parameter)
    for key, buffer in module.named_buffers(recurse=False):
        eager.register_buffer(key, buffer)
    for key, child in module.named_children():
        inner = _eager(child)
        if inner is None:
            return None
        eager.add_module(key, inner)
    for key in _settings(cls):
        if key not in eager._parameters and key not in eager._buffers:
            value = getattr(module, key, MISSING)
            if value is MISSING:
                return None
            setattr(eager, key, value)
    for key in OPTIONAL_PARAMETERS if isinstance(eager, (nn.Linear, *NORMS)) else ():
        eager._parameters.setdefault(key, None)
    for key in OPTIONAL_BUFFERS if isinstance(eager, (nn.BatchNorm1d, nn.InstanceNorm1d)) else ():
        eager._buffers.setdefault(key, None)
    return eager


def _settings(cls: type[nn.Module]) -> Iterator[str]:
    """What instances of a layer type hold beside children."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        names |= dict.fromkeys(getattr(base, "__constants__", ()))
        names |= dict.fromkeys(inspect.get_annotations(base))
    yield from (k for k in names if not k.startswith("_") and k not in (*OPTIONAL_PARAMETERS, *OPTIONAL_BUFFERS))
