"""Training of quantized graph neural networks with PyTorch Lightning, under either of its names."""

from .calibration import RangeCalibration
from .checkpoint import load_converted
from .classifiers import QuantizedGraphClassifier, QuantizedNodeClassifier
from .data import LinkDataModule, NodeDataModule, SampledNodeDataModule
from .links import QuantizedLinkPredictor
from .monitor import QuantizationMonitor
from .multiplier import DifferentialMultiplier
from .random_state import RandomState
from .regressors import QuantizedGraphRegressor, QuantizedNodeRegressor

__all__ = [
    "DifferentialMultiplier",
    "LinkDataModule",
    "NodeDataModule",
    "QuantizationMonitor",
    "QuantizedGraphClassifier",
    "QuantizedGraphRegressor",
    "QuantizedLinkPredictor",
    "QuantizedNodeClassifier",
    "QuantizedNodeRegressor",
    "RandomState",
    "RangeCalibration",
    "SampledNodeDataModule",
    "load_converted",
]
