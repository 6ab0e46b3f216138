"""What measured errors and their bounds are held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.analysis.error_report import LayerError

ROUNDING = 1e-9


def holds(layer: LayerError) -> None:
    pairs = [(step.carried, step.bound) for step in layer.steps] or [(layer.carried, layer.bound)]
    for k, (carried, bound) in enumerate(pairs):
        assert bound is not None
        assert carried <= bound * (1 + ROUNDING) + ROUNDING, f"step {k}: {carried} > {bound}"


def report(layer: nn.Module, args: tuple[Any, ...], config: QuantConfig, shift: float = 0.0) -> LayerError:
    """The report of one layer; ranges are moved by a factor of ``exp(shift)``, so that some values are clipped."""
    qlayer = qgnn.calibrate(qgnn.quantize_model(layer, config=config), args, method="ranges").eval()
    with torch.no_grad():
        for name, parameter in qlayer.named_parameters():
            if name.endswith("log_scale"):
                parameter.add_(shift)
    return qgnn.error_report(qlayer, args).layers[0]
