"""Graph neural networks of PyTorch Geometric in 1, 2, 4 or 8 bits.

One line converts a model, it trains as before, one more packs it::

    qmodel = qgnn_plugin.quantize_model(model, bits=4)
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import convs, messages, moved, training  # noqa: F401 - layers, and kernels, are known by these being imported
from .calibration import calibrate
from .config import QuantConfig, SMPConfig
from .conversion.convert import quantize_like, quantize_model, restore_model
from .conversion.converted import is_quantized, quantizers, range_parameters
from .graph.adjacency import fixed_graph
from .layers import QuantizedLayer, register_layer
from .packing import (
    CapturedModel,
    PackedBytes,
    PackedEmbeddings,
    PackedLayer,
    PackedRows,
    capture,
    is_packed,
    load_packed,
    pack_model,
    pack_rows,
    packed_bytes,
    save_packed,
)
from .quantizers import QLRQuantizer, QuantizedTensor
from .quantizers.compressed import compressed_activations
from .smp import MultiplierState, SMPropagation, differential_multiplier_step, smp_layers
from .summaries import Summary, summary
from .warming import warmup

if TYPE_CHECKING:
    from . import data, lightning_modules, recipe
    from .analysis.error_report import ErrorReport, error_report
    from .analysis.report import report
    from .analysis.sensitivity import suggest_bits
    from .exporting import export_package, export_program
    from .onnx import export_onnx
    from .pretrained import PretrainedMixin, from_pretrained, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "CapturedModel",
    "ErrorReport",
    "MultiplierState",
    "PackedBytes",
    "PackedEmbeddings",
    "PackedLayer",
    "PackedRows",
    "PretrainedMixin",
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
    "data",
    "differential_multiplier_step",
    "error_report",
    "export_onnx",
    "export_package",
    "export_program",
    "fixed_graph",
    "from_pretrained",
    "is_packed",
    "is_quantized",
    "lightning_modules",
    "load_packed",
    "pack_model",
    "pack_rows",
    "packed_bytes",
    "quantize_like",
    "quantize_model",
    "quantizers",
    "range_parameters",
    "recipe",
    "register_layer",
    "report",
    "restore_model",
    "save_packed",
    "save_pretrained",
    "smp_layers",
    "suggest_bits",
    "summary",
    "training",
    "warmup",
]

# Not needed to convert and pack a model: sub-packages, and what is imported with the module that it is in.
_SUB_PACKAGES = ("data", "lightning_modules", "onnx", "recipe")
_MODULES = {
    "ErrorReport": "analysis.error_report",
    "PretrainedMixin": "pretrained",
    "error_report": "analysis.error_report",
    "export_onnx": "onnx",
    "export_package": "exporting",
    "export_program": "exporting",
    "from_pretrained": "pretrained",
    "report": "analysis.report",
    "save_pretrained": "pretrained",
    "suggest_bits": "analysis.sensitivity",
}


def __getattr__(name: str) -> Any:
    """Import a sub-package, or a name with its module, when it is first asked for."""
    if name in _SUB_PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MODULES:
        found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
