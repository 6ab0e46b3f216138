"""Graph neural networks of PyTorch Geometric in 2, 4 or 8 bits.

One line converts a model, it trains as before, one more packs it::

    qmodel = qgnn_plugin.quantize_model(model, bits=4)
"""

from . import training
from .calibration import calibrate
from .config import QuantConfig, SMPConfig
from .conversion import is_quantized, quantize_like, quantize_model, quantizers, range_parameters, restore_model
from .layers import QuantizedLayer, register_layer
from .layers.graph import fixed_graph
from .packing import (
    CapturedModel,
    PackedBytes,
    PackedEmbeddings,
    PackedLayer,
    capture,
    is_packed,
    load_packed,
    pack_model,
    packed_bytes,
    save_packed,
)
from .quantizers import QLRQuantizer, QuantizedTensor
from .quantizers.compressed import compressed_activations
from .report import Summary, summary
from .smp import MultiplierState, SMPropagation, differential_multiplier_step, smp_layers
from .smp.error import ErrorReport, error_report

__version__ = "0.1.0"

__all__ = [
    "CapturedModel",
    "ErrorReport",
    "MultiplierState",
    "PackedBytes",
    "PackedEmbeddings",
    "PackedLayer",
    "QLRQuantizer",
    "QuantConfig",
    "QuantizedLayer",
    "QuantizedTensor",
    "SMPConfig",
    "SMPropagation",
    "Summary",
    "calibrate",
    "capture",
    "compressed_activations",
    "differential_multiplier_step",
    "error_report",
    "fixed_graph",
    "is_packed",
    "is_quantized",
    "load_packed",
    "pack_model",
    "packed_bytes",
    "quantize_like",
    "quantize_model",
    "quantizers",
    "range_parameters",
    "register_layer",
    "restore_model",
    "save_packed",
    "smp_layers",
    "summary",
    "training",
]
