"""Launch configurations, argument checks and the debug flag of the Triton backend.

Configurations come from a table by architecture, kernel and words per row: ``configs.json`` here,
overridden by the file that ``QGNN_TRITON_CONFIGS`` names (written by :mod:`.autotune`).  Nothing is
tuned at import or at run time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backend import check_devices
from ..layout import next_power_of_two

__all__ = [
    "CONFIGS_ENV",
    "MAGIC_BITS",
    "MOST_REGISTERS",
    "SECOND_STAGE",
    "UNSPECIALIZED",
    "Config",
    "architecture",
    "check_devices",
    "check_graph",
    "config_for",
    "debug_checks",
    "fewer_codes",
    "launch",
    "launch_options",
    "load_table",
    "on_hip",
    "override",
    "processors",
    "rehearsed_for",
    "table_entry",
    "warp_size",
    "whole_row_tile",
    "word_tile",
]

CONFIGS_ENV = "QGNN_TRITON_CONFIGS"
DEBUG_ENV = "QGNN_DEBUG"
TABLE_VERSION = 1
MAGIC_BITS = 0x4B000000  # of 2^23 in float32, for the kernels' argument ``magic``
# Arguments that make no new binary: sizes of graphs, and a number that the compiler must not see.
UNSPECIALIZED = ("num_items", "num_partial", "num_rows", "magic")
MORE_REGISTERS, MOST_REGISTERS = 168, 248  # of a thread: three programs of 128 threads fit a processor, or two
MAX_ROWS = 256  # of a program: the row alignment of schedules
REHEARSED_PROCESSORS = 132
MAX_ROW_WORDS = 4096  # of kernels that hold a row in one tile

_debug: ContextVar[bool | None] = ContextVar("qgnn_triton_debug", default=None)
_rehearsed: ContextVar[str | None] = ContextVar("qgnn_triton_target", default=None)
_override: ContextVar[dict[str, Config] | None] = ContextVar("qgnn_triton_config", default=None)


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        num_warps: Warps per program.
        words_per_thread: Packed words that a thread holds of a tile; 4 makes 16-byte loads.
        max_codes: How many codes these words may hold: more would not fit the registers.
        tile_words: Widest tile, in words; wider rows take several programs.
        unroll: Gathers in flight per thread: 1, 2 or 4.
        segment: Edges per program of a hub, at most 256.
        max_registers: Of a thread, on NVIDIA; 0 leaves the number to the compiler.
        block_m, block_n, num_stages: Tile of ``linear`` and its pipeline depth.
        block_k: Input positions of ``linear`` up to which a program keeps its weights in shared memory.
        programs: Of ``linear``, per processor, where weights are kept.
    """

    num_warps: int = 4
    words_per_thread: int = 4
    max_codes: int = 64
    tile_words: int = 32
    unroll: int = 4
    segment: int = 256
    max_registers: int = 0
    block_m: int = 64
    block_n: int = 128
    block_k: int = 512
    num_stages: int = 2
    programs: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            power_of_two = isinstance(value, int) and value > 0 and value & (value - 1) == 0
            if not power_of_two and field.name not in ("num_stages", "segment", "max_registers", "programs"):
                raise ValueError(f"Expected '{field.name}' to be a power of two (got {value!r})")
        if self.max_registers % 8 or not 0 <= self.max_registers <= MOST_REGISTERS:
            raise ValueError(
                f"Expected 'max_registers' to be 0, 8, 16, ... or {MOST_REGISTERS} (got {self.max_registers!r})"
            )
        if self.unroll > 4:
            raise ValueError(f"Expected 'unroll' of at most 4 (got {self.unroll})")


def launch_options(config: Config, cuda: bool | None = None) -> dict[str, int]:
    """What the compiler is told for a loop over edges, on CUDA or on another platform (default: torch's own)."""
    cuda = not on_hip() if cuda is None else cuda
    registers = {"maxnreg": config.max_registers} if config.max_registers and cuda else {}
    return {"num_warps": config.num_warps, **registers}


# Of a second stage, which holds one row; with a limit the compiler does not spill for more programs per processor.
SECOND_STAGE = Config(num_warps=4, max_registers=128)


def architecture(device: torch.device) -> str:
    """The table's key for a device: ``"sm_90"``, ``"gfx942"``, or ``"default"`` off the GPU."""
    rehearsed = _rehearsed.get()
    if rehearsed is not None:
        return rehearsed
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def load_table(path: str | None = None) -> dict[str, Any]:
    """The launch table at ``path``, by default the shipped one."""
    file = Path(path) if path else Path(__file__).with_name("configs.json")
    table = json.loads(file.read_text())
    if table.get("version") != TABLE_VERSION:
        raise ValueError(
            f"Expected a launch table of version {TABLE_VERSION} in '{file.name}' (got "
            f"{table.get('version')!r}); run 'python -m qgnn_plugin.kernels.triton.autotune'"
        )
    return table["architectures"]


