"""``smp_step`` in operations that ONNX has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..onnx import finish, sums, unpack
from . import step_factors


def smp_step(
    h: Tensor,
    x0: Tensor,
    rowptr: Tensor,
    col: Tensor,
    norm: Tensor,
    eta: float,
    mu: float,
    multiplier: float,
    measure: bool = False,
    words: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    bits: int = 0,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    out_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    factor = norm.unsqueeze(1)
    if words is None:
        near = sums(h * factor, rowptr, col) * factor
    else:
        assert scale is not None
        assert offset is not None
        degree = (rowptr[1:] - rowptr[:-1]).to(torch.float32).unsqueeze(1)
        total = sums(unpack(words, h.size(1), bits), rowptr, col).to(torch.float32)
        near = ((total * scale) + (degree * offset)) * factor
    c0, c1, c2 = step_factors(eta, mu, multiplier)
    u = ((c0 * h) + (c1 * near)) + (eta * x0)
    energy = (h.double() * (h - near).double()).sum()
    constraint, out = torch.zeros_like(energy), u
    if measure or multiplier != 0:
        d = u - h
        rough = d - sums(d * factor, rowptr, col) * factor
        out = u - (c2 * rough)
        constraint = (d.double() * rough.double()).sum()
    packed = h.new_zeros((0, 0), dtype=torch.int32)
    if out_bits:
        packed = finish(out * factor, None, False, out_scale, out_offset, out_bits)
    return out, packed, torch.stack([constraint, energy]).to(torch.float32)
