"""Quantizers with a range, and their error."""

import torch
from torch import Tensor

from qgnn_plugin import QLRQuantizer

BITS = (2, 4, 8)


def fitted(x: Tensor, bits: int = 4, **options: object) -> QLRQuantizer:
    quantizer = QLRQuantizer(bits, site="conv1.input", **options)  # type: ignore[arg-type]
    quantizer.set_range(x)
    return quantizer.eval()


def dequantized(x: Tensor, bits: int = 4, **options: object) -> Tensor:
    return fitted(x, bits, **options)(x).dequantize()


def relative_error(x: Tensor, bits: int = 4, **options: object) -> float:
    error = dequantized(x, bits, **options).detach().double() - x.double()
    return float(error.norm() / x.double().norm())


def binary(rows: int = 30, columns: int = 200) -> Tensor:
    return (torch.rand(rows, columns) < 0.1).float()
