"""The grid of kernel specializations that :mod:`.aot` compiles: what the launchers can pick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from qgnn_plugin.kernels.aggregate import triton as aggregate_module
from qgnn_plugin.kernels.arithmetic import DOT_LANES, LARGEST_MULTIPLIER
from qgnn_plugin.kernels.attention_aggregate import triton as attention_module
from qgnn_plugin.kernels.attention_aggregate import triton_logits as logits_module
from qgnn_plugin.kernels.fake_quantize import triton as fake_module
from qgnn_plugin.kernels.float_sum import triton as float_module
from qgnn_plugin.kernels.head_dots import triton as head_module
from qgnn_plugin.kernels.layout import parts_per_byte, row_bytes, row_words, top_code
from qgnn_plugin.kernels.linear import triton as linear_module
from qgnn_plugin.kernels.linear.triton_prepared import zero_code
from qgnn_plugin.kernels.quantize_pack import triton as quantize_module
from qgnn_plugin.kernels.smp_step import triton as smp_module
from qgnn_plugin.kernels.triton.launch import (
    SECOND_STAGE,
    Config,
    load_table,
    next_power_of_two,
    rehearsed_for,
    table_entry,
    whole_row_tile,
    word_tile,
)
from qgnn_plugin.kernels.unpack_dequantize import triton as unpack_module

from .case import TARGETS, Case, is_hip

__all__ = ["BUILDERS", "shapes"]

ONE, COLUMN, ROW = 0, 1, 2
WARP = {name: target[2] for name, target in TARGETS.items()}
WIDTHS = {"small": (64, 256), "full": (8, 33, 64, 100, 128, 256, 512)}
BITS = {"small": (2, 4), "full": (1, 2, 4, 8)}


def shapes(grid: str) -> Iterator[tuple[int, int]]:
    """``(bits, num_features)`` of a grid."""
    for bits in BITS[grid]:
        for width in WIDTHS[grid]:
            yield bits, width


def _config(kernel: str, words: int, target: str) -> Config:
    """What the launcher picks from the shipped table on an architecture."""
    return table_entry(kernel, target, words, (load_table(),))


def _tile_constants(features: int, bits: int, config: Config, target: str) -> dict[str, Any]:
    words = row_words(features, bits)
    rows, width = word_tile(config, words, WARP[target], bits)
    return {"F": features, "W": words, "BITS": bits, "ROWS": rows, "WORDS": width}


def _codes_per_turn(constants: dict[str, Any], config: Config, target: str) -> float:
    """Codes per thread and turn of a loop over edges (padding columns do not count)."""
    threads = config.num_warps * WARP[target]
    words = constants["ROWS"] * min(constants["WORDS"], constants["W"]) / threads
    return max(words, 1) * 32 / constants["BITS"] * config.unroll


def _second_stage() -> dict[str, Any]:
    return {"num_warps": SECOND_STAGE.num_warps, "max_registers": SECOND_STAGE.max_registers}


def _without(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in constants.items() if k not in names}


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


def aggregate_cases(grid: str, target: str) -> Iterator[Case]:
    for mode in ("sum", "max", "weighted", "multiplied"):
        for bits, features in shapes(grid):
            words = row_words(features, bits)
            config = _config(f"aggregate_{'weighted' if mode == 'multiplied' else mode}", words, target)
            constants = _tile_constants(features, bits, config, target)
            constants |= {
                "MODE": mode, "UNROLL": config.unroll, "HEADS": 1, "HEAD_TILE": 1, "ALIGNED": True,
                "SCALE": ONE, "OFFSET": ONE, "RELU": True, "PACK": False, "OUT_SCALE": ONE, "OUT_OFFSET": ONE,
                "LARGEST": LARGEST_MULTIPLIER,
            }  # fmt: skip
            types = dict(AGGREGATE_TYPES)
            if mode == "multiplied":
                types |= {"multiplier": "*u8"}
            if mode == "weighted":
                types |= {"weight": "*fp32", "partial": "*fp32"}
            codes = _codes_per_turn(constants, config, target)
            facts = {
                "bits": bits, "features": features, "row_bytes": 4 * words,
                "unroll": config.unroll, "mode": mode,
            }  # fmt: skip
            outputs = {"": {}, " packed": PACKED_TYPES}
            if mode in ("sum", "multiplied") and constants["WORDS"] >= words:
                outputs[" packed rows"] = UNIT_TYPES
            for name, more in outputs.items():
                pack = bool(more)
                yield Case(
                    "aggregate", f"{mode} int{bits} F={features}{name}",
                    aggregate_module.aggregate_kernel,
                    types | more, constants | {"PACK": pack},
                    config.num_warps, max_registers=config.max_registers, codes_per_iteration=codes,
                    facts=facts | {"out_bytes": 4 * words if pack else 4 * features},
                )  # fmt: skip
            if mode == "weighted" and features % 4 == 0:
                yield _weighted_heads(bits, features, constants, types, config, facts, target)
            hub = _without(constants, "ROWS", "UNROLL")
            yield Case(
                "aggregate", f"{mode} int{bits} F={features} hubs", aggregate_module.hub_kernel,
                HUB_TYPES | ({"partial": "*fp32"} if mode == "weighted" else {}),
                hub | {"SLOTS": 8}, **_second_stage(), facts={"bits": bits, "features": features},
            )  # fmt: skip
            if " packed rows" in outputs:
                yield Case(
                    "aggregate", f"{mode} int{bits} F={features} packed rows hubs", aggregate_module.hub_kernel,
                    HUB_TYPES | UNIT_TYPES, hub | {"SLOTS": 8, "PACK": True}, **_second_stage(),
                    facts={"bits": bits, "features": features},
                )  # fmt: skip


def _weighted_heads(
    bits: int, features: int, constants: dict[str, Any], types: dict[str, str], config: Config,
    facts: dict[str, Any], target: str,
) -> Case:  # fmt: skip
    """Four weights per edge, and a range per source row."""
    config = aggregate_module.fitted(config, features, 4, bits)
    constants = constants | _tile_constants(features, bits, config, target)
    aligned = aggregate_module.heads_aligned(features, 4, bits, constants["WORDS"])
    constants |= {"HEADS": 4, "HEAD_TILE": 4, "ALIGNED": aligned, "SCALE": ROW, "OFFSET": ROW}
    return Case(
        "aggregate", f"weighted int{bits} F={features} H=4 rows", aggregate_module.aggregate_kernel, types,
        constants, config.num_warps, max_registers=config.max_registers,
        codes_per_iteration=_codes_per_turn(constants, config, target),
        facts=facts | {"mode": "heads", "out_bytes": 4 * features},
    )  # fmt: skip


def pack_cases(grid: str, target: str) -> Iterator[Case]:
    for bits, features in shapes(grid):
        config = _config("elementwise", row_words(features, bits), target)
        constants = _tile_constants(features, bits, config, target)
        constants |= {"SCALE": COLUMN, "OFFSET": COLUMN}
        for op, kernel, types in (
            (
                "quantize_pack", quantize_module.quantize_pack_kernel,
                {"x": "*fp32", "out": "*i32"},
            ),
            (
                "unpack_dequantize", unpack_module.unpack_dequantize_kernel,
                {"words": "*i32", "out": "*fp32"},
            ),
        ):  # fmt: skip
            yield Case(
                op, f"int{bits} F={features}", kernel,
                types | {"scale": "*fp32", "offset": "*fp32", "num_rows": "i32"}, constants,
                config.num_warps, facts={"bits": bits, "features": features,
                                         "row_traffic": row_bytes(features, bits) + 4 * features},
            )  # fmt: skip
        rows, width = whole_row_tile(config, row_words(features, bits), WARP[target])
        yield Case(
            "quantize_pack", f"int{bits} F={features} rows", quantize_module.quantize_pack_kernel,
            {"x": "*fp32", "out": "*i32", "scale": "*fp32", "offset": "*fp32", "unit": "*fp32", "multiplier": "*u8",
             "num_rows": "i32"},
            constants | {"ROWS": rows, "WORDS": width, "LARGEST": LARGEST_MULTIPLIER}, config.num_warps,
            facts={"bits": bits, "features": features, "row_traffic": row_bytes(features, bits) + 4 * features},
        )  # fmt: skip


def head_cases(grid: str, target: str) -> Iterator[Case]:
    for features in WIDTHS[grid]:
        heads = HEADS_OF.get(features, 4)
        yield Case(
            "head_dots", f"F={features} H={heads}", head_module.head_dots_kernel,
            {"x": "*fp32", "vectors": "*fp32", "out": "*fp32", "num_rows": "i32"},
            {"HEADS": heads, "WIDTH": features // heads, "VECTORS": 2, "ROWS": head_module.ROWS, "LANES": DOT_LANES},
            head_module.NUM_WARPS, facts={"bits": 32, "features": features, "row_traffic": 4 * (features + 2 * heads)},
        )  # fmt: skip


HEADS_OF = {8: 1, 33: 1, 100: 1}  # of other numbers of features: 4
ATTENTION_TYPES = {
    "words": "*i32", "col": "*i32", "row_of": "*i32", "begin_of": "*i64", "length_of": "*i32",
    "slot_of": "*i32", "scale": "*fp32", "offset": "*fp32", "out": "*fp32", "partial": "*fp32",
    "slope": "fp32", "num_items": "i32", "num_partial": "i32", "magic": "i32",
}  # fmt: skip
GAT_TYPES = {"alpha_src": "*fp32", "alpha_dst": "*fp32"}
V2_TYPES = {"att": "*fp32", "x_dst": "*fp32"}


def attention_cases(grid: str, target: str) -> Iterator[Case]:
    for bits, features in shapes(grid):
        heads = HEADS_OF.get(features, 4)
        words = row_words(features, bits)
        for v2 in (False, True):
            config = _config("attention_v2" if v2 else "attention", words, target)
            rows, tile = whole_row_tile(config, words, WARP[target], bits)
            constants = {
                "F": features, "W": words, "BITS": bits, "ROWS": rows, "WORDS": tile, "HEADS": heads,
                "HEAD_TILE": next_power_of_two(heads),
                "ALIGNED": aggregate_module.heads_aligned(features, heads, bits, tile),
                "V2": v2, "SCALE": ONE, "OFFSET": ONE,
            }  # fmt: skip
            types = ATTENTION_TYPES | (V2_TYPES if v2 else GAT_TYPES)
            name = f"{'v2' if v2 else 'gat'} int{bits} F={features} H={heads}"
            facts = {"bits": bits, "features": features, "row_bytes": 4 * words, "heads": heads}
            peak = dict(constants)
            yield Case(
                "attention_aggregate", name + " peak", logits_module.peak_kernel, types,
                constants, config.num_warps, max_registers=config.max_registers, facts=facts,
            )  # fmt: skip
            constants |= {
                "UNROLL": config.unroll,
                "RELU": False, "PACK": False, "OUT_SCALE": ONE, "OUT_OFFSET": ONE, "LARGEST": LARGEST_MULTIPLIER,
            }  # fmt: skip
            for attention_bits in (4, 32):
                yield _attention(name, types, constants, attention_bits, config, facts, target)
            rows_types = types | {"multiplier": "*u8"}
            config = attention_module.fitted(config, bits, v2, ONE, ONE, True)
            rows, tile = whole_row_tile(config, words, WARP[target], bits)
            constants |= {"ROWS": rows, "WORDS": tile}
            yield _attention(name + " rows", rows_types, constants, 4, config, facts, target)
            if v2:
                yield Case(
                    "attention_aggregate", name + " rows peak", logits_module.peak_kernel, rows_types,
                    peak | {"ROWS": rows, "WORDS": tile}, config.num_warps, max_registers=config.max_registers,
                    facts=facts,
                )  # fmt: skip
                config = attention_module.fitted(_config("attention_v2", words, target), bits, v2, COLUMN, COLUMN)
                columns = constants | {"SCALE": COLUMN, "OFFSET": COLUMN}
                yield _attention(name + " columns", types, columns, 4, config, facts, target)
            if not v2:
                yield _attention(name + " rows", rows_types, constants, 8, config, facts, target)
                fewer = attention_module.fitted(config, bits, v2, ONE, ONE, True, True)
                rows, tile = whole_row_tile(fewer, words, WARP[target], bits)
                packed = constants | {"ROWS": rows, "WORDS": tile, "PACK": True}
                yield _attention(
                    name + " packed rows", rows_types | UNIT_TYPES, packed, 4, fewer, facts, target
                )  # fmt: skip
                hub = _without(constants, "ROWS", "V2", "UNROLL") | {"SLOTS": 4, "INTEGER": True}
                for label, more in (("", {}), (" packed rows", {"PACK": True, "MULTIPLIED": True})):
                    hub_types = _without(HUB_TYPES, "rowptr", "dst_scale") | (UNIT_TYPES if more else {})
                    yield Case(
                        "attention_aggregate", f"{name}{label} hubs", attention_module.attention_hub_kernel,
                        hub_types, hub | more, **_second_stage(), facts=facts,
                    )  # fmt: skip
    for heads in (1, 4):
        yield Case(
            "attention_aggregate", f"H={heads} peaks of hubs", logits_module.hub_peak_kernel,
            {n: HUB_TYPES[n] for n in ("hub_row", "hub_first", "hub_count", "out")} | {"partial": "*fp32"},
            {"HEADS": heads, "HEAD_TILE": heads, "SLOTS": 32}, num_warps=1, facts={"bits": 32, "features": heads},
        )  # fmt: skip


def _attention(
    name: str, types: dict[str, str], constants: dict[str, Any], attention_bits: int, config: Config,
    facts: dict[str, Any], target: str,
) -> Case:  # fmt: skip
    quantized = attention_bits != 32
    paired = quantized and attention_module.fits_pairs(attention_bits, constants["BITS"]) and "multiplier" not in types
    shifted = quantized and "multiplier" in types and not attention_module.stays_in_place(attention_bits)
    types = types | {"peak": "*fp32", "bias": "*fp32"}
    if quantized:
        types |= {"thresholds": "*fp32", "partial": "*i32"}
    return Case(
        "attention_aggregate", f"{name} att{attention_bits}", attention_module.attention_kernel, types,
        constants | {
            "INTEGER": quantized, "TOP": top_code(attention_bits) if quantized else 0, "SHIFTED": shifted,
            "PAIRED": paired and (constants["ALIGNED"] or constants["HEADS"] == 1),
        },
        config.num_warps, max_registers=config.max_registers,
        codes_per_iteration=_codes_per_turn(constants, config, target),
        facts=facts | {"mode": "v2" if constants["V2"] else "gat", "unroll": config.unroll},
    )  # fmt: skip


LINEAR_OUTPUTS = 256
ROW_TYPES = {"multiplier": "*u8", "out_unit": "*fp32", "out_multiplier": "*u8"}


def linear_cases(grid: str, target: str) -> Iterator[Case]:
    pairs = ((2, 2), (4, 4)) if grid == "small" else ((1, 2), (2, 2), (4, 4), (4, 2), (8, 8))
    widths = WIDTHS[grid] if grid == "full" else (128, 256, 600)
    for x_bits, w_bits in pairs:
        for features in widths:
            name = f"int{x_bits} x int{w_bits} K={features}"
            traffic = row_bytes(LINEAR_OUTPUTS, x_bits) + 4
            rows = ROW_TYPES | {"row_scale": "*fp32"}
            for label, out_bits, ranges, more, bytes_out in (
                ("", 0, True, {}, 4 * LINEAR_OUTPUTS),
                (" packed", x_bits, True, {"row_scale": "*fp32"}, traffic),
                (" packed, one range", x_bits, False, {"row_scale": "*fp32"}, traffic),
                (" packed, added", x_bits, True, dict.fromkeys(("row_scale", "addend"), "*fp32"), traffic + 4 * 256),
                (" packed rows", x_bits, False, rows, traffic + 2),
                (" packed rows, added", x_bits, False, rows | {"addend": "*fp32"}, traffic + 4 * 256 + 2),
            ):  # fmt: skip
                yield _linear(name + label, features, x_bits, w_bits, out_bits, ranges, more, bytes_out, target)


def _linear(
    label: str, features: int, x_bits: int, w_bits: int, out_bits: int, ranges: bool, more: dict[str, str],
    bytes_out: int, target: str,
) -> Case:  # fmt: skip
    """``ranges``: whether every output channel of the weight has a range of its own."""
    hip = is_hip(target)
    rows = "out_unit" in more
    config = _config("linear_rows" if rows else "linear", row_words(features, x_bits), target)
    with rehearsed_for(target):
        tiles = linear_module.tiles_of(config, features, LINEAR_OUTPUTS, x_bits, out_bits, "addend" in more, rows)
    constants = {
        "X_BITS": x_bits, "X_BYTES": row_bytes(features, x_bits), "W_ZERO": zero_code(w_bits),
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_B": tiles.block_b, "CHUNKS": tiles.chunks,
        "WHOLE": tiles.whole, "PTX": not hip, "STAGES": config.num_stages,
        "X_SCALE": False, "X_OFFSET": False, "W_SCALE": ranges, "W_OFFSET": ranges, "RELU": True,
        "OUT_BITS": out_bits, "OUT_BYTES": row_bytes(LINEAR_OUTPUTS, out_bits) if out_bits else 0,
        "OUT_SCALE": ONE, "OUT_OFFSET": ONE, "LARGEST": LARGEST_MULTIPLIER,
    }  # fmt: skip
    types = dict.fromkeys(("x", "w"), "*i8") | dict.fromkeys(("x_words", "column_sum"), "*i32")
    types |= dict.fromkeys(("num_rows", "num_items", "num_out"), "i32")
    floats = ("column_term", "x_scale", "x_offset", "w_scale", "w_offset", "bias", "out")
    types |= dict.fromkeys(floats, "*fp32") | more
    if out_bits:
        types |= PACKED_TYPES | {"out": "*i8"}
    positions = tiles.chunks * tiles.block_b * parts_per_byte(x_bits)
    facts = {
        "bits": x_bits, "features": features, "outputs": LINEAR_OUTPUTS,
        "rows_per_item": tiles.block_m, "columns": tiles.columns, "turns": tiles.chunks,
        "kept": tiles.chunks == 1, "programs": config.programs, "weight_bytes": tiles.block_n * positions,
        "row_traffic": row_bytes(features, x_bits) + bytes_out,
    }  # fmt: skip
    return Case(
        "linear", label, linear_module.linear_kernel, types, constants, config.num_warps, config.num_stages,
        0 if tiles.chunks > 1 else config.max_registers, facts=facts,
    )  # fmt: skip


def training_cases(grid: str, target: str) -> Iterator[Case]:
    for bits, features in shapes(grid):
        rows, columns = fake_module.tile_shape(features)
        tile = {"ROWS": rows, "COLUMNS": columns}
        constants = tile | {"BITS": bits, "CODES": True, "SCALE": ONE, "OFFSET": ONE}  # as training runs it
        ends = {"num_rows": "i32", "num_columns": "i32"}
        facts = {"bits": bits, "features": features}
        forward = dict.fromkeys(("x", "scale", "offset", "out"), "*fp32")
        backward = dict.fromkeys(("grad", "x", "scale", "offset", "grad_x", "partial_scale", "partial_offset"), "*fp32")
        name = f"int{bits} F={features}"
        yield Case(
            "fake_quantize", name, fake_module.fake_quantize_kernel, forward | ends, constants,
            facts=facts | {"row_traffic": 8 * features},
        )  # fmt: skip
        yield Case(
            "fake_quantize", name + " backward", fake_module.fake_quantize_backward_kernel,
            backward | ends, constants, facts=facts | {"row_traffic": 12 * features},
        )  # fmt: skip


def smp_cases(grid: str, target: str) -> Iterator[Case]:
    for features in WIDTHS[grid]:
        rows, columns = fake_module.tile_shape(features)
        tile = {"F": features, "ROWS": rows, "COLUMNS": columns}
        facts = {"bits": 32, "features": features}
        update = dict.fromkeys(("h", "x0", "neighbours", "norm", "out", "scaled"), "*fp32")
        update |= {"energy": "*fp64", "c0": "fp32", "c1": "fp32", "eta": "fp32", "num_rows": "i32"}
        yield Case("smp_step", f"update F={features}", smp_module.update_kernel, update, tile,
                   facts=facts | {"row_traffic": 20 * features})  # fmt: skip
        correct = dict.fromkeys(("h", "u", "change"), "*fp32")
        correct |= {"constraint": "*fp64", "c2": "fp32", "num_rows": "i32"}
        yield Case("smp_step", f"correct F={features}", smp_module.correct_kernel, correct, tile,
                   facts=facts | {"row_traffic": 16 * features})  # fmt: skip
        config = _config("float_sum", features, target)
        rows, columns = word_tile(config, features, WARP[target])
        floats = config.unroll * max(1, rows * columns / (config.num_warps * WARP[target]))
        types = _without(AGGREGATE_TYPES, "words", "scale", "offset", "bias", "magic")
        yield Case(
            "smp_step", f"float sum F={features}", float_module.float_sum_kernel,
            types | {"x": "*fp32", "dst_scale": "*fp32", "partial": "*fp32"},
            {"F": features, "HEADS": 1, "ROWS": rows, "COLUMNS": columns, "UNROLL": config.unroll},
            config.num_warps, codes_per_iteration=floats,
            facts=facts | {"row_bytes": 4 * features, "unroll": config.unroll},
        )  # fmt: skip
        yield Case(
            "spmm", f"weighted sum F={features}", float_module.float_sum_kernel,
            _without(types, "dst_scale")
            | {"x": "*fp32", "partial": "*fp32", "weight": "*fp32", "edge_of": "*i64"},
            {"F": features, "HEADS": 1, "ROWS": rows, "COLUMNS": columns, "UNROLL": config.unroll},
            config.num_warps, codes_per_iteration=floats,
            facts=facts | {"row_bytes": 4 * features, "unroll": config.unroll},
        )  # fmt: skip
        yield Case(
            "spmm", f"hubs F={features}", float_module.float_sum_hub_kernel,
            {n: HUB_TYPES[n] for n in ("hub_row", "hub_first", "hub_count", "dst_scale", "out")} | {"partial": "*fp32"},
            {"F": features, "SLOTS": 8, "COLUMNS": columns}, **_second_stage(), facts=facts,
        )  # fmt: skip
        rows, columns = whole_row_tile(config, features, WARP[target])
        yield Case(
            "spmm", f"edge products F={features}", float_module.edge_dots_kernel,
            {n: AGGREGATE_TYPES[n] for n in ("col", "row_of", "begin_of", "length_of", "out", "num_items")}
            | {"a": "*fp32", "b": "*fp32"},
            {"F": features, "HEADS": 1, "ROWS": rows, "COLUMNS": columns}, config.num_warps,
            facts=facts | {"row_bytes": 4 * features},
        )  # fmt: skip


BUILDERS: list[Callable[[str, str], Iterator[Case]]] = [
    aggregate_cases,
    attention_cases,
    head_cases,
    linear_cases,
    pack_cases,
    training_cases,
    smp_cases,
]
