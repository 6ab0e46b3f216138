"""Packed layers by blocks of a few edges, and what they are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qgnn_plugin as qgnn

ROWS = "packed: row blocks"


def pair(make: Callable[[], nn.Module], args: Any, bits: int = 4) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    qmodel = qgnn.quantize_model(make().eval(), bits)
    qgnn.calibrate(qmodel, [args], method="ranges").eval()
    return qmodel, qgnn.pack_model(qmodel)


def parts(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [part for name in sorted(value) for part in parts(value[name])]
    if isinstance(value, (tuple, list)):
        return [part for item in value for part in parts(item)]
    return [] if value is None else [value]


def assert_same(found: Any, expected: Any) -> None:
    assert len(parts(found)) == len(parts(expected))
    for one, other in zip(parts(found), parts(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5 * float(other.abs().max() + 1))


def runs(packed: nn.Module) -> set[str]:
    return {layer.runs for layer in qgnn.summary(packed).layers}
