"""Cases of ``linear``."""

from __future__ import annotations

from collections.abc import Iterator

from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER
from qgnn_plugin.kernels.layout import parts_per_byte, row_bytes, row_words
from qgnn_plugin.kernels.linear import triton as linear_module
from qgnn_plugin.kernels.linear.triton_prepared import zero_code
from qgnn_plugin.kernels.triton.launch import rehearsed_for

from ..case import Case, is_hip
from .grid import ONE, PACKED_TYPES, WIDTHS, table_config

__all__ = ["linear_cases"]

LINEAR_OUTPUTS, WIDE_OUTPUTS = 256, 512
HEADS, VECTORS = 4, 2
DOT_TYPES = {"vectors": "*fp32", "dots": "*fp32"}
ROW_TYPES = {"multiplier": "*u8", "out_unit": "*fp32", "out_multiplier": "*u8"}


def linear_cases(grid: str, target: str) -> Iterator[Case]:
    pairs = ((2, 2), (4, 4)) if grid == "small" else ((1, 2), (2, 2), (4, 4), (4, 2), (8, 8))
    widths = WIDTHS[grid] if grid == "full" else (128, 256, 600)
    for x_bits, w_bits in pairs:
        for features in widths:
            yield from _forms(x_bits, w_bits, features, LINEAR_OUTPUTS, target)
    if grid == "full":  # rows as wide as one program has them
        for bits in (2, 4):
            for case in _forms(bits, bits, 256, WIDE_OUTPUTS, target):
                if "rows" in case.label:
                    yield case


def _forms(x_bits: int, w_bits: int, features: int, outputs: int, target: str) -> Iterator[Case]:
    name = f"int{x_bits} x int{w_bits} K={features}" + ("" if outputs == LINEAR_OUTPUTS else f" O={outputs}")
    traffic = row_bytes(outputs, x_bits) + 4
    rows = ROW_TYPES | {"row_scale": "*fp32"}
    for label, out_bits, ranges, more, bytes_out in (
        ("", 0, True, {}, 4 * outputs),
        (" packed", x_bits, True, {"row_scale": "*fp32"}, traffic),
        (" packed, one range", x_bits, False, {"row_scale": "*fp32"}, traffic),
        (" packed, added", x_bits, True, dict.fromkeys(("row_scale", "addend"), "*fp32"), traffic + 4 * outputs),
        (" packed rows", x_bits, False, rows, traffic + 2),
        (" packed rows, added", x_bits, False, rows | {"addend": "*fp32"}, traffic + 4 * outputs + 2),
        (" packed, dots", x_bits, True, DOT_TYPES, traffic + 4 * HEADS * VECTORS),
        (" packed rows, dots", x_bits, True, ROW_TYPES | DOT_TYPES, traffic + 4 * HEADS * VECTORS + 2),
    ):  # fmt: skip
        fused = linear_module.has_heads(features, x_bits, outputs, out_bits, HEADS, VECTORS) if "dots" in more else True
        if fused:
            shape = (features, outputs, x_bits, w_bits, out_bits)
            yield _linear(name + label, *shape, ranges, more, bytes_out, target)


def _linear(
    label: str, features: int, outputs: int, x_bits: int, w_bits: int, out_bits: int, ranges: bool,
    more: dict[str, str], bytes_out: int, target: str,
) -> Case:  # fmt: skip
    """``ranges``: whether every output channel of the weight has a range of its own."""
    hip = is_hip(target)
    dots = "dots" in more
    rows = "out_unit" in more or dots
    config = table_config("linear_rows" if rows else "linear", row_words(features, x_bits), target)
    with rehearsed_for(target):
        tiles = linear_module.tiles_of(config, features, outputs, x_bits, out_bits, "addend" in more, rows)
    constants = {
        "X_BITS": x_bits, "X_BYTES": row_bytes(features, x_bits), "W_ZERO": zero_code(w_bits),
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_B": tiles.block_b, "CHUNKS": tiles.chunks,
        "WHOLE": tiles.whole, "PTX": not hip, "STAGES": config.num_stages,
        "X_SCALE": False, "X_OFFSET": False, "W_SCALE": ranges, "W_OFFSET": ranges, "RELU": not dots,
        "OUT_BITS": out_bits, "OUT_BYTES": row_bytes(outputs, out_bits) if out_bits else 0,
        "OUT_SCALE": ONE, "OUT_OFFSET": ONE, "LARGEST": LARGEST_MULTIPLIER,
        "HEADS": HEADS, "VECTORS": VECTORS if dots else 0,
    }  # fmt: skip
    types = dict.fromkeys(("x", "w"), "*i8") | dict.fromkeys(("x_words", "column_sum"), "*i32")
    types |= dict.fromkeys(("num_rows", "num_items", "num_out"), "i32")
    floats = ("column_term", "x_scale", "x_offset", "w_scale", "w_offset", "bias", "out")
    types |= dict.fromkeys(floats, "*fp32") | more
    if out_bits:
        types |= PACKED_TYPES | {"out": "*i8"}
    positions = tiles.chunks * tiles.block_b * parts_per_byte(x_bits)
    facts = {
        "bits": x_bits, "features": features, "outputs": outputs,
        "rows_per_item": tiles.block_m, "columns": tiles.columns, "turns": tiles.chunks,
        "kept": tiles.chunks == 1, "programs": config.programs, "weight_bytes": tiles.block_n * positions,
        "row_traffic": row_bytes(features, x_bits) + bytes_out,
    }  # fmt: skip
    return Case(
        "linear", label, linear_module.linear_kernel, types, constants, config.num_warps, config.num_stages,
        0 if tiles.chunks > 1 else config.max_registers, facts=facts,
    )  # fmt: skip