def table_entry(kernel: str, arch: str, words: int, tables: tuple[dict[str, Any], ...]) -> Config:
    """The first entry of ``tables`` for ``kernel`` and rows of ``words`` words: the architecture's own before the
    default.
    """
    for table in tables:
        for key in (arch, "default"):
            for entry in table.get(key, {}).get(kernel, ()):
                if words <= entry["max_words"]:
                    return Config(**{k: v for k, v in entry.items() if k != "max_words"})
    return Config()


@cache
def _lookup(kernel: str, arch: str, words: int, path: str | None) -> Config:
    return table_entry(kernel, arch, words, (load_table(path), load_table()))


def config_for(kernel: str, device: torch.device, words: int) -> Config:
    """The configuration of ``kernel`` for rows of ``words`` words on ``device``."""
    forced = _override.get()
    if forced is not None and kernel in forced:
        return forced[kernel]
    return _lookup(kernel, architecture(device), words, os.environ.get(CONFIGS_ENV) or None)


@contextmanager
def override(**configs: Config) -> Iterator[None]:
    """Use these configurations in this context, by kernel name (autotuning and tests)."""
    token = _override.set({**(_override.get() or {}), **configs})
    try:
        yield
    finally:
        _override.reset(token)


def word_tile(config: Config, words: int, warp_size: int = 32, bits: int = 8) -> tuple[int, int]:
    """``(rows, words)`` of a program's tile: every thread holds ``words_per_thread`` words, or as many as rows are
    aligned to (more could not be loaded at once), or what ``max_codes`` codes of ``bits`` bits take.
    """
    width = min(next_power_of_two(words), config.tile_words)
    of_thread = max(1, min(config.words_per_thread, words & -words, width, config.max_codes * bits // 32))
    return max(1, min(MAX_ROWS, config.num_warps * warp_size * of_thread // width)), width


def fewer_codes(config: Config, bits: int) -> Config:
    """``config`` for threads that hold something else per code as well: half as many codes and more registers, all
    there are at 1 bit, where a single word has 32 codes.
    """
    most = MOST_REGISTERS if bits == 1 else MORE_REGISTERS
    return replace(config, max_codes=max(1, config.max_codes // 2), max_registers=max(config.max_registers, most))


def whole_row_tile(config: Config, words: int, warp_size: int = 32, bits: int = 8) -> tuple[int, int]:
    """:func:`word_tile` for kernels that need a row in one tile.

    Raises:
        ValueError: If the row is too wide for that.
    """
    if words > MAX_ROW_WORDS:
        raise ValueError(
            f"Expected rows of at most {MAX_ROW_WORDS} words in one tile (got {words}); use fewer features or heads "
            f"per call, or the 'torch' backend"
        )
    rows, tile = word_tile(config, words, warp_size, bits)
    width = next_power_of_two(words)
    return max(1, rows * tile // width), width


def on_hip() -> bool:
    """Whether kernels are compiled for AMD."""
    rehearsed = _rehearsed.get()
    return rehearsed.startswith("gfx") if rehearsed is not None else torch.version.hip is not None


@cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Processors of the card: how many programs run at once, at least."""
    if device.type == "cuda":
        return _processors(device.index)
    return REHEARSED_PROCESSORS if _rehearsed.get() is not None else 1


def warp_size() -> int:
    return 64 if on_hip() else 32


@contextmanager
def rehearsed_for(arch: str) -> Iterator[None]:
    """Configure launches in this context for an architecture that need not be there (``tools/rehearsal.py``)."""
    token = _rehearsed.set(arch)
    try:
        yield
    finally:
        _rehearsed.reset(token)


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Check graph indices in every launch of this context (synchronizes).

    ``QGNN_DEBUG=1`` turns the checks on for the process.
    """
    token = _debug.set(enabled)
    try:
        yield
    finally:
        _debug.reset(token)


def _debugging() -> bool:
    chosen = _debug.get()
    return os.environ.get(DEBUG_ENV, "0") == "1" if chosen is None else chosen


def check_graph(rowptr: Tensor, col: Tensor, num_src: int) -> None:
    """In debug mode, raise unless ``rowptr`` and ``col`` are a CSR graph over ``num_src``
    sources.
    """
    if not _debugging():
        return
    bounds = torch.stack([rowptr[0], rowptr[-1]]).tolist() if rowptr.numel() else [-1, -1]
    if bounds != [0, col.numel()] or bool((rowptr[1:] < rowptr[:-1]).any()):
        raise ValueError(
            f"Expected 'rowptr' to rise from 0 to {col.numel()} (got {bounds[0]} to {bounds[1]}"
            " or a descent); rebuild the plan"
        )
    if col.numel():
        low, high = (int(v) for v in torch.aminmax(col))
        if low < 0 or high >= num_src:
            raise ValueError(
                f"Expected source nodes in [0, {num_src}) (got {low} to {high}); check that the "
                "plan belongs to these features"
            )


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """Launch on ``device``; nothing happens on an empty grid.

    Multiplications and additions are not contracted: the canonical arithmetic rounds each.
    """
    if 0 in grid:
        return
    if max(grid[1:], default=0) > 65535 or grid[0] >= 2**31:
        raise ValueError(f"Expected a grid within the hardware's limits (got {grid})")
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        kernel[grid](*args, **meta, enable_fp_fusion=False)
