"""What is compiled ahead of time, and for what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["TARGETS", "Case", "is_hip"]

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """One specialization of one kernel.

    Attributes:
        op: The op that launches it.
        label: What distinguishes the case, for people.
        kernel: The jitted function.
        types: Triton types of the run-time arguments; every other argument is a constant.
        constants: Values of the constants (absent tensors are :obj:`None`).
        num_warps, num_stages, max_registers: Launch options.
        codes_per_iteration: Codes that one thread handles per turn of the inner loop, or 0.
        facts: Further figures for the report.
    """

    op: str
    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int = 0
    codes_per_iteration: float = 0
    facts: dict[str, Any] = field(default_factory=dict)


def is_hip(target: str) -> bool:
    return TARGETS[target][0] == "hip"
