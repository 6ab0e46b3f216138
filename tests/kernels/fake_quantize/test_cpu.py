"""Gradients of ``fake_quantize`` on the CPU."""

import pytest
import torch
from cpu_support import assert_equal, random_range

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.layout import PACKED_BITS

pytestmark = pytest.mark.usefixtures("poison_empty")
KINDS = ("tensor", "column", "row")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_fake_quantize_gradients(bits: int, kind: str) -> None:
    x, upstream = 2 * torch.randn(150, 33), torch.randn(150, 33)
    span = random_range(kind, 150, 33)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.ops.qgnn.fake_quantize_backward(upstream, x, *span.values(), bits)

    assert_equal(gradients, tolerance=1e-5)
    leaves = [value.clone().requires_grad_() for value in (x, *span.values())]
    with use_backend("cpu"):
        fake_quantize(*leaves, bits).backward(upstream)
        for leaf, gradient in zip(leaves, gradients(), strict=True):
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, gradient)


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
