"""The grid of kernel specializations that :mod:`.aot` compiles: what the launchers can pick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..layout import row_words
from . import aggregate as aggregate_module
from . import quantize_pack as quantize_module
from . import unpack_dequantize as unpack_module
from .aot import Case
from .launch import Config, load_table, word_tile

__all__ = ["BUILDERS", "shapes"]

ONE, COLUMN, ROW = 0, 1, 2
WIDTHS = {"small": (64, 256), "full": (8, 33, 64, 100, 128, 256, 512)}
BITS = {"small": (2, 4), "full": (1, 2, 4, 8)}


def shapes(grid: str) -> Iterator[tuple[int, int]]:
    """``(bits, num_features)`` of a grid."""
    for bits in BITS[grid]:
        for width in WIDTHS[grid]:
            yield bits, width


def _config(kernel: str, words: int, warp: int) -> Config:
    """What the shipped table says: the device's own entries where there are any."""
    table = load_table()
    arch = "gfx942" if warp == 64 else "sm_90"
    for key in (arch, "default"):
        for entry in table.get(key, {}).get(kernel, ()):
            if words <= entry["max_words"]:
                return Config(**{k: v for k, v in entry.items() if k != "max_words"})
    return Config()


def _tile_constants(features: int, bits: int, config: Config, warp: int) -> dict[str, Any]:
    words = row_words(features, bits)
    rows, width = word_tile(config, words, warp)
    return {"F": features, "W": words, "BITS": bits, "ROWS": rows, "WORDS": width}


def _codes_per_iteration(constants: dict[str, Any], config: Config, warp: int, unroll: int) -> float:
    """Codes per thread and turn of a loop over edges (padding columns do not count)."""
    threads = config.num_warps * warp
    words = constants["ROWS"] * min(constants["WORDS"], constants["W"]) / threads
    return max(words, 1) * 32 / constants["BITS"] * unroll


AGGREGATE_TYPES = {
    "words": "*i32", "col": "*i32", "row_of": "*i32", "begin_of": "*i64", "length_of": "*i32",
    "slot_of": "*i32", "scale": "*fp32", "offset": "*fp32", "dst_scale": "*fp32", "bias": "*fp32",
    "out": "*fp32", "num_items": "i32", "num_partial": "i32", "partial": "*i32",
}  # fmt: skip
HUB_TYPES = {
    "partial": "*i32", "rowptr": "*i64", "hub_row": "*i32", "hub_first": "*i32",
    "hub_count": "*i32", "scale": "*fp32", "offset": "*fp32", "dst_scale": "*fp32",
    "bias": "*fp32", "out": "*fp32", "num_partial": "i32",
}  # fmt: skip
PACKED_TYPES = {"out": "*i32", "out_scale": "*fp32", "out_offset": "*fp32"}


def aggregate_cases(grid: str, warp: int) -> Iterator[Case]:
    for mode in ("sum", "max", "weighted"):
        for bits, features in shapes(grid):
            words = row_words(features, bits)
            config = _config(f"aggregate_{mode}", words, warp)
            constants = _tile_constants(features, bits, config, warp)
            constants |= {
                "MODE": mode, "UNROLL": config.unroll, "HEADS": 1, "SPAN": 1, "SCALE": ONE,
                "OFFSET": ONE, "RELU": True, "PACK": False, "OUT_SCALE": ONE, "OUT_OFFSET": ONE,
            }  # fmt: skip
            types = dict(AGGREGATE_TYPES)
            if mode == "weighted":
                types |= {"weight": "*fp32", "partial": "*fp32"}
            codes = _codes_per_iteration(constants, config, warp, config.unroll)
            facts = {
                "bits": bits, "features": features, "row_bytes": 4 * words,
                "unroll": config.unroll, "mode": mode,
            }  # fmt: skip
            for pack in (False, True):
                yield Case(
                    "aggregate", f"{mode} int{bits} F={features}" + (" packed" if pack else ""),
                    aggregate_module.aggregate_kernel,
                    types | PACKED_TYPES if pack else types, constants | {"PACK": pack},
                    config.num_warps, codes_per_iteration=codes, facts=facts,
                )  # fmt: skip
            hub = {k: v for k, v in constants.items() if k not in ("ROWS", "UNROLL", "HEADS", "SPAN")}
            yield Case(
                "aggregate", f"{mode} int{bits} F={features} hubs", aggregate_module.hub_kernel,
                HUB_TYPES | ({"partial": "*fp32"} if mode == "weighted" else {}),
                hub | {"SLOTS": 8},
                facts={"bits": bits, "features": features},
            )  # fmt: skip


def pack_cases(grid: str, warp: int) -> Iterator[Case]:
    for bits, features in shapes(grid):
        config = _config("elementwise", row_words(features, bits), warp)
        constants = _tile_constants(features, bits, config, warp)
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
                config.num_warps, facts={"bits": bits, "features": features},
            )  # fmt: skip


BUILDERS: list[Callable[[str, int], Iterator[Case]]] = [aggregate_cases, pack_cases]
