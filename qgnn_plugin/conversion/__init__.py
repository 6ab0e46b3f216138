"""Models converted, undone and told apart: which layers, what of a model is covered, what would pass a layer by."""

from .convert import quantize_like, quantize_model, restore_model, unquantized

__all__ = ["quantize_like", "quantize_model", "restore_model", "unquantized"]
