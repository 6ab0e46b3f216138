"""Weighted sums of packed codes over neighbourhoods in float32 lanes, and largest codes."""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import njit

from ..layout import parts_per_byte, row_bytes
from . import jit
from .codesum import prefetch_rows
from .epilogue import GROUP, finish_rows, opened
from .simd import (
    atomic_add,
    keep,
    peek,
    poke,
    raw,
    vcast,
    vfma,
    vheads,
    vlanes,
    vload,
    vload_first,
    vmax,
    vround,
    vspread,
    vstore,
    vstore_parts,
)

__all__ = ["EDGE_BLOCK", "LANES", "add_edges", "head_table", "max_kernel", "sum_kernel"]

LANES = 16  # words per tile: at 2 bits its 256 accumulators are half of the registers
# Edges whose weights are held at a time: products of two bytes add up exactly in float32.
EDGE_BLOCK = 256


@cache
def head_table(num_features: int, bits: int, heads: int) -> tuple[np.ndarray | None, int | None]:
    """The head of each lane of each tile, ``[tiles * codes]`` int32, and 0 if sixteen lanes differ.

    Both are None where a kernel need not look: with one head, or one per sixteen lanes.
    """
    if heads == 1:
        return None, None
    width, parts = row_bytes(num_features, bits), parts_per_byte(bits)
    tiles = -(-width // (4 * LANES))
    byte = torch.arange(tiles * 4 * LANES).view(tiles, 1, 4 * LANES)
    feature = torch.arange(parts).view(1, parts, 1) * width + byte
    unused = ((feature >= num_features) | (byte >= width)).reshape(-1, GROUP)
    table = (feature // (num_features // heads)).reshape(-1, GROUP).masked_fill(unused, 0)
    table = torch.where(unused, table[:, :1], table)  # they follow the lanes that are used
    lanewise = None if bool((table == table[:, :1]).all()) else 0
    return table.reshape(-1).to(torch.int32).numpy(), lanewise


@njit(forceinline=True)
def add_edges(words, stride, col, final, begin, end, weight, heads, table, lanewise, none, codes, sums):
    """Add ``weight * code`` over the edges ``[begin, end)`` to the sums of a row, tile by tile.

    Edge ``begin + q`` has its ``heads`` weights at ``weight[q * heads]``; ``none`` is a zero vector
    of the ``codes`` of a tile; ``sums`` is float32, or int64 to take integer products exactly;
    ``final`` is the last edge of the graph.  Arrays but ``sums`` may be :func:`.simd.raw`.
    """
    shift = 0
    for tile in range(0, stride, LANES):
        acc = vcast(none, "f32")
        for e in range(begin, end):
            prefetch_rows(words, stride, tile, LANES, col, final, e, 1)
            row = vload_first(words, peek(col, e) * stride + tile, LANES, stride - tile)
            weights = vheads(weight, (e - begin) * heads, table, shift, acc, lanewise)
            acc = vfma(weights, vcast(vspread(row, none), "f32"), acc)
        vstore(sums, shift, vload(sums, shift, none) + vround(acc, sums))
        shift += codes


@njit(forceinline=True)
def spread_sums(sums, stride, none, codes, parts, acc, at):
    """Move the sums of a row from tiles to its features at ``acc[at]``."""
    shift = 0
    for tile in range(0, stride, LANES):
        row = vcast(vload(sums, shift, none), "f32")
        vstore_parts(acc, at + 4 * tile, 4 * stride, row, parts, 4 * (stride - tile))
        shift += codes


@jit.kernel
def scale_heads(acc, at, heads, width, scale, offset, factor, inverse):
    """``acc = (acc * scale) * inverse[head] + offset * factor[head]`` over a row's features."""
    for h in range(heads):
        for f in range(h * width, (h + 1) * width):
            y = peek(acc, at + f) * peek(scale, f) * peek(inverse, h)
            poke(acc, at + f, y + peek(offset, f) * peek(factor, h))


@jit.kernel
def fill_weights(weight, has_weight, heads, col, begin, end, row_scale, row_offset, per_row, scratch, total):
    """Weights of edges times the step of their source, and the offsets that they bring."""
    for e in range(begin, end):
        step, low = np.float32(1.0), np.float32(1.0)
        if per_row:
            step, low = peek(row_scale, peek(col, e)), peek(row_offset, peek(col, e))
        for h in range(heads):
            w = peek(weight, e * heads + h) if has_weight else np.float32(1.0)
            poke(scratch, (e - begin) * heads + h, w * step)
            poke(total, h, peek(total, h) + w * low)


@cache
def sum_kernel(bits: int):
    """The kernel of weighted sums."""
    parts = parts_per_byte(bits)
    codes = parts * 4 * LANES

    @jit.kernel
    def kernel(
        words, stride, rowptr, col, weight, heads, table, lanewise, row_scale, row_offset, scale,
        offset, closed, block, code_row, bounds, counter,
    ):  # fmt: skip
        spec = opened(closed)
        pitch = 4 * stride * parts
        tiles = (stride + LANES - 1) // LANES
        acc_owner = np.empty(block * pitch + GROUP, np.float32)
        sums_owner = np.empty(tiles * codes, np.float32)
        scratch_owner = np.empty(EDGE_BLOCK * heads, np.float32)
        total_owner, inverse_owner = np.empty(heads, np.float32), np.ones(heads, np.float32)
        unpacked_owner = np.empty(code_row, np.uint8)
        nothing_owner = np.zeros(block, np.float32)
        acc, sums, scratch, total = raw(acc_owner), raw(sums_owner), raw(scratch_owner), raw(total_owner)
        inverse, unpacked, nothing = raw(inverse_owner), raw(unpacked_owner), raw(nothing_owner)
        source, edges, final, weights = raw(words), raw(col), col.size - 1, raw(weight)
        steps, lows, scales, offsets = raw(row_scale), raw(row_offset), raw(scale), raw(offset)
        has_weight, per_row = weight.size > 0, row_scale.size > 0
        none, width = vlanes("u8", codes), spec.width // heads
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            for first in range(bounds[chunk], bounds[chunk + 1], block):
                count = min(block, bounds[chunk + 1] - first)
                for r in range(count):
                    sums_owner[:] = 0
                    total_owner[:] = 0
                    end = rowptr[first + r + 1]
                    for begin in range(rowptr[first + r], end, EDGE_BLOCK):
                        stop = min(begin + EDGE_BLOCK, end)
                        fill_weights(
                            weights, has_weight, heads, edges, begin, stop, steps, lows, per_row,
                            scratch, total,
                        )  # fmt: skip
                        add_edges(
                            source, stride, edges, final, begin, stop, scratch, heads,
                            table, lanewise, none, codes, sums,
                        )  # fmt: skip
                    spread_sums(sums, stride, none, codes, parts, acc, r * pitch)
                    scale_heads(acc, r * pitch, heads, width, scales, offsets, total, inverse)
                finish_rows(acc, 0, pitch, nothing, first, count, spec, unpacked)
        keep(acc_owner)
        keep(sums_owner)
        keep(scratch_owner)
        keep(total_owner)
        keep(inverse_owner)
        keep(unpacked_owner)
        keep(nothing_owner)

    return kernel


@cache
def max_kernel(bits: int):
    """The kernel of largest codes: byte lanes are compared as they are."""
    parts = parts_per_byte(bits)
    codes = parts * 4 * LANES

    @jit.kernel
    def kernel(words, stride, rowptr, col, closed, block, code_row, bounds, counter):
        spec = opened(closed)
        pitch = 4 * stride * parts
        acc = np.empty(block * pitch + GROUP, np.float32)
        unpacked = np.empty(code_row, np.uint8)
        coefficient = np.empty(block, np.float32)
        source, edges, final = raw(words), raw(col), col.size - 1
        none = vlanes("u8", codes)
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            for first in range(bounds[chunk], bounds[chunk + 1], block):
                count = min(block, bounds[chunk + 1] - first)
                for r in range(count):
                    begin, end = peek(rowptr, first + r), peek(rowptr, first + r + 1)
                    coefficient[r] = 1 if end > begin else 0
                    for tile in range(0, stride, LANES):
                        live = stride - tile
                        top = none
                        for e in range(begin, end):
                            prefetch_rows(source, stride, tile, LANES, edges, final, e, 1)
                            at = peek(edges, e) * stride + tile
                            row = vload_first(source, at, LANES, live)
                            top = vmax(top, vspread(row, none))
                        at = r * pitch + 4 * tile
                        vstore_parts(acc, at, 4 * stride, vcast(top, "f32"), parts, 4 * live)
                finish_rows(raw(acc), 0, pitch, raw(coefficient), first, count, spec, raw(unpacked))
        keep(acc)
        keep(coefficient)
        keep(unpacked)

    return kernel
