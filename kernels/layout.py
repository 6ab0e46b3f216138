r"""The bit layout of packed rows: a contract shared by files, CPU kernels and GPU kernels.

A row of ``F`` codes of ``b`` bits takes ``B = 4 * ceil(F * b / 32)`` bytes, stored as ``B / 4``
little-endian int32 words. Byte ``k`` holds the features ``k, k + B, k + 2 B, ...``: feature ``p B +
k`` sits in its bits ``[b p, b (p + 1))``. Hence ``(word >> b p) & lane_mask(b)`` holds four
*neighbouring* features in four byte lanes, and sums over rows run in those lanes without unpacking.
Bits that belong to no feature are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "LAYOUT_VERSION",
    "PACKED_BITS",
    "check_bits",
    "check_packed",
    "lane_mask",
    "most_products",
    "next_power_of_two",
    "pack_codes",
    "parts_per_byte",
    "row_bytes",
    "row_words",
    "top_code",
    "unpack_codes",
]

LAYOUT_VERSION = 1
PACKED_BITS = (1, 2, 4, 8)  # every width that divides a byte

BITS_PER_BYTE = 8
BYTES_PER_WORD = 4
LARGEST_SUM = 2**31 - 1  # of codes: what an int32 holds
_LANE_ONES = 0x01010101  # one in each byte lane of a word


def check_bits(bits: int, what: str = "bits", widths: tuple[int, ...] = PACKED_BITS) -> int:
    """Return ``bits`` if rows can be packed at that width, one of ``widths``; raise ValueError otherwise."""
    if type(bits) is not int or bits not in widths:
        raise ValueError(f"Expected '{what}' to be one of {widths} (got {bits!r})")
    return bits


def top_code(bits: int) -> int:
    """The largest code, ``Q = 2^b - 1``."""
    return (1 << bits) - 1


def parts_per_byte(bits: int) -> int:
    """How many codes share a byte."""
    return BITS_PER_BYTE // bits


def row_words(num_features: int, bits: int) -> int:
    """Words of a packed row of ``num_features`` codes."""
    return -(-num_features * bits // (BITS_PER_BYTE * BYTES_PER_WORD))


def row_bytes(num_features: int, bits: int) -> int:
    """Bytes of a packed row, ``B``."""
    return BYTES_PER_WORD * row_words(num_features, bits)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


def most_products(x_bits: int, w_bits: int) -> int:
    """How many products of codes of two widths add up to no more than :data:`LARGEST_SUM`."""
    return LARGEST_SUM // (top_code(x_bits) * top_code(w_bits))


def lane_mask(bits: int) -> int:
    """The mask that keeps part 0 of every byte lane of a word, as an unsigned integer."""
    return top_code(bits) * _LANE_ONES


def check_packed(words: Tensor, num_features: int, bits: int, what: str = "words") -> None:
    """Raise unless ``words`` is an int32 ``[N, row_words(num_features, bits)]`` matrix."""
    check_bits(bits)
    if num_features < 0:
        raise ValueError(f"Expected 'num_features' >= 0 (got {num_features})")
    found = getattr(words, "dtype", type(words).__name__)
    if found is not torch.int32:
        raise TypeError(f"Expected '{what}' to be packed int32 words (got {found}); see 'quantize_pack'")
    expected = row_words(num_features, bits)
    if words.dim() != 2 or words.size(1) != expected:
        raise ValueError(
            f"Expected '{what}' of shape [N, {expected}], {num_features} features at {bits} bits "
            f"(got {list(words.shape)})"
        )


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes.

    Args:
        codes: ``[N, F]``, any integer or float dtype holding integers in ``[0, 2^bits - 1]``;
            higher bits are dropped.
        bits: 1, 2, 4 or 8.

    Returns:
        ``[N, row_words(F, bits)]`` int32.
    """
    check_bits(bits)
    if not isinstance(codes, Tensor):
        raise TypeError(f"Expected 'codes' to be a tensor (got {type(codes).__name__})")
    if codes.is_complex():
        raise TypeError(f"Expected real 'codes' (got {codes.dtype})")
    if codes.dim() != 2:
        raise ValueError(f"Expected 'codes' of shape [N, F] (got {list(codes.shape)})")
    num_rows, num_features = codes.shape
    width, parts = row_bytes(num_features, bits), parts_per_byte(bits)
    lanes = codes.new_zeros((num_rows, parts * width), dtype=torch.int32)
    lanes[:, :num_features] = codes.to(torch.int32) & top_code(bits)
    shifts = torch.arange(parts, dtype=torch.int32, device=codes.device) * bits
    row = (lanes.view(num_rows, parts, width) << shifts.view(1, parts, 1)).sum(1, dtype=torch.int32)
    words = row.to(torch.uint8).view(-1).view(torch.int32)
    return words.view(num_rows, row_words(num_features, bits))


def unpack_codes(words: Tensor, num_features: int, bits: int) -> Tensor:
    """Unpack ``[N, row_words(num_features, bits)]`` int32 words into ``[N, num_features]`` uint8
    codes.
    """
    check_packed(words, num_features, bits)
    parts = parts_per_byte(bits)
    row = words.contiguous().view(torch.uint8)
    shifts = torch.arange(parts, dtype=torch.uint8, device=words.device) * bits
    lanes = (row.unsqueeze(1) >> shifts.view(1, parts, 1)) & top_code(bits)
    return lanes.view(words.size(0), parts * row.size(1))[:, :num_features]
