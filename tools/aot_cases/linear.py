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
PAIR_TYPES = (
    dict.fromkeys(("x2", "w2"), "*i8") | dict.fromkeys(("x2_words", "column_sum2"), "*i32") | {"multiplier2": "*u8"}
    | dict.fromkeys(("column_term2", "x2_scale", "x2_offset", "w2_scale", "w2_offset"), "*fp32")
)  # fmt: skip
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
        (" pair", 0, True, PAIR_TYPES, row_bytes(features, x_bits) + 4 * outputs),
        (" packed pair", x_bits, False, PAIR_TYPES, row_bytes(features, x_bits) + traffic),
        (" packed rows pair", x_bits, True, ROW_TYPES | PAIR_TYPES, row_bytes(features, x_bits) + traffic + 3),
    ):  # fmt: skip
        if "dots" in more and not linear_module.has_heads(features, x_bits, outputs, out_bits, HEADS, VECTORS):
            continue
        case = _linear(name + label, features, outputs, x_bits, w_bits, out_bits, ranges, more, bytes_out, target)
        if case is not None:
            yield case


def _linear(
    label: str, features: int, outputs: int, x_bits: int, w_bits: int, out_bits: int, ranges: bool,
    more: dict[str, str], bytes_out: int, target: str,
) -> Case | None:  # fmt: skip
    """``ranges``: whether every output channel of the weight has a range of its own.  None of two products that are
    not one kernel's.
    """
    hip = is_hip(target)
    dots = "dots" in more
    rows = "out_unit" in more or dots
    pair = "x2" in more
    kernel = "linear_pair" if pair else "linear_rows" if rows else "linear"
    config = table_config(kernel, row_words(features, x_bits), target)
    with rehearsed_for(target):
        if pair:
            found = linear_module.pair_tiles(config, 2 * [(features, x_bits)], outputs, out_bits, rows)
            if not found:
                return None
            tiles = found[0]
        else:
            tiles = linear_module.tiles_of(config, features, outputs, x_bits, out_bits, "addend" in more, rows)
    constants = {
        "X_BITS": x_bits, "X_BYTES": row_bytes(features, x_bits), "W_ZERO": zero_code(w_bits),
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_B": tiles.block_b, "CHUNKS": tiles.chunks,
        "WHOLE": tiles.whole, "PTX": not hip, "STAGES": config.num_stages,
        "X_SCALE": False, "X_OFFSET": False, "W_SCALE": ranges, "W_OFFSET": ranges, "RELU": not dots,
        "OUT_BITS": out_bits, "OUT_BYTES": row_bytes(outputs, out_bits) if out_bits else 0,
        "OUT_SCALE": ONE, "OUT_OFFSET": ONE, "LARGEST": LARGEST_MULTIPLIER,
        "HEADS": HEADS, "VECTORS": VECTORS if dots else 0,
        "GROUPS": 1 if dots else linear_module.groups_of(config, tiles),
    }  # fmt: skip
    if pair:
        constants |= {
            "X2_BITS": x_bits, "X2_BYTES": constants["X_BYTES"], "W2_ZERO": constants["W_ZERO"],
            "BLOCK2_B": tiles.block_b, "X2_SCALE": False, "X2_OFFSET": False, "W2_SCALE": ranges, "W2_OFFSET": ranges,
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
        "kept": tiles.chunks == 1, "programs": config.programs, "weight_bytes": (1 + pair) * tiles.block_n * positions,
        "row_traffic": row_bytes(features, x_bits) + bytes_out,
    }  # fmt: skip
    return Case(
        "linear", label, linear_module.linear_kernel, types, constants, config.num_warps, config.num_stages,
        linear_module.with_registers(config, tiles, x_bits).max_registers, facts=facts,
    )  # fmt: skip
