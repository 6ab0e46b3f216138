"""Loading checkpoints of the user's own LightningModules."""

from __future__ import annotations

from typing import Any, TypeVar

from qgnn_plugin.conversion.checkpoints import checkpointed_class

from .framework import pl

Module = TypeVar("Module", bound=pl.LightningModule)


def load_converted(cls: type[Module], checkpoint_path: Any, **kwargs: Any) -> Module:
    """``cls.load_from_checkpoint`` of a checkpoint whose module was converted, or had converted modules in it.

    ``cls`` itself builds a float module, which cannot hold such a state; the class of a module that
    :func:`qgnn_plugin.quantize_model` has converted can, so that ``type(module).load_from_checkpoint`` works as well.

    Args:
        cls: The LightningModule's class.
        checkpoint_path: The checkpoint.
        **kwargs: As ``load_from_checkpoint`` takes them.

    Returns:
        The module, converted as the saved one was; a float one where that was float.

    Raises:
        ValueError: If the architecture is another.
        TypeError: If ``cls`` is no LightningModule class.
    """
    if not (isinstance(cls, type) and issubclass(cls, pl.LightningModule)):
        raise TypeError(f"expected a LightningModule class (got {cls!r})")
    return checkpointed_class(cls).load_from_checkpoint(checkpoint_path, **kwargs)  # type: ignore[attr-defined]
