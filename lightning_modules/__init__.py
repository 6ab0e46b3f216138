"""Training of quantized graph neural networks with PyTorch Lightning."""

from .calibration import RangeCalibration
from .checkpoint import load_converted
from .classifiers import QuantizedGraphClassifier, QuantizedNodeClassifier
from .data import NodeDataModule
from .multiplier import DifferentialMultiplier
from .random_state import RandomState

__all__ = [
    "DifferentialMultiplier",
    "NodeDataModule",
    "QuantizedGraphClassifier",
    "QuantizedNodeClassifier",
    "RandomState",
    "RangeCalibration",
    "load_converted",
]
