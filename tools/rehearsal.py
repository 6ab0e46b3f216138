"""Launches without a GPU: the ops go the whole way of a real launch, kernels are compiled, and nothing runs.

:mod:`.aot` compiles a grid of specializations; a rehearsal compiles what the launchers ask for, as Triton itself
specializes it on the arguments at hand, and holds it against the limits of the card.  Outputs stay unwritten: only
their shapes mean anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from qgnn_plugin.kernels.backend import rehearsing, use_backend
from qgnn_plugin.kernels.triton.launch import rehearsed_for

from .case import TARGETS, is_hip
from .sass import Binary, read_cubin

__all__ = ["Launch", "driven_by", "rehearse"]

MAX_SHARED = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}  # bytes of a program
MAX_THREADS = 1024

_launches: ContextVar[list[Launch]] = ContextVar("qgnn_rehearsed_launches")  # a compiled kernel outlives a rehearsal


@dataclass(frozen=True)
class Launch:
    """One launch that would have been made.

    Attributes:
        kernel: The jitted function's name.
        grid: Programs along the three axes.
        num_warps: Warps per program.
        shared_bytes: Of a program.
        code: The binary; equal for launches of one specialization.
        hip: Whether it is AMD's.
        numbers: Arguments and constants that are numbers, by name.
        tensor_bytes: Of all distinct tensors among the arguments: what is read or written at least once, of the second
            stage of hubs their partial results and no more rows of the rest than there are hubs.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int
    code: bytes
    hip: bool
    numbers: Mapping[str, float] = field(default_factory=dict)
    tensor_bytes: int = 0

    @cached_property
    def binary(self) -> Binary:
        """What the binary shows.

        Raises:
            ValueError: For AMD's, which is read from assembly instead (see :mod:`.aot`).
        """
        if self.hip:
            raise ValueError("Expected an NVIDIA binary (got an AMD one); use the aot module")
        return read_cubin(self.code, self.shared_bytes)


def _touched_bytes(kernel: str, name: str, value: torch.Tensor, programs: int) -> int:
    """Of an argument: all of it, or the rows of as many hubs as there are ``programs``."""
    if not kernel.endswith(("hub_kernel", "hub_peak_kernel")) or name == "partial" or value.dim() == 0:
        return value.nbytes
    return value.nbytes * min(value.size(0), programs) // max(1, value.size(0))


class _Driver(DriverBase):
    """Answers what Triton asks a driver, and notes launches instead of making them."""

    def __init__(self, target: str) -> None:
        self.target, self.hip, self.utils = target, is_hip(target), self

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("Expected no timings in a rehearsal")

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(*TARGETS[self.target])

    def get_current_device(self) -> str:
        return self.target  # compiled kernels are cached by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED[self.target]}

    def load_binary(self, name: str, code: bytes, shared: int, device: str) -> tuple[Any, ...]:
        return object(), code, 0, 0, MAX_THREADS

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names

        def launch(x: int, y: int, z: int, stream: int, code: bytes, *rest: Any) -> None:
            arguments = dict(zip(names, rest[-len(names) :], strict=True))  # hooks and metadata come first
            numbers = {k: v for k, v in arguments.items() if isinstance(v, (int, float))}
            tensors = {
                v.data_ptr(): _touched_bytes(metadata.name, name, v, x)
                for name, v in arguments.items() if isinstance(v, torch.Tensor)
            }  # fmt: skip
            shape = (metadata.num_warps, metadata.shared)
            made = Launch(metadata.name, (x, y, z), *shape, code, self.hip, numbers, sum(tensors.values()))
            _launches.get().append(made)

        return launch


@contextmanager
def rehearse(target: str) -> Iterator[list[Launch]]:
    """Ops on CPU tensors choose the Triton backend in this context and launch on a card that is not there.

    Args:
        target: A key of :data:`.case.TARGETS`.

    Yields:
        The launches, in order, as they are made.

    Raises:
        RuntimeError: Under ``TRITON_INTERPRET=1``, which leaves nothing to compile.
    """
    if target not in TARGETS:
        raise ValueError(f"Expected a target out of {tuple(TARGETS)} (got {target!r})")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("Expected TRITON_INTERPRET to be unset (got 1); use a subprocess")
    launches: list[Launch] = []
    token = _launches.set(launches)
    try:
        with driven_by(target), rehearsed_for(target), rehearsing(), use_backend("triton"):
            yield launches
    finally:
        _launches.reset(token)


@contextmanager
def driven_by(target: str) -> Iterator[None]:
    """Triton takes a key of :data:`.case.TARGETS` for the card that is there, also where kernels ask for it."""
    drivers = triton.runtime.driver
    previous = drivers._active
    drivers.set_active(_Driver(target))
    try:
        yield
    finally:
        drivers._active = previous
