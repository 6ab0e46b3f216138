"""Codes of attention numerators, and the gradient of the softmax."""


import pytest
import torch
from core.support import CONVS, NODES, features, graph

import qgnn_plugin as qgnn
from qgnn_plugin.convs.attention import attention_numerators
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.layers.numerators import attention_codes, attention_thresholds


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_attention_codes_round_the_numerator(bits: int) -> None:
    qmax = 2**bits - 1
    shifted = -torch.rand(5000, dtype=torch.float64) * 8
    expected = torch.floor(shifted.exp() * qmax + 0.5)
    assert torch.equal(attention_codes(shifted, bits), expected)
    assert attention_codes(torch.zeros(1), bits).item() == qmax
    assert attention_codes(torch.tensor([-1e4, -float("inf")]), bits).tolist() == [0, 0]
    thresholds = attention_thresholds(bits)
    assert len(thresholds) == qmax
    assert list(thresholds) == sorted(thresholds)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_attention_has_the_gradient_of_the_softmax(bits: int) -> None:
    # One node with 400 neighbours of nearly equal logits, another with one far ahead: with few levels, the codes of
    # either sum to something else than the numerators do.
    dst = torch.tensor([0] * 400 + [1] * 50)
    plan = GraphPlan.from_edges(torch.arange(450), dst, 450, 2)
    logits = torch.randn(450, 3, dtype=torch.float64)
    logits[400] += 6
    logits.requires_grad_()
    value = torch.randn(450, 3, dtype=torch.float64)
    peak = torch.stack([logits[:400].amax(0), logits[400:].amax(0)]).detach()
    numerator, total = attention_numerators(logits - peak[dst], plan, bits)
    codes = attention_codes(logits - peak[dst], bits)
    assert torch.equal(numerator, codes)
    assert torch.equal(total[0], codes[:400].sum(0))
    (grad,) = torch.autograd.grad((numerator / total[dst] * value).sum(), logits)
    softmax = torch.cat([logits[:400].softmax(0), logits[400:].softmax(0)])
    (expected,) = torch.autograd.grad((softmax * value).sum(), logits)
    torch.testing.assert_close(grad, expected)


def test_attention_gradient_is_that_of_the_float_layer_to_quantization_error() -> None:
    torch.manual_seed(1)
    x, edge_index = features(), graph()
    conv = CONVS["GATConv"]()
    qconv = qgnn.quantize_model(conv, 8)
    qgnn.calibrate(qconv, (x, edge_index))
    grad = torch.randn(NODES, 18)
    for layer in (conv, qconv):
        layer.train()(x, edge_index).backward(grad)
    # Values an ulp beyond a fitted range, such as a row's largest weight, pass no gradient.
    bounds = {"lin.weight": 0.2}
    for name, parameter in conv.named_parameters():
        actual = qconv.get_parameter(name).grad
        assert actual is not None
        assert parameter.grad is not None
        assert (actual - parameter.grad).norm() < bounds.get(name, 0.05) * parameter.grad.norm(), name
