"""What the cases of all kernels share: widths, what launchers pick, and types of arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qgnn_plugin.kernels.layout import row_words
from qgnn_plugin.kernels.triton.launch import SECOND_STAGE, Config, load_table, table_entry, word_tile

from ..case import TARGETS

__all__ = [
    "AGGREGATE_TYPES",
    "COLUMN",
    "HUB_TYPES",
    "ONE",
    "PACKED_TYPES",
    "ROW",
    "UNIT_TYPES",
    "WARP",
    "WIDTHS",
    "codes_per_turn",
    "heads_of",
    "second_stage",
    "shapes",
    "table_config",
    "tile_constants",
    "without",
]

ONE, COLUMN, ROW = 0, 1, 2
WARP = {name: target[2] for name, target in TARGETS.items()}
WIDTHS = {"small": (64, 256), "full": (8, 33, 64, 100, 128, 256, 512)}
ODD_WIDTHS = (8, 33, 100)  # which have one head
BITS = {"small": (2, 4), "full": (1, 2, 4, 8)}


def shapes(grid: str) -> Iterator[tuple[int, int]]:
    """``(bits, num_features)`` of a grid."""
    for bits in BITS[grid]:
        for width in WIDTHS[grid]:
            yield bits, width


def table_config(kernel: str, words: int, target: str) -> Config:
    """What the launcher picks from the shipped table on an architecture."""
    return table_entry(kernel, target, words, (load_table(),))


def tile_constants(features: int, bits: int, config: Config, target: str) -> dict[str, Any]:
    """What a kernel is told of rows of words, and of the tile of them that a program has."""
    words = row_words(features, bits)
    rows, width = word_tile(config, words, WARP[target], bits)
    return {"F": features, "W": words, "BITS": bits, "ROWS": rows, "WORDS": width}


def codes_per_turn(constants: dict[str, Any], config: Config, target: str) -> float:
    """Codes per thread and turn of a loop over edges (padding columns do not count)."""
    threads = config.num_warps * WARP[target]
    words = constants["ROWS"] * min(constants["WORDS"], constants["W"]) / threads
    return max(words, 1) * 32 / constants["BITS"] * config.unroll


def second_stage() -> dict[str, Any]:
    """How kernels are compiled that add up the parts of long rows."""
    return {"num_warps": SECOND_STAGE.num_warps, "max_registers": SECOND_STAGE.max_registers}


def without(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    """All ``constants`` but those ``names``."""
    return {k: v for k, v in constants.items() if k not in names}


def heads_of(features: int) -> int:
    """Heads of attention over so many features."""
    return 1 if features in ODD_WIDTHS else 4


AGGREGATE_TYPES = {
    "words": "*i32", "col": "*i32", "row_of": "*i32", "begin_of": "*i64", "length_of": "*i32",
    "slot_of": "*i32", "scale": "*fp32", "offset": "*fp32", "dst_scale": "*fp32", "bias": "*fp32",
    "out": "*fp32", "num_items": "i32", "num_partial": "i32", "partial": "*i32", "magic": "i32",
}  # fmt: skip
HUB_TYPES = {
    "partial": "*i32", "rowptr": "*i64", "hub_row": "*i32", "hub_first": "*i32",
    "hub_count": "*i32", "scale": "*fp32", "offset": "*fp32", "dst_scale": "*fp32",
    "bias": "*fp32", "out": "*fp32", "num_partial": "i32",
}  # fmt: skip
PACKED_TYPES = {"out": "*i32", "out_scale": "*fp32", "out_offset": "*fp32"}
UNIT_TYPES = PACKED_TYPES | {"out_unit": "*fp32", "out_multiplier": "*u8"}
