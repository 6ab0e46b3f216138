"""Gradients of ``fake_quantize`` on the CPU."""

import pytest
import torch
from cpu_support import assert_equal, random_range

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.layout import PACKED_BITS

pytestmark = pytest.mark.usefixtures("poison_empty")
KINDS = ("tensor", "column", "row")


@pytest.mark.parametrize("as_codes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_fake_quantize_gradients(bits: int, kind: str, as_codes: bool) -> None:
    x, upstream = 2 * torch.randn(150, 33), torch.randn(150, 33)
    span = random_range(kind, 150, 33)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.ops.qgnn.fake_quantize_backward(upstream, x, *span.values(), bits, as_codes)

    assert_equal(gradients, tolerance=1e-5)
    leaves = [value.clone().requires_grad_() for value in (x, *span.values())]
    with use_backend("cpu"):
        fake_quantize(*leaves, bits, as_codes=as_codes).backward(upstream)
        for leaf, gradient in zip(leaves, gradients(), strict=True):
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_codes_and_values_are_one(bits: int, kind: str) -> None:
    """``c s + l`` of the codes, and above one bit the gradients through it, are those of the values."""
    x, upstream = 2 * torch.randn(40, 33), torch.randn(40, 33)
    span = random_range(kind, 40, 33)
    values, codes = ([v.clone().requires_grad_() for v in (x, *span.values())] for _ in range(2))
    y = fake_quantize(*values, bits)
    c = fake_quantize(*codes, bits, as_codes=True)
    assert torch.equal(c, c.detach().round().clamp(0, 2**bits - 1))
    assert torch.equal(c * codes[1] + codes[2], y)
    if bits > 1:
        y.backward(upstream)
        (c * codes[1] + codes[2]).backward(upstream)
        for ours, theirs in zip(codes, values, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=2e-3)


def test_gradients_are_those_of_the_definition() -> None:
    """Against finite differences in the range, away from the rounding's jumps."""
    x = torch.tensor([[-2.0, -0.4, 0.3, 1.2, 9.0]])
    scale, offset = torch.tensor([0.7], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    leaf = x.clone().requires_grad_()
    fake_quantize(leaf, scale, offset, 2).sum().backward()
    v = (x + 1) / 0.7
    code = (v + 0.5).floor().clamp(0, 3)
    inside = (v >= 0) & (v <= 3)
    assert torch.equal(leaf.grad, inside.float())
    torch.testing.assert_close(scale.grad, torch.where(inside, code - v, code).sum().view(1))
    assert float(offset.grad) == float((~inside).sum())
