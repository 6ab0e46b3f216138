"""What a quantization site does to what passes it: the error measured, and its bound (docs/error_bound.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quantizers import QLRQuantizer, QuantizedTensor
from ..quantizers.functional import FINE_LEVELS

__all__ = ["Injection", "bypassed", "injection", "watched"]


@dataclass(frozen=True)
class Injection:
    """``||(Q(v) - v) / s||`` at a site, and its bound from the step size and what lies outside the range."""

    error: float
    bound: float


Passed = list[tuple[Tensor, QuantizedTensor]]


@contextmanager
def watched(*quantizers: QLRQuantizer | None) -> Iterator[list[Passed]]:
    """What passes each quantizer, in order."""
    seen: list[Passed] = [[] for _ in quantizers]
    with ExitStack() as stack:
        for quantizer, passed in zip(quantizers, seen, strict=True):
            if quantizer is not None:

                def note(_: Any, args: Any, out: QuantizedTensor, passed: Passed = passed) -> None:
                    passed.append((args[0], out))

                stack.callback(quantizer.register_forward_hook(note).remove)
        yield seen


@contextmanager
def bypassed(*quantizers: QLRQuantizer | None) -> Iterator[None]:
    """Let values pass unquantized."""
    chosen = [q for q in quantizers if q is not None]
    try:
        for quantizer in chosen:
            quantizer.observe()
        yield
    finally:
        for quantizer in chosen:
            quantizer.abort()


def injection(quantizer: QLRQuantizer, passed: tuple[Tensor, QuantizedTensor], source: Tensor | None) -> Injection:
    """The error of one use of a site.

    Args:
        quantizer: The site.
        passed: What came and what went, as :func:`watched` found them.
        source: Factor ``[N, 1]`` that the values were scaled by, or :obj:`None`; a node of factor 0 sends nothing.
    """
    x, out = passed
    x = x if x.layout == torch.strided else x.to_dense()
    unscaled = x.new_ones(()) if source is None else torch.where(source > 0, 1 / source, torch.zeros_like(source))
    error = float(((out.dequantize() - x) * unscaled).norm())
    if out.qmax is None or quantizer.is_zero_one:
        return Injection(error, error)
    half = out.scale / 2
    if quantizer.skew is not None:  # the code is rounded twice, and shifted in between
        half = half + out.scale * (out.qmax / FINE_LEVELS) * (0.5 + quantizer.skew.abs())
    upper = out.lower + out.scale * out.qmax
    outside = (x - torch.minimum(torch.maximum(x, out.lower), upper)).abs()
    bound = (half * unscaled).expand_as(x).norm() + (outside * unscaled).norm()
    return Injection(error, float(bound))
