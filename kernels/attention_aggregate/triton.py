r"""``attention_aggregate`` on Triton: softmax over neighbours and weighted sum of packed messages.

Quantized softmax numerators depend on the row's peak logit and cannot be rescaled afterwards, so
the peak comes first, in a pass of its own (which reads no messages for GAT); numerators, their sum
and the weighted sum of codes follow in one pass over the edges.  Nothing of size ``E x H`` or ``E x
F`` is written.  Numerators of 8 bits or fewer are integers and so are the sums: ``255 * (255 << 8)
* 256 < 2^32`` keeps those of a segment exact.  With multipliers, codes that 8-bit numerators weight leave
their place in a word first (``SHIFTED``): ``255 * 15 * 255 * 256 < 2^31``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aggregate.triton import heads_aligned
from ..arithmetic import LARGEST_MULTIPLIER, attention_thresholds, finish, multiplied
from ..layout import next_power_of_two, row_words, top_code
from ..quantize_pack.triton import quantize_pack
from ..triton.bits import COLUMN, HEAD, ROW
from ..triton.epilogue import write_part, write_words
from ..triton.gather import heads_part, spread_heads, sum_slots
from ..triton.launch import (
    MAGIC_BITS,
    MOST_REGISTERS,
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
    whole_row_tile,
)
from ..triton.ranges import range_kind
from ..triton.schedule import MAX_SEGMENT, Schedule, schedule_for
from . import FLOAT_BITS, attention_aggregate_reference
from .triton_logits import peaks
from .triton_sums import inverse_of, normalize, part_of_sums, weighted_sums

__all__ = ["attention_aggregate", "attention_hub_kernel", "attention_kernel"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_kernel(  # type: ignore[no-untyped-def]
    words, col, row_of, begin_of, length_of, slot_of, scale, offset, alpha_src, alpha_dst,
    alpha_edge, att, x_dst, peak, thresholds, multiplier, bias, out_scale, out_offset, out_unit, out, out_multiplier,
    partial, slope, num_items, num_partial, magic,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    UNROLL: tl.constexpr, HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, ALIGNED: tl.constexpr,
    TOP: tl.constexpr, V2: tl.constexpr, INTEGER: tl.constexpr, PAIRED: tl.constexpr, SHIFTED: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, RELU: tl.constexpr, PACK: tl.constexpr,
    OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    r"""``y_i = (s sum_j k_ij c_j) / sum_j k_ij + l`` per head, ``k_ij m_j`` in place of ``k_ij`` in the sums of rows
    with multipliers.  Segments of hubs leave their sums in
    ``partial``: ``[slots, F]``, then those of numerators and of offsets or weights, ``[slots, HEADS]`` each.
    """
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item_ok = item < num_items
    row = tl.load(row_of + item, mask=item_ok, other=0)
    begin = tl.load(begin_of + item, mask=item_ok, other=0)
    length = tl.load(length_of + item, mask=item_ok, other=0)
    longest = tl.load(length_of + tl.program_id(0) * ROWS)
    word = tl.arange(0, WORDS)
    total, share, offsets = weighted_sums(
        words, col, row, begin, length, longest, word, scale, offset, alpha_src, alpha_dst, alpha_edge,
        att, x_dst, peak, thresholds, multiplier, slope, magic, F, W, BITS, ROWS, WORDS, UNROLL, HEADS, HEAD_TILE,
        ALIGNED, TOP, V2, INTEGER, PAIRED, SHIFTED, SCALE, OFFSET,
    )  # fmt: skip
    parts: tl.constexpr = 8 // BITS
    if tl.program_id(0) * ROWS < num_partial:
        slot = tl.load(slot_of + item).to(tl.int64)
        width: tl.constexpr = 4 * parts * W
        byte = tl.arange(0, 4 * WORDS)
        exists = (length > 0)[:, None]
        for part in tl.static_range(parts):
            target = partial + (slot * width)[:, None] + (part * 4 * W + byte)[None, :]
            tile = part_of_sums(total, part, BITS, ROWS, WORDS, INTEGER, PAIRED, SHIFTED)
            tl.store(target, tile, mask=exists & (byte < 4 * W)[None, :])
        head = tl.arange(0, HEAD_TILE)[None, :]
        target = partial + tl.cast(num_partial, tl.int64) * width + (slot * HEADS)[:, None] + head
        ok = exists & (head < HEADS)
        tl.store(target, share.to(tl.int32) if INTEGER else share, mask=ok)
        if multiplier is not None:
            tl.store(target + tl.cast(num_partial, tl.int64) * HEADS, offsets.to(tl.int32), mask=ok)
        elif OFFSET >= ROW:
            tl.store(target + tl.cast(num_partial, tl.int64) * HEADS, offsets, mask=ok)
    else:
        inverses = spread_heads(inverse_of(share), word, F, W, BITS, ROWS, WORDS, HEADS, ALIGNED)
        starts = spread_heads(offsets, word, F, W, BITS, ROWS, WORDS, HEADS, ALIGNED)
        values, top, packed = (), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WORDS], tl.int32)
        for part in tl.static_range(parts):
            y = normalize(
                part_of_sums(total, part, BITS, ROWS, WORDS, INTEGER, PAIRED, SHIFTED),
                heads_part(inverses, part, BITS, ROWS, WORDS), heads_part(starts, part, BITS, ROWS, WORDS),
                scale, offset, bias, part, F, W, WORDS, SCALE, OFFSET, multiplier is not None, RELU,
            )  # fmt: skip
            values, top, packed = write_part(
                y, values, top, packed, out, row, item_ok, 0, out_scale, out_offset, out_unit, part,
                F, W, BITS, ROWS, WORDS, PACK, OUT_SCALE, OUT_OFFSET,
            )  # fmt: skip
        if PACK:
            write_words(
                values, top, packed, out, row, item_ok, 0, out_scale, out_offset, out_unit, out_multiplier,
                F, W, BITS, ROWS, WORDS, OUT_SCALE, OUT_OFFSET, LARGEST,
            )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_hub_kernel(  # type: ignore[no-untyped-def]
    partial, hub_row, hub_first, hub_count, scale, offset, bias, out_scale, out_offset, out_unit, out, out_multiplier,
    num_partial,
    F: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr,
    WORDS: tl.constexpr, HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, ALIGNED: tl.constexpr,
    INTEGER: tl.constexpr, MULTIPLIED: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, RELU: tl.constexpr,
    PACK: tl.constexpr, OUT_SCALE: tl.constexpr, OUT_OFFSET: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Second stage of hubs: add up the partial sums of one row in the order of their slots."""
    hub = tl.program_id(0)
    row = tl.load(hub_row + hub + tl.arange(0, 1))
    count = tl.load(hub_count + hub)
    first_slot = tl.load(hub_first + hub).to(tl.int64)
    word = tl.arange(0, WORDS)
    width: tl.constexpr = 32 // BITS * W
    kind: tl.constexpr = tl.int64 if INTEGER else tl.float32  # 33,025 neighbours at 8 x 8 bits pass 2^31
    slots = tl.cast(num_partial, tl.int64)
    sums = partial + slots * width + first_slot * HEADS
    share = sum_slots(sums, count, HEADS, kind, SLOTS, HEADS, HEAD_TILE)
    offsets = tl.zeros([1, HEAD_TILE], kind if MULTIPLIED else tl.float32)
    if MULTIPLIED or OFFSET >= ROW:
        offsets = sum_slots(sums + slots * HEADS, count, HEADS, kind, SLOTS, HEADS, HEAD_TILE)
    inverses = spread_heads(inverse_of(share), word, F, W, BITS, 1, WORDS, HEADS, ALIGNED)
    starts = spread_heads(offsets, word, F, W, BITS, 1, WORDS, HEADS, ALIGNED)
    sums = partial + first_slot * width
    values, top, packed = (), tl.zeros([1], tl.float32), tl.zeros([1, WORDS], tl.int32)
    for part in tl.static_range(8 // BITS):
        y = normalize(
            sum_slots(sums + part * 4 * W, count, width, kind, SLOTS, 4 * W, 4 * WORDS),
            heads_part(inverses, part, BITS, 1, WORDS), heads_part(starts, part, BITS, 1, WORDS),
            scale, offset, bias, part, F, W, WORDS, SCALE, OFFSET, MULTIPLIED, RELU,
        )  # fmt: skip
        values, top, packed = write_part(
            y, values, top, packed, out, row, row >= 0, 0, out_scale, out_offset, out_unit, part,
            F, W, BITS, 1, WORDS, PACK, OUT_SCALE, OUT_OFFSET,
        )  # fmt: skip
    if PACK:
        write_words(
            values, top, packed, out, row, row >= 0, 0, out_scale, out_offset, out_unit, out_multiplier,
            F, W, BITS, 1, WORDS, OUT_SCALE, OUT_OFFSET, LARGEST,
        )  # fmt: skip


def fitted(
    config: Config, bits: int, v2: bool, scale_kind: int, offset_kind: int, multiplied: bool = False, rows: bool = False
) -> Config:
    """``config`` for what threads must hold: of GATv2 with ranges per column those of their codes as well, or with
    multipliers or a range per row a start for every code; where ``rows`` are packed with multipliers of their own,
    values beside sums.
    """
    most = v2 and (rows or multiplied or ROW.value in (scale_kind, offset_kind))
    if most or (v2 and COLUMN.value in (scale_kind, offset_kind)):
        config = fewer_codes(config, bits)
    most = most or rows or (multiplied and bits == 1)  # whose words have 32 codes
    return replace(config, max_registers=MOST_REGISTERS) if most else config


@cache
def _thresholds(bits: int, device: torch.device) -> Tensor:
    return attention_thresholds(bits).to(device)


def stays_in_place(attention_bits: int) -> bool:
    """Whether the sums of a segment stay below 2^32 with numerators times multipliers for weights, and codes where they
    lie in a word.
    """
    return top_code(attention_bits) * LARGEST_MULTIPLIER * (255 << 8) * MAX_SEGMENT < 1 << 32


def fits_pairs(attention_bits: int, bits: int) -> bool:
    """Whether the weighted sums of a segment fit 16 bits, so that one product serves two codes."""
    return top_code(attention_bits) * top_code(bits) * MAX_SEGMENT < 1 << 16


def _launch(
    device: torch.device, tensors: dict[str, Tensor | None], schedule: Schedule, out: Tensor,
    slope: float, attention_bits: int, config: Config, meta: dict[str, Any], epilogue: dict[str, Any],
) -> None:  # fmt: skip
    quantized = attention_bits != FLOAT_BITS
    per_row = (ROW.value, HEAD.value)
    integer = quantized and meta["SCALE"] not in per_row and meta["OFFSET"] not in per_row
    multiplier = tensors["multiplier"]
    paired = integer and (meta["ALIGNED"] or meta["HEADS"] == 1) and multiplier is None
    paired = paired and fits_pairs(attention_bits, meta["BITS"])
    shifted = integer and multiplier is not None and not stays_in_place(attention_bits)
    peak = peaks(device, tensors, schedule, out.size(0), slope, meta, config)
    words, bits, heads = meta["W"], meta["BITS"], meta["HEADS"]
    planes = 2 if meta["OFFSET"] in per_row or multiplier is not None else 1
    partial = out.new_empty(
        schedule.num_partial * (32 // bits * words + planes * heads),
        dtype=torch.int32 if integer else torch.float32,
    )
    names = ("scale", "offset", "alpha_src", "alpha_dst", "alpha_edge", "att", "x_dst")
    tail = [tensors[name] for name in ("bias", "out_scale", "out_offset", "out_unit")]
    outputs = out, tensors["out_multiplier"]
    thresholds = _thresholds(attention_bits, device) if quantized else None
    launch(
        attention_kernel, (triton.cdiv(schedule.num_items, meta["ROWS"]),), device,
        tensors["words"], tensors["col"], schedule.row, schedule.begin, schedule.length,
        schedule.slot, *(tensors[name] for name in names), peak, thresholds, multiplier, *tail, *outputs, partial,
        slope, schedule.num_items, schedule.num_partial, MAGIC_BITS, UNROLL=config.unroll,
        TOP=top_code(attention_bits) if quantized else 0, INTEGER=integer, PAIRED=paired, SHIFTED=shifted,
        **launch_options(config), **meta, **epilogue,
    )  # fmt: skip
    hub = {k: v for k, v in meta.items() if k not in ("ROWS", "V2")}
    launch(
        attention_hub_kernel, (schedule.num_hubs,), device,
        partial, schedule.hub_row, schedule.hub_first, schedule.hub_count, tensors["scale"],
        tensors["offset"], *tail, *outputs, schedule.num_partial, SLOTS=4, INTEGER=integer,
        MULTIPLIED=multiplier is not None,
        **launch_options(SECOND_STAGE), **hub, **epilogue,
    )  # fmt: skip


def attention_aggregate(
    words: Tensor,
    rowptr: Tensor,
    col: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_features: int,
    bits: int,
    heads: int,
    attention_bits: int,
    negative_slope: float,
    alpha_src: Tensor | None = None,
    alpha_dst: Tensor | None = None,
    alpha_edge: Tensor | None = None,
    att: Tensor | None = None,
    x_dst: Tensor | None = None,
    concat: bool = True,
    bias: Tensor | None = None,
    relu: bool = False,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
    multiplier: Tensor | None = None,
    out_unit: Tensor | None = None,
) -> Any:
    if multiplier is not None and attention_bits == FLOAT_BITS:
        if scale.numel() > 1 or offset.numel() > 1:  # no range tensor holds one per row and column
            return attention_aggregate_reference(
                words, rowptr, col, scale, offset, num_features, bits, heads, attention_bits, negative_slope, alpha_src,
                alpha_dst, alpha_edge, att, x_dst, concat, bias, relu, out_scale, out_offset, out_bits,
                multiplier=multiplier, out_unit=out_unit,
            )  # fmt: skip
        (scale, offset), multiplier = multiplied(scale, offset, multiplier), None
    if not concat or out_bits not in (0, bits):
        # The mean over heads and packing at another width cross threads: a second pass.
        y = attention_aggregate(
            words, rowptr, col, scale, offset, num_features, bits, heads, attention_bits,
            negative_slope, alpha_src, alpha_dst, alpha_edge, att, x_dst, multiplier=multiplier,
        )  # fmt: skip
        if not concat:
            y = y.view(y.size(0), heads, -1).mean(1)
        if out_unit is None:
            return finish(y, bias, relu, out_scale, out_offset, out_bits)
        assert out_scale is not None
        assert out_offset is not None
        return quantize_pack(finish(y, bias, relu), out_scale, out_offset, out_bits, out_unit)
    tensors = {
        "words": words, "col": col, "scale": scale, "offset": offset, "alpha_src": alpha_src,
        "alpha_dst": alpha_dst, "alpha_edge": alpha_edge, "att": att, "x_dst": x_dst,
        "bias": bias, "out_scale": out_scale, "out_offset": out_offset, "multiplier": multiplier, "out_unit": out_unit,
        "out_multiplier": None if out_unit is None else words.new_empty(rowptr.numel() - 1, dtype=torch.uint8),
    }  # fmt: skip
    device = check_devices(rowptr, *tensors.values())
    check_graph(rowptr, col, words.size(0))
    tensors = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    num_words = row_words(num_features, bits)
    out = words.new_empty(
        (rowptr.numel() - 1, num_words if out_bits else num_features),
        dtype=torch.int32 if out_bits else torch.float32,
    )
    config = config_for("attention" if att is None else "attention_v2", device, num_words)
    kinds = range_kind(scale), range_kind(offset)
    config = fitted(config, bits, att is not None, *kinds, multiplier is not None, out_unit is not None)
    rows, tile = whole_row_tile(config, num_words, warp_size(), bits)  # heads are computed once per edge
    meta = {
        "F": num_features, "W": num_words, "BITS": bits, "ROWS": rows, "WORDS": tile,
        "HEADS": heads, "HEAD_TILE": next_power_of_two(heads),
        "ALIGNED": heads_aligned(num_features, heads, bits, tile), "V2": att is not None,
        "SCALE": range_kind(scale), "OFFSET": range_kind(offset),
    }  # fmt: skip
    epilogue = {
        "RELU": relu, "PACK": out_bits != 0, "OUT_SCALE": range_kind(out_scale),
        "OUT_OFFSET": range_kind(out_offset), "LARGEST": LARGEST_MULTIPLIER,
    }  # fmt: skip
    _launch(
        device, tensors, schedule_for(rowptr, config.segment), out, negative_slope, attention_bits,
        config, meta, epilogue,
    )  # fmt: skip
    return out if out_unit is None else (out, tensors["out_multiplier"])
