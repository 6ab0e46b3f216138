"""Cases of ``smp_step``, and of sums and products of float rows."""

from __future__ import annotations

from collections.abc import Iterator

from qgnn_plugin.kernels.fake_quantize.triton import tile_shape
from qgnn_plugin.kernels.float_sum import triton as float_module
from qgnn_plugin.kernels.smp_step import triton as smp_module
from qgnn_plugin.kernels.triton.launch import whole_row_tile, word_tile

from ..case import Case
from .grid import AGGREGATE_TYPES, HUB_TYPES, WARP, WIDTHS, second_stage, table_config, without

__all__ = ["smp_cases"]


def smp_cases(grid: str, target: str) -> Iterator[Case]:
    for features in WIDTHS[grid]:
        rows, columns = tile_shape(features)
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
        config = table_config("float_sum", features, target)
        rows, columns = word_tile(config, features, WARP[target])
        floats = config.unroll * max(1, rows * columns / (config.num_warps * WARP[target]))
        types = without(AGGREGATE_TYPES, "words", "scale", "offset", "bias", "magic")
        yield Case(
            "smp_step", f"float sum F={features}", float_module.float_sum_kernel,
            types | {"x": "*fp32", "dst_scale": "*fp32", "partial": "*fp32"},
            {"F": features, "HEADS": 1, "ROWS": rows, "COLUMNS": columns, "UNROLL": config.unroll},
            config.num_warps, codes_per_iteration=floats,
            facts=facts | {"row_bytes": 4 * features, "unroll": config.unroll},
        )  # fmt: skip
        yield Case(
            "spmm", f"weighted sum F={features}", float_module.float_sum_kernel,
            without(types, "dst_scale")
            | {"x": "*fp32", "partial": "*fp32", "weight": "*fp32", "edge_of": "*i64"},
            {"F": features, "HEADS": 1, "ROWS": rows, "COLUMNS": columns, "UNROLL": config.unroll},
            config.num_warps, codes_per_iteration=floats,
            facts=facts | {"row_bytes": 4 * features, "unroll": config.unroll},
        )  # fmt: skip
        yield Case(
            "spmm", f"hubs F={features}", float_module.float_sum_hub_kernel,
            {n: HUB_TYPES[n] for n in ("hub_row", "hub_first", "hub_count", "dst_scale", "out")} | {"partial": "*fp32"},
            {"F": features, "SLOTS": 8, "COLUMNS": columns}, **second_stage(), facts=facts,
        )  # fmt: skip
        rows, columns = whole_row_tile(config, features, WARP[target])
        yield Case(
            "spmm", f"edge products F={features}", float_module.edge_dots_kernel,
            {n: AGGREGATE_TYPES[n] for n in ("col", "row_of", "begin_of", "length_of", "out", "num_items")}
            | {"a": "*fp32", "b": "*fp32"},
            {"F": features, "HEADS": 1, "ROWS": rows, "COLUMNS": columns}, config.num_warps,
            facts=facts | {"row_bytes": 4 * features},
        )  # fmt: skip
