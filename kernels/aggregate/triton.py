"""``aggregate`` on Triton: dequantize, aggregate and requantize in one launch (two with hubs)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import LARGEST_MULTIPLIER, multiplied
from ..layout import next_power_of_two, parts_per_byte, row_words
from ..triton.bits import ROW, isolated_part, load_range, multiplied_part, part_features, part_sums, power_of_two
from ..triton.epilogue import scale_bias_relu, write_part, write_words
from ..triton.gather import heads_part, max_codes, spread_heads, sum_codes, sum_multiplied, sum_slots, sum_weighted
from ..triton.launch import (
    MAGIC_BITS,
    SECOND_STAGE,
    UNSPECIALIZED,
    Config,
    check_devices,
    check_graph,
    config_for,
    fewer_codes,
    launch,
    launch_options,
    warp_size,
    word_tile,
)
from ..triton.ranges import range_kind
from ..triton.schedule import Schedule, schedule_for
from . import MAX_PER_ROW, aggregate_reference

__all__ = ["aggregate", "aggregate_kernel", "fitted", "heads_aligned", "hub_kernel"]


@triton.jit
def _affine(  # type: ignore[no-untyped-def]
    total, mass, degree, scale, offset, first, part: tl.constexpr,
    MODE: tl.constexpr, F: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The affine step after a reduction over codes, of a part tile; ``degree`` (of rows with multipliers, the sum of
    these) is ``[ROWS]`` int32.
    """
    feature, feature_ok = part_features(first, part, F, W, WORDS)
    if MODE == "weighted":
        if SCALE == ROW:
            y = total
        else:
            y = total * load_range(scale, SCALE, 0, True, feature, feature_ok)
        if OFFSET != ROW:
            mass = mass * load_range(offset, OFFSET, 0, True, feature, feature_ok)
        y = y + mass
    else:
        s = load_range(scale, SCALE, 0, True, feature, feature_ok)
        start = load_range(offset, OFFSET, 0, True, feature, feature_ok)
        if MODE == "sum" or MODE == "multiplied":
            y = total.to(tl.float32) * s + degree.to(tl.float32)[:, None] * start
        else:
            y = tl.where((degree > 0)[:, None], total.to(tl.float32) * s + start, 0.0)
    return y


