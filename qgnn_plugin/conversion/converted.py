"""What a model is, and which converted layers, quantizers and ranges it holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.base import QuantizedLayer, SwappedLayer
from ..quantizers import QLRQuantizer

__all__ = [
    "check_unconverted",
    "expect_converted",
    "expect_trainable",
    "expect_values",
    "is_packed",
    "is_quantized",
    "kind_of",
    "quantized_layers",
    "quantizers",
    "range_parameters",
]

SPECS = "_packed_specs"  # attribute of a packed model: the description of every converted layer, in order


def _state(model: Any) -> str:
    """``"plain"``, ``"converted"``, ``"packed"``, or empty for what is no module."""
    if not isinstance(model, nn.Module):
        return ""
    return "packed" if is_packed(model) else "converted" if is_quantized(model) else "plain"


def kind_of(model: Any) -> str:
    """What ``model`` is, for errors."""
    return " ".join(filter(None, ("a", _state(model), type(model).__name__)))


_REMEDIES = {
    "": "give the model itself",
    "packed": "go on from the model that pack_model was given: packed weights are integers, made for inference only",
    "plain": "convert it first: qgnn_plugin.quantize_model(model)",
}


def expect_converted(model: Any) -> None:
    """Raise unless ``model`` was made by :func:`quantize_model`.

    Raises:
        TypeError: If it is no module.
        ValueError: If it is plain or packed.
    """
    state = _state(model)
    if state == "converted":
        return
    error = ValueError if state else TypeError
    raise error(f"Expected a model made by quantize_model (got {kind_of(model)}); {_REMEDIES[state]}")


def expect_trainable(model: Any) -> None:
    """Raise where ``model`` is packed, or no model."""
    state = _state(model)
    if state in ("", "packed"):
        error = ValueError if state else TypeError
        raise error(f"Expected a model to train (got {kind_of(model)}); {_REMEDIES[state]}")


def expect_values(model: nn.Module) -> None:
    """Raise where ranges of ``model`` are on the device ``meta``, which holds no values."""
    empty = (name for name, m in model.named_modules() if isinstance(m, QLRQuantizer) and m.kind.is_meta)
    if (name := next(empty, None)) is not None:
        raise ValueError(
            f"Expected a model with values (got '{name}' on the device 'meta'); give it some: "
            f"model.to_empty(device='cpu'), then load_state_dict"
        )


def check_unconverted(model: nn.Module) -> None:
    if _state(model) == "packed":
        raise ValueError(f"Expected a plain model (got {kind_of(model)}); {_REMEDIES['packed']}")
    converted = [name for name, m in model.named_modules() if isinstance(m, QuantizedLayer)]
    if converted:
        raise ValueError(
            f"Expected a plain model (got one whose layers are already quantized: {', '.join(converted[:5])}"
            f"{', ...' if len(converted) > 5 else ''}); call qgnn_plugin.restore_model(model) first"
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether ``model`` holds a converted layer."""
    return isinstance(model, nn.Module) and any(isinstance(module, QuantizedLayer) for module in model.modules())


def is_packed(model: nn.Module) -> bool:
    """Whether ``model`` was made by :func:`~qgnn_plugin.pack_model` or :func:`~qgnn_plugin.load_packed`."""
    if not isinstance(model, nn.Module):
        return False
    return SPECS in vars(model) or any(isinstance(m, SwappedLayer) and m._is_packed for m in model.modules())


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Every converted layer, by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def quantizers(model: nn.Module) -> dict[str, QLRQuantizer]:
    """Every quantizer, by qualified name; shared ones once.  None in a plain model.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If it is packed.
    """
    expect_trainable(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, QLRQuantizer)}


def range_parameters(qmodel: nn.Module) -> list[nn.Parameter]:
    """The learnable ranges (log scales and offsets), for an optimizer group of their own.  None in a plain model.

    Raises:
        TypeError: If ``qmodel`` is no module.
        ValueError: If it is packed.
    """
    return [p for q in quantizers(qmodel).values() for p in q.parameters(recurse=False)]
