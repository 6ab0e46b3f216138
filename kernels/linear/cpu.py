"""``linear`` on the CPU: packed rows times packed weights in byte dot products (VNNI).

A block of rows is unpacked to bytes and multiplied while it is in the cache: each step takes four
input features of a few rows, broadcasts them, and multiplies them with four features of ``LANES``
output channels.  Weights are the unsigned operand; activations the signed one, so 8-bit codes enter
as ``c - 128`` and the accumulators start at ``128 sum_k cw``.
"""
# mypy: ignore-errors

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..checksum import checksum
from ..cpu import jit
from ..cpu.epilogue import (
    GROUP,
    OFFSET,
    SCALE,
    TERM,
    address,
    code_pitch,
    dot_and_finish_rows,
    epilogue,
    finish_rows,
    floats,
    opened,
)
from ..cpu.parallel import even_chunks, run_chunks
from ..cpu.simd import (
    atomic_add,
    has_feature,
    keep,
    peek,
    raw,
    raw_aligned,
    raw_at,
    vcast,
    vdot,
    vdot_small,
    vlanes,
    vload,
    vload_first,
    vsplat,
    vspread,
    vstore,
    vstore_parts,
    vsum,
    vview,
)
from ..layout import BITS_PER_BYTE, lane_mask, parts_per_byte, unpack_codes
from ..plan import PlanCache
from .cpu_lookup import can_look_up, lookup_block, lookup_weights

__all__ = ["linear", "run_linear"]

LANES = 64  # output channels whose weights lie together
STEP = LANES if has_feature("avx512f") else LANES // 4  # output channels per step: as many as registers hold
MICRO_ROWS = 6  # rows per step: 6 x 4 accumulators, 4 weights, one broadcast
BLOCK_ROWS = 8 * MICRO_ROWS  # rows unpacked at a time
TILE = 16  # words unpacked at a time
FEATURES = 4  # input features per byte dot product
SIGN = 128  # what 8-bit codes lose to become signed bytes
ONES = lane_mask(1)
SIGNS = SIGN * ONES - (1 << 32)  # SIGN in each byte, as an int32


