"""Cases of ``attention_aggregate``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qgnn_plugin.kernels.aggregate import triton as aggregate_module
from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER
from qgnn_plugin.kernels.attention_aggregate import triton as attention_module
from qgnn_plugin.kernels.attention_aggregate import triton_logits as logits_module
from qgnn_plugin.kernels.layout import next_power_of_two, row_words, top_code
from qgnn_plugin.kernels.triton.launch import Config, whole_row_tile

from ..case import Case
from .grid import (
    COLUMN,
    HUB_TYPES,
    ONE,
    UNIT_TYPES,
    WARP,
    codes_per_turn,
    heads_of,
    second_stage,
    shapes,
    table_config,
    without,
)

__all__ = ["attention_cases"]

ATTENTION_TYPES = {
    "words": "*i32", "col": "*i32", "row_of": "*i32", "begin_of": "*i64", "length_of": "*i32",
    "slot_of": "*i32", "scale": "*fp32", "offset": "*fp32", "out": "*fp32", "partial": "*fp32",
    "slope": "fp32", "num_items": "i32", "num_partial": "i32", "magic": "i32",
}  # fmt: skip
GAT_TYPES = {"alpha_src": "*fp32", "alpha_dst": "*fp32"}
V2_TYPES = {"att": "*fp32", "x_dst": "*fp32"}


def attention_cases(grid: str, target: str) -> Iterator[Case]:
    for bits, features in shapes(grid):
        heads = heads_of(features)
        words = row_words(features, bits)
        for v2 in (False, True):
            config = table_config("attention_v2" if v2 else "attention", words, target)
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
                config = attention_module.fitted(table_config("attention_v2", words, target), bits, v2, COLUMN, COLUMN)
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
                hub = without(constants, "ROWS", "V2", "UNROLL") | {"SLOTS": 4, "INTEGER": True}
                for label, more in (("", {}), (" packed rows", {"PACK": True, "MULTIPLIED": True})):
                    hub_types = without(HUB_TYPES, "rowptr", "dst_scale") | (UNIT_TYPES if more else {})
                    yield Case(
                        "attention_aggregate", f"{name}{label} hubs", attention_module.attention_hub_kernel,
                        hub_types, hub | more, **second_stage(), facts=facts,
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
        codes_per_iteration=codes_per_turn(constants, config, target),
        facts=facts | {"mode": "v2" if constants["V2"] else "gat", "unroll": config.unroll},
    )  # fmt: skip