@triton.jit
def _part(total, part: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One part of an accumulator as a part tile: int32 sums or codes, or float32 weighted sums."""
    if MODE == "sum":
        tile = part_sums(total, part, BITS, ROWS, WORDS)
    elif MODE == "multiplied":
        tile = multiplied_part(total, part, BITS, ROWS, WORDS)
    elif MODE == "max":
        fields, shift = isolated_part(total, part, BITS, ROWS, WORDS)
        tile = fields.to(tl.int32) >> shift
    else:
        fields, shift = isolated_part(total, part, BITS, ROWS, WORDS)
        tile = fields * power_of_two(-shift)  # exact
    return tile


@triton.jit
def _values(  # type: ignore[no-untyped-def]
    total, masses, units, scale, offset, factor, bias, first, part: tl.constexpr,
    MODE: tl.constexpr, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """A part tile of the result in floats, of the reduced codes of that part."""
    mass = heads_part(masses, part, BITS, ROWS, WORDS)
    y = _affine(total, mass, units, scale, offset, first, part, MODE, F, W, WORDS, SCALE, OFFSET)
    feature, feature_ok = part_features(first, part, F, W, WORDS)
    return scale_bias_relu(y, factor, bias, feature, feature_ok, RELU)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def aggregate_kernel(  # type: ignore[no-untyped-def]
    words, col, row_of, begin_of, length_of, slot_of, weight, multiplier, scale, offset, dst_scale, bias,
    out_scale, out_offset, out_unit, out, out_multiplier, partial, num_items, num_partial, magic,
    MODE: tl.constexpr, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr, UNROLL: tl.constexpr, HEADS: tl.constexpr, HEAD_TILE: tl.constexpr,
    ALIGNED: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, RELU: tl.constexpr,
    PACK: tl.constexpr, OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    r"""``y_i = (s sum_j w_ij c_j + l sum_j w_ij) d_i + b``, or the largest ``c_j`` in place of the
    sum.  Segments of hubs leave their partial results in ``partial``: ``[slots, F]``, then the sums
    of weights ``[slots, HEADS]``.
    """
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item_ok = item < num_items
    row = tl.load(row_of + item, mask=item_ok, other=0)
    begin = tl.load(begin_of + item, mask=item_ok, other=0)
    length = tl.load(length_of + item, mask=item_ok, other=0)
    longest = tl.load(length_of + tl.program_id(0) * ROWS)  # items are sorted
    first = tl.program_id(1) * WORDS if out_unit is None else 0  # of packed rows with multipliers a tile has the whole
    word = first + tl.arange(0, WORDS)
    edge = col + begin
    units = length  # what the offset is counted by
    if MODE == "weighted":
        total, mass = sum_weighted(
            words, edge, begin, length, longest, word, weight, scale, offset, magic,
            F, W, BITS, ROWS, WORDS, UNROLL, HEADS, HEAD_TILE, ALIGNED, SCALE == ROW, OFFSET == ROW,
        )  # fmt: skip
    elif MODE == "multiplied":
        total, units = sum_multiplied(words, edge, length, longest, word, multiplier, W, BITS, ROWS, WORDS, UNROLL)
        mass = tl.zeros([ROWS, HEAD_TILE], tl.float32)
    elif MODE == "sum":
        total = sum_codes(words, edge, length, longest, word, W, BITS, ROWS, WORDS, UNROLL)
        mass = tl.zeros([ROWS, HEAD_TILE], tl.float32)
    else:
        total = max_codes(words, edge, length, longest, word, W, BITS, ROWS, WORDS, UNROLL)
        mass = tl.zeros([ROWS, HEAD_TILE], tl.float32)
    parts: tl.constexpr = 8 // BITS
    if tl.program_id(0) * ROWS < num_partial:
        slot = tl.load(slot_of + item).to(tl.int64)
        width: tl.constexpr = 4 * parts * W
        byte = 4 * first + tl.arange(0, 4 * WORDS)
        ok = (length > 0)[:, None] & (byte < 4 * W)[None, :]
        for part in tl.static_range(parts):
            target = partial + (slot * width)[:, None] + (part * 4 * W + byte)[None, :]
            tl.store(target, _part(total, part, MODE, BITS, ROWS, WORDS), mask=ok)
        if MODE == "weighted":
            head = tl.arange(0, HEAD_TILE)[None, :]
            target = partial + tl.cast(num_partial, tl.int64) * width + (slot * HEADS)[:, None] + head
            tl.store(target, mass, mask=(length > 0)[:, None] & (head < HEADS))
        if MODE == "multiplied":
            tl.store(partial + tl.cast(num_partial, tl.int64) * width + slot, units, mask=length > 0)
    else:
        masses = spread_heads(mass, word, F, W, BITS, ROWS, WORDS, HEADS, ALIGNED)
        factor = dst_scale
        if dst_scale is not None:
            factor = tl.load(dst_scale + row, mask=item_ok, other=0.0)
        values, top, packed = (), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WORDS], tl.int32)
        for part in tl.static_range(parts):
            y = _values(
                _part(total, part, MODE, BITS, ROWS, WORDS), masses, units, scale, offset, factor, bias, first,
                part, MODE, F, W, BITS, ROWS, WORDS, SCALE, OFFSET, RELU,
            )  # fmt: skip
            values, top, packed = write_part(
                y, values, top, packed, out, row, item_ok, first, out_scale, out_offset, out_unit, part,
                F, W, BITS, ROWS, WORDS, PACK, OUT_SCALE, OUT_OFFSET,
            )  # fmt: skip
        if PACK:
            write_words(
                values, top, packed, out, row, item_ok, first, out_scale, out_offset, out_unit, out_multiplier,
                F, W, BITS, ROWS, WORDS, OUT_SCALE, OUT_OFFSET, LARGEST,
            )  # fmt: skip


@triton.jit
def _hub_part(  # type: ignore[no-untyped-def]
    partial, first_slot, count, byte, part: tl.constexpr, width: tl.constexpr, MODE: tl.constexpr,
    W: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One part of a hub's row, ``[1, 4 * WORDS]``, over the partial results in the order of their slots."""
    total = tl.zeros([SLOTS, 4 * WORDS], tl.float32 if MODE == "weighted" else tl.int32)
    source = partial + first_slot * width + (part * 4 * W + byte)[None, :]
    for begin in range(0, count, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        ok = (slot < count)[:, None] & (byte < 4 * W)[None, :]
        value = tl.load(source + (slot.to(tl.int64) * width)[:, None], mask=ok, other=0)
        if MODE == "max":
            total = tl.maximum(total, value)
        else:
            total += value
    total = tl.max(total, 0) if MODE == "max" else tl.sum(total, 0)
    return total[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def hub_kernel(  # type: ignore[no-untyped-def]
    partial, rowptr, hub_row, hub_first, hub_count, scale, offset, dst_scale, bias, out_scale,
    out_offset, out_unit, out, out_multiplier, num_partial,
    MODE: tl.constexpr, F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr,
    WORDS: tl.constexpr, HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, ALIGNED: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, RELU: tl.constexpr,
    PACK: tl.constexpr, OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Second stage of hubs: reduce the partial results of one row in the order of their slots."""
    hub = tl.program_id(0)
    row = tl.load(hub_row + hub + tl.arange(0, 1))
    count = tl.load(hub_count + hub)
    first_slot = tl.load(hub_first + hub).to(tl.int64)
    first = tl.program_id(1) * WORDS if out_unit is None else 0  # of packed rows with multipliers a tile has the whole
    word = first + tl.arange(0, WORDS)
    byte = 4 * first + tl.arange(0, 4 * WORDS)
    width: tl.constexpr = 32 // BITS * W
    if MODE == "multiplied":
        units = partial + tl.cast(num_partial, tl.int64) * width + first_slot
        degree = tl.reshape(sum_slots(units, count, 1, tl.int32, SLOTS, 1, 1), [1])
    else:
        degree = (tl.load(rowptr + row + 1) - tl.load(rowptr + row)).to(tl.int32)
    mass = tl.zeros([1, HEAD_TILE], tl.float32)
    if MODE == "weighted":
        sums = partial + tl.cast(num_partial, tl.int64) * width + first_slot * HEADS
        mass = sum_slots(sums, count, HEADS, tl.float32, SLOTS, HEADS, HEAD_TILE)
    masses = spread_heads(mass, word, F, W, BITS, 1, WORDS, HEADS, ALIGNED)
    factor = dst_scale
    if dst_scale is not None:
        factor = tl.load(dst_scale + row)
    values, top, packed = (), tl.zeros([1], tl.float32), tl.zeros([1, WORDS], tl.int32)
    for part in tl.static_range(8 // BITS):
        y = _values(
            _hub_part(partial, first_slot, count, byte, part, width, MODE, W, SLOTS, WORDS), masses, degree, scale,
            offset, factor, bias, first, part, MODE, F, W, BITS, 1, WORDS, SCALE, OFFSET, RELU,
        )  # fmt: skip
        values, top, packed = write_part(
            y, values, top, packed, out, row, row >= 0, first, out_scale, out_offset, out_unit, part,
            F, W, BITS, 1, WORDS, PACK, OUT_SCALE, OUT_OFFSET,
        )  # fmt: skip
    if PACK:
        write_words(
            values, top, packed, out, row, row >= 0, first, out_scale, out_offset, out_unit, out_multiplier,
            F, W, BITS, 1, WORDS, OUT_SCALE, OUT_OFFSET, LARGEST,
        )  # fmt: skip


def heads_aligned(num_features: int, heads: int, bits: int, tile_words: int) -> bool:
    """Whether heads map to parts and words by reshaping (``ALIGNED`` of :func:`..triton.gather.spread_heads`)."""
    parts, words = parts_per_byte(bits), row_words(num_features, bits)
    whole = words == tile_words and num_features == 4 * words * parts and heads & (heads - 1) == 0
    return whole and words % max(1, heads // parts) == 0


def fitted(config: Config, num_features: int, heads: int, bits: int) -> Config:
    """``config`` for what threads must hold: of several heads that have to be told apart, a weight per code."""
    words = row_words(num_features, bits)
    _, tile = word_tile(config, words, bits=bits)
    return config if heads == 1 or heads_aligned(num_features, heads, bits, tile) else fewer_codes(config, bits)


def _launch(
    device: torch.device, tensors: dict[str, Tensor | None], out: Tensor, rowptr: Tensor,
    schedule: Schedule, mode: str, config: Config, meta: dict[str, Any], rows: int,
) -> None:  # fmt: skip
    words, bits = meta["W"], meta["BITS"]
    weighted = mode == "weighted"
    partial = out.new_empty(
        schedule.num_partial * (32 // bits * words + (meta["HEADS"] if weighted else 1)),
        dtype=torch.float32 if weighted else torch.int32,
    )
    tail = [tensors[k] for k in ("scale", "offset", "dst_scale", "bias", "out_scale", "out_offset")]
    tiles = triton.cdiv(words, meta["WORDS"])
    launch(
        aggregate_kernel, (triton.cdiv(schedule.num_items, rows), tiles), device,
        tensors["words"], tensors["col"], schedule.row, schedule.begin, schedule.length,
        schedule.slot, tensors["edge_weight"], tensors["multiplier"], *tail, tensors["out_unit"], out,
        tensors["out_multiplier"], partial, schedule.num_items, schedule.num_partial, MAGIC_BITS, MODE=mode,
        ROWS=rows, UNROLL=config.unroll, LARGEST=LARGEST_MULTIPLIER, **meta, **launch_options(config),
    )  # fmt: skip
    launch(
        hub_kernel, (schedule.num_hubs, tiles), device,
        partial, rowptr.contiguous(), schedule.hub_row, schedule.hub_first, schedule.hub_count, *tail,
        tensors["out_unit"], out, tensors["out_multiplier"], schedule.num_partial, MODE=mode, SLOTS=8,
        LARGEST=LARGEST_MULTIPLIER, **launch_options(SECOND_STAGE), **meta,
    )  # fmt: skip


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
) -> Any:
    per_row = range_kind(scale) == ROW.value or range_kind(offset) == ROW.value
    if reduce == "max" and (per_row or multiplier is not None):
        raise ValueError(MAX_PER_ROW)
    if multiplier is not None and edge_weight is not None:
        if scale.numel() > 1 or offset.numel() > 1:  # no range tensor holds one per row and column
            return aggregate_reference(
                words, rowptr, col, scale, offset, num_features, bits, reduce, edge_weight, dst_scale, bias, relu,
                out_scale, out_offset, out_bits, multiplier=multiplier, out_unit=out_unit,
            )  # fmt: skip
        (scale, offset), multiplier, per_row = multiplied(scale, offset, multiplier), None, True
    device = check_devices(words, rowptr, col, scale, offset, edge_weight, dst_scale, bias, out_scale, out_offset)
    mode = "weighted" if edge_weight is not None or per_row else "multiplied" if multiplier is not None else reduce
    num_words = row_words(num_features, bits)
    heads = edge_weight.size(1) if edge_weight is not None and edge_weight.dim() == 2 else 1
    config = fitted(config_for(f"aggregate_{mode}", device, num_words), num_features, heads, bits)
    rows, tile = word_tile(config, num_words, warp_size(), bits)
    if out_bits not in (0, bits) or (out_unit is not None and tile < num_words):
        # Packing at another width crosses threads, the peak of a row in several tiles programs: a second kernel.
        from ..quantize_pack.triton import quantize_pack

        y = aggregate(
            words, rowptr, col, scale, offset, num_features, bits, reduce, edge_weight, dst_scale,
            bias, relu, multiplier=multiplier,
        )  # fmt: skip
        assert out_scale is not None
        assert out_offset is not None
        return quantize_pack(y, out_scale, out_offset, out_bits, out_unit)
    num_dst = rowptr.numel() - 1
    out_multiplier = None if out_unit is None else words.new_empty(num_dst, dtype=torch.uint8)
    tensors = {
        "words": words, "col": col, "edge_weight": edge_weight, "scale": scale, "offset": offset,
        "dst_scale": dst_scale, "bias": bias, "out_scale": out_scale, "out_offset": out_offset,
        "multiplier": multiplier, "out_unit": out_unit, "out_multiplier": out_multiplier,
    }  # fmt: skip
    check_graph(rowptr, col, words.size(0))
    tensors = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    width = num_words if out_bits else num_features
    out = words.new_empty((num_dst, width), dtype=torch.int32 if out_bits else torch.float32)
    meta = {
        "F": num_features, "W": num_words, "BITS": bits, "WORDS": tile, "HEADS": heads,
        "HEAD_TILE": next_power_of_two(heads), "ALIGNED": heads_aligned(num_features, heads, bits, tile),
        "SCALE": range_kind(scale), "OFFSET": range_kind(offset), "RELU": relu,
        "PACK": out_bits != 0, "OUT_SCALE": range_kind(out_scale),
        "OUT_OFFSET": range_kind(out_offset),
    }  # fmt: skip
    _launch(
        device, tensors, out, rowptr, schedule_for(rowptr, config.segment), mode, config, meta, rows,
    )  # fmt: skip
    return out if out_multiplier is None else (out, out_multiplier)