def _weights(w_words: Tensor, in_features: int, bits: int, signed: bool, looked_up: bool) -> tuple[Any, ...]:
    """Weights as ``[O / 64, K / 4, 64]`` words of four codes, the accumulators' start, column sums.

    What one step over the rows reads lies together.  Where sums are ``looked_up``, the first two are those of
    :func:`.cpu_lookup.lookup_weights`.
    """
    codes = unpack_codes(w_words, in_features, bits)
    if looked_up:
        return *lookup_weights(w_words, in_features), codes.sum(1, dtype=torch.int32).to(torch.float32)
    channels, depth = codes.size(0), -(-in_features // FEATURES)
    stretch = -(-channels // LANES) * LANES
    padded = codes.new_zeros((stretch, depth * FEATURES))
    padded[:channels, :in_features] = codes
    tiles = padded.view(stretch // LANES, LANES, depth, FEATURES).transpose(1, 2)
    words = tiles.contiguous().view(torch.int32)
    colsum = padded.sum(1, dtype=torch.int32)
    start = SIGN * colsum if signed else torch.zeros_like(colsum)
    return words, start, colsum[:channels].to(torch.float32)


_prepared = PlanCache(64)  # by the memory of the words
_latest: dict[tuple[int, ...], tuple[Any, ...]] = {}  # by the tensor itself
LATEST = 1024  # tensors, before all are forgotten


def weights_of(
    w_words: Tensor, in_features: int, bits: int, signed: bool, looked_up: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_weights` of the words, made once for as long as they hold what they held."""
    args = (in_features, bits, signed, looked_up)
    key = (id(w_words), *args)
    latest = _latest.get(key)
    if latest is not None:
        tensor, address, contents, found = latest
        if tensor() is w_words and w_words.data_ptr() == address and checksum(w_words) == contents:
            return found
    found = _prepared.get((w_words,), args, lambda: _weights(w_words, *args))
    if len(_latest) >= LATEST:
        _latest.clear()
    _latest[key] = (weakref.ref(w_words), w_words.data_ptr(), checksum(w_words), found)
    return found


def _tile_of(lanes: int, vdot):
    """Products with ``lanes`` channels, of the ``LANES`` that lie together: a function of its own for each width."""

    @njit(forceinline=True)
    def tile(x, pitch, rows, weight, channel, stretch, depth, start, acc):
        """``acc[r, channel:channel + lanes]`` of all rows of bytes, six at a time."""
        begin = vload(start, channel, lanes)
        first = channel // LANES * LANES * depth + channel % LANES
        for r in range(0, rows, MICRO_ROWS):
            base = r * pitch
            a = b = c = d = e = f = begin
            for k in range(depth):
                w = vload(weight, first + k * LANES, lanes)
                at = base + k
                a = vdot(a, w, vsplat(peek(x, at), lanes))
                b = vdot(b, w, vsplat(peek(x, at + pitch), lanes))
                c = vdot(c, w, vsplat(peek(x, at + 2 * pitch), lanes))
                d = vdot(d, w, vsplat(peek(x, at + 3 * pitch), lanes))
                e = vdot(e, w, vsplat(peek(x, at + 4 * pitch), lanes))
                f = vdot(f, w, vsplat(peek(x, at + 5 * pitch), lanes))
            at = r * stretch + channel
            vstore(acc, at, vcast(a, "f32"))
            vstore(acc, at + stretch, vcast(b, "f32"))
            vstore(acc, at + 2 * stretch, vcast(c, "f32"))
            vstore(acc, at + 3 * stretch, vcast(d, "f32"))
            vstore(acc, at + 4 * stretch, vcast(e, "f32"))
            vstore(acc, at + 5 * stretch, vcast(f, "f32"))

    return tile


def _multiply_by(vdot):
    whole_tile, half_tile, quarter_tile = (_tile_of(lanes, vdot) for lanes in (LANES, LANES // 2, LANES // 4))

    @jit.kernel
    def multiply(x, pitch, rows, weight, stretch, depth, start, acc, channels):
        """``acc[r, o]``, float32 of pitch ``stretch``, for the rows of bytes ``x`` (pitch in words) and the first
        ``channels`` outputs; those behind them are not needed.
        """
        for o in range(0, channels, STEP):
            left = min(channels - o, STEP)
            if left > LANES // 2:
                whole_tile(x, pitch, rows, weight, o, stretch, depth, start, acc)
            elif left > LANES // 4:
                half_tile(x, pitch, rows, weight, o, stretch, depth, start, acc)
            else:
                quarter_tile(x, pitch, rows, weight, o, stretch, depth, start, acc)

    return multiply


multiply = _multiply_by(vdot)
multiply_small = multiply if has_feature("avx512vnni") else _multiply_by(vdot_small)  # codes below eight bits


@njit(forceinline=True)
def _row_sum(x, at, depth):
    """The sum of ``depth`` words of signed bytes."""
    ones, total = vsplat(ONES, TILE), vsplat(0, TILE)
    for k in range(0, depth, TILE):
        total = vdot_small(total, ones, vload_first(x, at + k, TILE, depth - k))
    return vsum(total)


@njit
def fill_terms(columns, colsum, features):
    """``(colsum * w_scale) + (K * w_offset)``: what an input of ones would give."""
    for o in range(colsum.size):
        columns[TERM, o] = (colsum[o] * columns[SCALE, o]) + (features * columns[OFFSET, o])


def _block_of(bits: int):
    parts = parts_per_byte(bits)
    wide = parts * TILE  # words of a tile once unpacked
    per_tile, flip = 4 * wide, SIGN if bits == BITS_PER_BYTE else 0
    product = multiply if flip else multiply_small

    @njit(forceinline=True)
    def block(words, first, count, stride, features, depth, weight_at, start_at, stretch, codes, acc, sums, channels):
        """Products of the packed rows ``[first, first + count)``, unpacked to bytes, and the sums of their codes."""
        pitch = 4 * (stride * parts + TILE)  # bytes of an unpacked row
        lanes = raw(codes.view(np.int32))
        none, signs = vlanes("u8", per_tile), vsplat(SIGNS, wide)
        ones, nothing = vsplat(ONES, wide), vsplat(0, wide)
        is_whole, last_tile = 4 * stride * parts == features, (stride - 1) // TILE * TILE
        for r in range(count):
            total = nothing
            # The last tile first: what it writes too much is written over, or lies between rows.
            for tile in range(last_tile, -1, -TILE):
                row = vspread(vload_first(words, (first + r) * stride + tile, TILE, stride - tile), none)
                total = vdot_small(total, vview(row, "i32"), ones)
                if flip:
                    row = vview(vview(row, "i32") ^ signs, "u8")
                vstore_parts(raw(codes), r * pitch + 4 * tile, 4 * stride, row, parts, None)
            if is_whole:
                sums[r] = vsum(total)
            else:  # words have codes past the last feature, of which nothing is known
                sums[r] = _row_sum(lanes, r * (pitch // 4), depth) + FEATURES * depth * flip
        weight, start = raw_at(weight_at, np.int32), raw_at(start_at, np.int32)
        product(lanes, pitch // 4, count, weight, stretch, depth, start, acc, channels)

    return block


@cache
def linear_kernel(bits: int, dotted: int = 0, looks_up: bool = False):
    """The product of codes of ``bits`` bits; ``dotted`` is 1 where dot products of its rows are wanted as well, with
    ``dots`` the addresses and numbers of :func:`..cpu.finish.dot_and_finish_rows`.
    """
    parts = parts_per_byte(bits)
    block = lookup_block if looks_up else _block_of(bits)

    @jit.kernel
    def kernel(
        place, stride, weight_at, stretch, depth, start_at, colsum_at, features, closed, code_row, dots, bounds,
        counter,
    ):  # fmt: skip
        spec, words = opened(closed), raw_at(place, np.int32)
        fill_terms(spec.columns, floats(colsum_at, spec.width), np.float32(features))
        codes = np.zeros(BLOCK_ROWS * 4 * (stride * parts + TILE), np.uint8)
        acc_owner = np.empty(BLOCK_ROWS * stretch + GROUP, np.float32)
        acc = raw_aligned(raw(acc_owner))
        sums = np.empty(BLOCK_ROWS, np.float32)
        unpacked = np.empty(code_row, np.uint8)
        while True:
            chunk = atomic_add(counter, 0, 1)
            if chunk >= bounds.size - 1:
                break
            for first in range(bounds[chunk], bounds[chunk + 1], BLOCK_ROWS):
                count = min(BLOCK_ROWS, bounds[chunk + 1] - first)
                block(
                    words, first, count, stride, features, depth, weight_at, start_at, stretch, codes, acc, sums,
                    spec.width,
                )  # fmt: skip
                if dotted == 1:
                    vectors, number, heads, places, total = dots
                    of_heads = (raw_at(vectors, np.float32), number, heads, raw_at(places, np.float32), total)
                    dot_and_finish_rows(acc, 0, stretch, raw(sums), first, count, spec, raw(unpacked), of_heads)
                else:
                    finish_rows(acc, 0, stretch, raw(sums), first, count, spec, raw(unpacked))
        keep(codes)
        keep(acc_owner)
        keep(sums)
        keep(unpacked)

    return kernel


def run_linear(
    x_words: Tensor, w_words: Tensor, in_features: int, x_bits: int, w_bits: int, out_bits: int,
    closed: tuple[int, ...], held: list[Tensor], dots: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    """Run :func:`linear_kernel` over all rows; ``closed`` and ``held`` are those of :func:`..cpu.epilogue.epilogue`."""
    rows, channels = x_words.size(0), w_words.size(0)
    looks_up = can_look_up(in_features, x_bits, w_bits)
    weight, start, colsum = weights_of(w_words, in_features, w_bits, x_bits == BITS_PER_BYTE, looks_up)
    stretch = -(-channels // LANES) * LANES
    run_chunks(
        linear_kernel(x_bits, int(dots is not None), looks_up), even_chunks(rows, 1 + in_features * channels // 512),
        address(x_words, held), x_words.size(1), weight.data_ptr(), stretch, -(-in_features // FEATURES),
        start.data_ptr(), colsum.data_ptr(), in_features, closed, code_pitch(channels, out_bits), dots or NO_DOTS,
    )  # fmt: skip


def linear(
    x_words: Tensor,
    w_words: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    w_scale: Tensor,
    w_offset: Tensor,
    in_features: int,
    x_bits: int,
    w_bits: int,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    rows, channels = x_words.size(0), w_words.size(0)
    out, closed, held = epilogue(
        rows,
        channels,
        scale=w_scale,
        offset=w_offset,
        dst_scale=x_scale,
        row_term=x_offset,
        multiples=multiplier,
        bias=bias,
        relu=relu,
        out_scale=out_scale,
        out_offset=out_offset,
        out_bits=out_bits,
        row_scale=row_scale,
        addend=addend,
        out_unit=out_unit,
    )
    if rows and channels:
        run_linear(x_words, w_words, in_features, x_bits, w_bits, out_bits, closed, held)
    return out


NO_DOTS = (0, 0, 0, 0, 0)
