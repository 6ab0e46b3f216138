r"""``head_dots``: what the features of every head add to logits of attention, :math:`\langle x_{nh}, a_{vh}\rangle`.

Float sums depend on their order, so there is one for every backend: that of :mod:`..arithmetic`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import DOT_LANES
from ..backend import implementation, is_direct
from ..checks import check_float, check_matrix
from ..library import register

__all__ = ["check_vectors", "head_dots", "head_dots_reference"]


def head_dots_reference(x: Tensor, vectors: Tensor, heads: int) -> Tensor:
    count, rows, width = vectors.size(0), x.size(0), x.size(1) // heads
    products = x.view(1, rows, heads, width) * vectors.view(count, 1, heads, width)
    groups = F.pad(products, (0, -width % DOT_LANES)).view(count, rows, heads, -(-width // DOT_LANES), DOT_LANES)
    total = x.new_zeros((count, rows, heads, DOT_LANES))
    for group in groups.unbind(3):
        total = total + group
    lanes = DOT_LANES
    while lanes > 1:
        lanes //= 2
        total = total[..., :lanes] + total[..., lanes:]
    return total.squeeze(3)


def _fake(x: Tensor, vectors: Tensor, heads: int) -> Tensor:
    return x.new_empty((vectors.size(0), x.size(0), heads))


def check_vectors(vectors: Tensor, heads: int, num_features: int) -> None:
    """Raise unless ``vectors`` is a float32 matrix of rows as long as ``heads`` heads of ``num_features`` in all."""
    check_matrix(vectors, "vectors")
    if heads < 1 or num_features % heads:
        raise ValueError(f"Expected a number of heads that divides {num_features} features (got {heads})")
    check_float(vectors, "vectors", (vectors.size(0), num_features))


def _check(x: Tensor, vectors: Tensor, heads: int) -> None:
    check_matrix(x, "x")
    check_vectors(vectors, heads, x.size(1))


register(head_dots_reference, _fake, _check)


def head_dots(x: Tensor, vectors: Tensor, heads: int, *, is_checked: bool = False) -> Tensor:
    r"""``out_vnh = <x_nh, a_vh>`` for the ``H`` heads of every row; without gradient.

    Args:
        x: ``[N, H C]`` float32.
        vectors: ``[V, H C]`` float32.
        heads: ``H``.
        is_checked: As that of :func:`~qgnn_plugin.kernels.linear.linear`.

    Returns:
        ``[V, N, H]`` float32.  Bitwise the same on every backend.

    Raises:
        TypeError: If an argument has another dtype.
        ValueError: If one has another shape, or is on another device, or if ``heads`` does not divide the features.
    """
    if is_checked and x.is_cpu and is_direct():
        return implementation("head_dots", "cpu")(x, vectors, heads)
    return torch.ops.qgnn.head_dots.default(x, vectors, heads)
