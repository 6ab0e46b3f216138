"""Models converted, undone and told apart: which layers, what of a model is covered, what would pass a layer by."""

from .convert import convert_as, quantize_like, quantize_model, restore_model, unquantized
from .converted import expect_converted, is_quantized, quantized_layers, quantizers, range_parameters

__all__ = [
    "convert_as",
    "expect_converted",
    "is_quantized",
    "quantize_like",
    "quantize_model",
    "quantized_layers",
    "quantizers",
    "range_parameters",
    "restore_model",
    "unquantized",
]
