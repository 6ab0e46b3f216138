"""Quantizers with learnable ranges."""

from .functional import quantize_codes
from .qlr import QLRQuantizer, RangeKind
from .range_search import search_range
from .tensor import QuantizedTensor

__all__ = ["QLRQuantizer", "QuantizedTensor", "RangeKind", "quantize_codes", "search_range"]
