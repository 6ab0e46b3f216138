"""Cases of kernels over rows: packing, dot products of heads, training."""

from __future__ import annotations

from collections.abc import Iterator

from qgnn_plugin.kernels.arithmetic import DOT_LANES, LARGEST_MULTIPLIER
from qgnn_plugin.kernels.fake_quantize import triton as fake_module
from qgnn_plugin.kernels.head_dots import triton as head_module
from qgnn_plugin.kernels.layout import row_bytes, row_words
from qgnn_plugin.kernels.quantize_pack import triton as quantize_module
from qgnn_plugin.kernels.triton.launch import whole_row_tile
from qgnn_plugin.kernels.unpack_dequantize import triton as unpack_module

from ..case import Case
from .grid import COLUMN, ONE, WARP, WIDTHS, heads_of, shapes, table_config, tile_constants

__all__ = ["head_cases", "pack_cases", "training_cases"]


def pack_cases(grid: str, target: str) -> Iterator[Case]:
    for bits, features in shapes(grid):
        config = table_config("elementwise", row_words(features, bits), target)
        constants = tile_constants(features, bits, config, target)
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
        rows, width = whole_row_tile(config, row_words(features, bits), WARP[target], bits)
        yield Case(
            "quantize_pack", f"int{bits} F={features} rows", quantize_module.quantize_pack_kernel,
            {"x": "*fp32", "out": "*i32", "scale": "*fp32", "offset": "*fp32", "unit": "*fp32", "multiplier": "*u8",
             "num_rows": "i32"},
            constants | {"ROWS": rows, "WORDS": width, "LARGEST": LARGEST_MULTIPLIER}, config.num_warps,
            facts={"bits": bits, "features": features, "row_traffic": row_bytes(features, bits) + 4 * features},
        )  # fmt: skip


def head_cases(grid: str, target: str) -> Iterator[Case]:
    for features in WIDTHS[grid]:
        heads = heads_of(features)
        yield Case(
            "head_dots", f"F={features} H={heads}", head_module.head_dots_kernel,
            {"x": "*fp32", "vectors": "*fp32", "out": "*fp32", "num_rows": "i32"},
            {"HEADS": heads, "WIDTH": features // heads, "VECTORS": 2, "ROWS": head_module.ROWS, "LANES": DOT_LANES},
            head_module.NUM_WARPS, facts={"bits": 32, "features": features, "row_traffic": 4 * (features + 2 * heads)},
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
