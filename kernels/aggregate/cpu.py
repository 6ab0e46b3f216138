"""``aggregate`` on the CPU: a block of rows is accumulated in integers, then finished."""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arithmetic import is_per_row
from ..cpu import jit, multiplied, weighted
from ..cpu.codesum import lane_capacity, neighbour_sum
from ..cpu.epilogue import GROUP, address, code_pitch, epilogue, finish_rows, flat, opened
from ..cpu.multiplied import BLOCK_FLOATS
from ..cpu.parallel import row_chunks, run_chunks
from ..cpu.simd import atomic_add, keep, peek, poke, raw, raw_aligned, vcast, vlanes, vlive, vstore_parts
from ..layout import parts_per_byte
from . import MAX_PER_ROW
from . import cpu_thresholds as thresholds

MAX_LANES = 32  # words per tile: more would not fit the registers


def tile_lanes(stride: int) -> int:
    """Words per tile for rows of ``stride`` words: the power of two that wastes least."""
    lanes = 4
    while lanes < MAX_LANES and lanes < stride:
        lanes *= 2
    return lanes


@cache
def sum_kernel(bits: int, lanes: int, exact: int):
    """The kernel of unweighted sums; ``exact`` is 1 where ``lanes`` divides the words of a row."""
    parts = parts_per_byte(bits)
    codes = parts * 4 * lanes
    lane, lane_bits = ("u8", 8) if bits < 8 else ("u16", 16)
    capacity = lane_capacity(bits, lane_bits)

    @jit.kernel
    def kernel(words, stride, rowptr, col, closed, block, code_row, bounds, counter):
        spec = opened(closed)
        pitch = 4 * stride * parts
        acc_owner = np.empty(block * pitch + 4 * lanes + GROUP, np.float32)
        coefficient_owner = np.empty(block, np.float32)
        unpacked_owner = np.empty(code_row, np.uint8)
        spill_owner = np.empty(codes, np.int32)
        acc, coefficient = raw_aligned(raw(acc_owner)), raw(coefficient_owner)
        unpacked, spill = raw(unpacked_owner), raw(spill_owner)
        source, edges, final = raw(words), raw(col), col.size - 1
        zero, none = vlanes("i32", lanes), vlanes(lane, codes)
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            stop = bounds[chunk + 1]
            for first in range(bounds[chunk], stop, block):
                last = min(first + block, stop)
                for tile in range(0, stride, lanes):
                    live = vlive(stride - tile, exact)
                    live_bytes = vlive(4 * (stride - tile), exact)
                    for i in range(first, last):
                        begin, end = peek(rowptr, i), peek(rowptr, i + 1)
                        total = neighbour_sum(
                            source, stride, tile, lanes, live, edges, final, begin, end,
                            zero, none, capacity, spill,
                        )  # fmt: skip
                        at = (i - first) * pitch + 4 * tile
                        vstore_parts(acc, at, 4 * stride, vcast(total, "f32"), parts, live_bytes)
                        poke(coefficient, i - first, end - begin)
                finish_rows(acc, 0, pitch, coefficient, first, last - first, spec, unpacked)
        keep(acc_owner)
        keep(coefficient_owner)
        keep(unpacked_owner)
        keep(spill_owner)

    return kernel


def aggregate(
    words: Tensor,
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    reduce: str = "sum",
    edge_weight: Tensor | None = None,
    dst_scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
    addend: Tensor | None = None,
) -> Any:
    """The op; and ``addend`` ``[num_dst, F]`` float32, which comes after the bias."""
    is_weighted = edge_weight is not None or is_per_row(scale) or is_per_row(offset)
    out, closed, held = epilogue(
        rowptr.numel() - 1,
        num_features,
        scale=None if is_weighted else scale,
        offset=None if is_weighted else offset,
        dst_scale=dst_scale,
        bias=bias,
        relu=relu,
        out_scale=out_scale,
        out_offset=out_offset,
        out_bits=out_bits,
        out_unit=out_unit,
        addend=addend,
    )
    if rowptr.numel() == 1 or num_features == 0:
        return out
    stride = words.size(1)
    pointers = flat(rowptr)
    block = max(1, BLOCK_FLOATS // num_features)
    tail = (closed, block, code_pitch(num_features, out_bits))
    chunks = row_chunks(pointers)
    if is_weighted:
        if reduce == "max":
            raise ValueError(MAX_PER_ROW)
        args = _weighted_args(edge_weight, scale, offset, words.size(0), num_features, bits, multiplier)
        kernel = weighted.sum_kernel(bits)
        run_chunks(kernel, chunks, flat(words), stride, pointers, flat(col), *args, *tail)
        return out
    if multiplier is not None:
        lanes = multiplied.multiplied_lanes(stride, bits)
        kernel = multiplied.sum_kernel(bits, lanes, int(stride % lanes == 0))
        places = address(words, held), stride, address(rowptr, held), address(col, held), col.numel() - 1
        run_chunks(kernel, chunks, *places, address(multiplier, held), *tail)
        return out
    lanes = tile_lanes(stride)
    exact = int(stride % lanes == 0)
    if reduce == "max":
        kernel = weighted.max_kernel(bits)
    elif bits == thresholds.BITS and thresholds.applies(closed, scale, out_scale):
        kernel = thresholds.threshold_kernel(lanes, exact)
        tail = (closed, code_pitch(num_features, out_bits))
    else:
        kernel = sum_kernel(bits, lanes, exact)
    run_chunks(kernel, chunks, flat(words), stride, pointers, flat(col), *tail)
    return out


def _weighted_args(
    edge_weight: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    num_src: int,
    num_features: int,
    bits: int,
    multiplier: Tensor | None,
) -> tuple[object, ...]:
    """What :func:`..cpu.weighted.sum_kernel` takes between the graph and the epilogue."""
    heads = edge_weight.size(1) if edge_weight is not None and edge_weight.dim() == 2 else 1
    table, lanewise = weighted.head_table(num_features, bits, heads)
    row_scale = row_offset = None
    if multiplier is not None:
        row_scale = row_offset = multiplier.to(torch.float32)
    elif is_per_row(scale) or is_per_row(offset):
        row_scale, row_offset = scale.expand(num_src, 1), offset.expand(num_src, 1)
        scale = offset = torch.ones(1, dtype=torch.float32)
    return (
        flat(edge_weight),
        heads,
        table,
        lanewise,
        flat(row_scale),
        flat(row_offset),
        flat(scale.reshape(-1).expand(num_features)),
        flat(offset.reshape(-1).expand(num_features)),
    )
