"""Weights as ``linear`` multiplies by them: one signed byte per code, made once and kept beside the packed ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import PlanCache
from ..indices import is_capturing
from ..layout import parts_per_byte, row_bytes, top_code, unpack_codes
from . import linear_colterm

__all__ = ["PreparedWeights", "prepare_weights", "prepared_weights", "zero_code"]


class PreparedWeights(NamedTuple):
    """Weights of one ``linear``, for input of one width.

    Attributes:
        codes: ``[O, chunks * parts * block]`` int8 in the order in which the input's bytes are read: chunk by chunk of
            ``block`` bytes, in each part after part, in each byte after byte.  Less :func:`zero_code`; 0 where a row of
            input has padding.
        column_sum: ``[O]`` int32, the sum over ``codes``.
        column_term: ``[O]`` float32, what an input of ones would give (:func:`.linear_colterm`).
    """

    codes: Tensor
    column_sum: Tensor
    column_term: Tensor


_cache = PlanCache(capacity=256)


def zero_code(bits: int) -> int:
    """What is taken from codes so that they fit a signed byte."""
    return 128 if top_code(bits) > 127 else 0


def prepared_weights(
    words: Tensor, scale: Tensor, offset: Tensor, in_features: int, x_bits: int, w_bits: int, block: int
) -> PreparedWeights:
    """:func:`prepare_weights`, once for as long as the weights stay what they are."""

    def build() -> PreparedWeights:
        if is_capturing(words):
            raise RuntimeError(
                "Expected prepared weights to exist before CUDA graph capture (got new weights); run the model once "
                "before capturing it"
            )
        return prepare_weights(words, scale, offset, in_features, x_bits, w_bits, block)

    return _cache.get((words, scale, offset), ("linear", in_features, x_bits, w_bits, block), build)


def prepare_weights(
    words: Tensor, scale: Tensor, offset: Tensor, in_features: int, x_bits: int, w_bits: int, block: int
) -> PreparedWeights:
    """Unpack ``words``, ``[O, row_words(in_features, w_bits)]``, for input of ``x_bits`` read in blocks of ``block``
    bytes.
    """
    codes = unpack_codes(words, in_features, w_bits)
    signed = (codes.to(torch.int16) - zero_code(w_bits)).to(torch.int8)
    parts, width = parts_per_byte(x_bits), row_bytes(in_features, x_bits)
    chunks = max(1, -(-width // block))
    flat = signed.new_zeros(words.size(0), parts * width)
    flat[:, :in_features] = signed
    rows = signed.new_zeros(words.size(0), parts, chunks * block)
    rows[:, :, :width] = flat.view(words.size(0), parts, width)
    rows = rows.view(-1, parts, chunks, block).transpose(1, 2).reshape(words.size(0), chunks * parts * block)
    term = linear_colterm(codes, scale, offset).expand(words.size(0)).contiguous()
    return PreparedWeights(rows, rows.sum(1, dtype=torch.int32), term)
