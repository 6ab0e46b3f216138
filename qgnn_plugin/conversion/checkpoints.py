"""Checkpoints of Lightning: a class that loads what its converted modules have saved.

``load_from_checkpoint`` builds a float module from the saved hyperparameters and loads the state dict, which needs the
module converted.  Between the two comes ``on_load_checkpoint``.  Nothing of Lightning is imported: modules are known by
these two methods.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from ..quantizers import QLRQuantizer
from ..saved import CONFIG_KEY
from .converted import expect_trainable, is_quantized

__all__ = ["ConvertsOnLoad", "checkpointed_class", "close_checkpoints", "open_checkpoints"]


class ConvertsOnLoad:
    """Mixin of a LightningModule: loading a checkpoint of a converted module converts a float one as that was.

    Only in ``load_from_checkpoint``.  A module that is handed to a trainer stays what it is.
    """

    _quantize_like: ClassVar[Callable[..., nn.Module]]  # that of :mod:`.convert`, which sets it

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("state_dict", {})
        converted = any(key.endswith(CONFIG_KEY) for key in state)
        if converted and getattr(self, "_trainer", None) is None and not is_quantized(self):
            close_checkpoints(self)
            ConvertsOnLoad._quantize_like(self, state, inplace=True)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


class _Checkpointed(ConvertsOnLoad):
    """Base of the classes made here."""

    wrapped_class: ClassVar[type]

    def on_fit_start(self: Any) -> None:
        """Refuse to train what was packed, as long as nothing else in the module learns.

        Raises:
            ValueError: If so.
        """
        if not any(p.requires_grad for p in self.parameters()):
            expect_trainable(self)
        super().on_fit_start()  # type: ignore[misc]

    def on_validation_model_eval(self: Any) -> None:
        """Let the sanity check, which comes before any training, pass sites that have no range yet, with a warning."""
        super().on_validation_model_eval()  # type: ignore[misc]
        unset = [m for m in self.modules() if isinstance(m, QLRQuantizer) and not m.is_set]
        if unset and self.trainer.sanity_checking:
            warnings.warn(
                f"The sanity check runs without quantization at {len(unset)} sites, whose ranges come from the first "
                f"step of training; the callback RangeCalibration() sets them before",
                stacklevel=2,
            )
            for site in unset:
                site.passes_unset = True

    def on_validation_model_train(self: Any) -> None:
        """End what :meth:`on_validation_model_eval` began."""
        for module in self.modules():
            if isinstance(module, QLRQuantizer):
                vars(module).pop("passes_unset", None)
        super().on_validation_model_train()  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        arguments = tuple(cls.wrapped_class if argument is cls else argument for argument in arguments)
        return _rebuild, (function, arguments), *rest


def _rebuild(function: Any, arguments: tuple[Any, ...]) -> Any:
    module = function(*arguments)
    module.__class__ = checkpointed_class(type(module))
    return module


_CLASSES: dict[type, type] = {}


def checkpointed_class(cls: type) -> type:
    """The subclass of a LightningModule's class that converts on load, made once, under the same name."""
    if issubclass(cls, ConvertsOnLoad):
        return cls
    if cls not in _CLASSES:
        names = ("__module__", "__qualname__", "__doc__")
        namespace = {"wrapped_class": cls, **{name: getattr(cls, name) for name in names}}
        _CLASSES[cls] = type(cls.__name__, (_Checkpointed, cls), namespace)
    return _CLASSES[cls]


def open_checkpoints(model: nn.Module) -> None:
    """Let ``type(module).load_from_checkpoint`` load what the LightningModules in a converted ``model`` save."""
    for module in model.modules():
        if hasattr(type(module), "load_from_checkpoint") and hasattr(type(module), "on_load_checkpoint"):
            module.__class__ = checkpointed_class(type(module))


def close_checkpoints(model: nn.Module) -> None:
    """Undo :func:`open_checkpoints`."""
    for module in model.modules():
        if isinstance(module, _Checkpointed):
            module.__class__ = type(module).wrapped_class
