"""A few launch settings of the two kernels that decide, as the default configuration runs them (row multipliers in and
out), each of them compiled beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import row_words
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.triton.launch import Config, config_for, override

from .graphs import generated
from .kernels import aggregate_calls, linear_calls
from .record import Row
from .timing import timed
from .worker import Run, Unit

__all__ = ["calls", "candidates", "units"]

FEATURES, DRY_FEATURES = 256, 16
BITS = (2, 4)
DRY_CANDIDATES = 2

# What is tried of each kernel, one setting at a time from the one in use.
SETTINGS: dict[str, tuple[dict[str, int], ...]] = {
    "aggregate_multiplied": (
        {"num_warps": 2}, {"num_warps": 8}, {"words_per_thread": 2}, {"words_per_thread": 1}, {"unroll": 1},
        {"unroll": 4}, {"segment": 128}, {"max_registers": 96}, {"max_registers": 168},
    ),
    "linear_rows": (  # whose programs have whole rows: the width is not theirs to choose
        {"block_m": 32}, {"block_m": 32, "max_registers": 168, "programs": 3}, {"block_m": 64, "num_warps": 8},
        {"block_m": 128, "num_warps": 8, "programs": 1}, {"block_k": 128}, {"num_stages": 1}, {"num_stages": 3},
        {"max_registers": 0}, {"programs": 1},
    ),
}  # fmt: skip


def candidates(kernel: str, device: torch.device, bits: int, features: int) -> dict[str, Config]:
    """Configurations by what they change; the one in use comes first."""
    used = config_for(kernel, device, row_words(features, bits))
    found = {"as used": used}
    for change in SETTINGS[kernel]:
        config = replace(used, **change)
        if config not in found.values():
            found[" ".join(f"{k}={v}" for k, v in change.items())] = config
    return found


def calls(kernel: str, plan: GraphPlan, bits: int, features: int) -> list[Callable[[], Any]]:
    if kernel == "linear_rows":
        return linear_calls(plan.num_dst, features, features, bits, "rows", plan.device)
    return aggregate_calls(plan, features, bits, "rows")


def units(run: Run) -> Iterator[Unit]:
    plan = generated("170k/2M", run.device, run.dry)
    features = DRY_FEATURES if run.dry else FEATURES
    for bits in BITS[:1] if run.dry else BITS:
        for kernel in SETTINGS:
            found = list(candidates(kernel, run.device, bits, features).items())
            for label, config in found[:DRY_CANDIDATES] if run.dry else found:

                def row(
                    kernel: str = kernel, bits: int = bits, label: str = label, config: Config = config
                ) -> Iterator[Row]:
                    with use_backend(run.backend), override(**{kernel: config}):
                        figures = timed(calls(kernel, plan, bits, features), peak=False)
                    base = {"kind": "tuning", "kernel": kernel, "bits": bits, "features": features, "name": label}
                    yield {**base, "config": asdict(config), **figures}

                yield Unit(f"{kernel} int{bits} {label}", row, (f"{kernel.split('_')[0]} int{bits}",))
