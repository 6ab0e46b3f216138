"""``fake_quantize`` and its gradients against their references."""

import pytest
import torch
from triton_support import assert_same, ranges

from qgnn_plugin.kernels.fake_quantize import fake_quantize
from qgnn_plugin.kernels.layout import PACKED_BITS

ROWS = 37


@pytest.mark.parametrize("as_codes", [False, True])
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("features", "kind"), [(1, "tensor"), (33, "column"), (300, "row")])
def test_fake_quantize_and_its_gradients(bits: int, features: int, kind: str, as_codes: bool) -> None:
    x = 2 * torch.randn(ROWS, features)
    grad = torch.randn(ROWS, features)
    scale, offset = ranges(kind, ROWS, features)

    def run() -> tuple[torch.Tensor, ...]:
        leaves = [v.clone().requires_grad_() for v in (x, scale, offset)]
        y = fake_quantize(*leaves, bits, as_codes=as_codes)
        y.backward(grad)
        return y.detach(), *(v.grad for v in leaves)

    assert_same(run, exact=False)
    assert_same(lambda: fake_quantize(x, scale, offset, bits, as_codes=as_codes))
