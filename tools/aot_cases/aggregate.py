"""Cases of ``aggregate``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qgnn_plugin.kernels.aggregate import triton as aggregate_module
from qgnn_plugin.kernels.arithmetic import LARGEST_MULTIPLIER
from qgnn_plugin.kernels.layout import row_words
from qgnn_plugin.kernels.triton.launch import Config

from ..case import Case
from .grid import (
    AGGREGATE_TYPES,
    HUB_TYPES,
    ONE,
    PACKED_TYPES,
    ROW,
    UNIT_TYPES,
    codes_per_turn,
    second_stage,
    shapes,
    table_config,
    tile_constants,
    without,
)

__all__ = ["aggregate_cases"]


def aggregate_cases(grid: str, target: str) -> Iterator[Case]:
    for mode in ("sum", "max", "weighted", "multiplied"):
        for bits, features in shapes(grid):
            words = row_words(features, bits)
            config = table_config(f"aggregate_{mode}", words, target)
            constants = tile_constants(features, bits, config, target)
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
            codes = codes_per_turn(constants, config, target)
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
            hub = without(constants, "ROWS", "UNROLL")
            yield Case(
                "aggregate", f"{mode} int{bits} F={features} hubs", aggregate_module.hub_kernel,
                HUB_TYPES | ({"partial": "*fp32"} if mode == "weighted" else {}),
                hub | {"SLOTS": 8}, **second_stage(), facts={"bits": bits, "features": features},
            )  # fmt: skip
            if " packed rows" in outputs:
                yield Case(
                    "aggregate", f"{mode} int{bits} F={features} packed rows hubs", aggregate_module.hub_kernel,
                    HUB_TYPES | UNIT_TYPES, hub | {"SLOTS": 8, "PACK": True}, **second_stage(),
                    facts={"bits": bits, "features": features},
                )  # fmt: skip


def _weighted_heads(
    bits: int, features: int, constants: dict[str, Any], types: dict[str, str], config: Config,
    facts: dict[str, Any], target: str,
) -> Case:  # fmt: skip
    """Four weights per edge, and a range per source row."""
    config = aggregate_module.fitted(config, features, 4, bits)
    constants = constants | tile_constants(features, bits, config, target)
    aligned = aggregate_module.heads_aligned(features, 4, bits, constants["WORDS"])
    constants |= {"HEADS": 4, "HEAD_TILE": 4, "ALIGNED": aligned, "SCALE": ROW, "OFFSET": ROW}
    return Case(
        "aggregate", f"weighted int{bits} F={features} H=4 rows", aggregate_module.aggregate_kernel, types,
        constants, config.num_warps, max_registers=config.max_registers,
        codes_per_iteration=codes_per_turn(constants, config, target),
        facts=facts | {"mode": "heads", "out_bytes": 4 * features},
    )  # fmt: skip
