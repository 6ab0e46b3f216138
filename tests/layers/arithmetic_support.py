"""What arithmetic over codes is compared by."""

from typing import Any

from torch import Tensor

from qgnn_plugin import QLRQuantizer


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Relative to the largest value."""
    error = float((actual.detach().double() - expected.detach()).abs().max())
    largest = float(expected.detach().abs().max())
    assert error <= tolerance * largest + 1e-12, f"off by {error / largest:.2g} of the largest value"


def fitted(x: Tensor, bits: int, **options: Any) -> QLRQuantizer:
    quantizer = QLRQuantizer(bits, **options)
    quantizer.set_range(x)
    return quantizer.eval()
