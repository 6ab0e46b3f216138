"""Code-space arithmetic against a second path: dense float64 computation on the dequantized tensors."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from graphs import erdos_renyi, star
from layers.arithmetic_support import assert_near, fitted
from torch import Tensor, nn

import qgnn_plugin as qgnn
from qgnn_plugin import QLRQuantizer
from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import pack_codes
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.layers.arithmetic import aggregate_sum, exact_sum, linear
from qgnn_plugin.quantizers import QuantizedTensor


@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
@pytest.mark.parametrize("levels", ["affine", "unsigned", "half"])
@pytest.mark.parametrize("weight_granularity", ["tensor", "channel"])
@pytest.mark.parametrize("weight_levels", ["affine", "symmetric", "half"])
def test_linear(granularity: str, levels: str, weight_granularity: str, weight_levels: str) -> None:
    x = torch.randn(30, 70)
    x = x.abs() if levels == "unsigned" else x
    weight, bias = torch.randn(9, 70), torch.randn(9)
    for bits, weight_bits in [(8, 8), (2, 4), (32, 4), (4, 32)]:
        qx = fitted(x, bits, levels=levels, granularity=granularity, channels=70)(x)
        options = {"granularity": weight_granularity, "channels": 9, "channel_dim": 0}
        qw = fitted(weight, weight_bits, levels=weight_levels, **options)(weight)
        expected = qx.dequantize().double() @ qw.dequantize().double().t() + bias.double()
        for exact in (True, False):  # sums of offset codes are larger than what they come to
            assert_near(linear(qx, qw, bias, exact), expected, 1e-5)
        assert_near(linear(qx, qw, None, True), expected - bias.double(), 1e-5)


def test_linear_of_one_and_three_dimensions() -> None:
    x, weight = torch.randn(5, 4, 12), torch.randn(7, 12)
    for granularity in ("tensor", "node", "row"):
        quantizer = fitted(x, 8, granularity=granularity)
        qw = fitted(weight, 8, levels="half")(weight)
        expected = quantizer(x).dequantize().double() @ qw.dequantize().double().t()
        assert_near(linear(quantizer(x), qw, None, True), expected)
        row = linear(quantizer(x[0, 0]), qw, None, True)
        torch.testing.assert_close(row, linear(quantizer(x), qw, None, True)[0, 0])


@pytest.mark.parametrize("kind", ["one bit", "one bit rows", "non-negative", "signed"])
@pytest.mark.parametrize("weight_levels", ["affine", "half"])
def test_linear_on_sparse_features(kind: str, weight_levels: str) -> None:
    x = (torch.rand(30, 90) < 0.1).float()
    x = {
        "one bit": x,
        "one bit rows": x * torch.rand(30, 1),
        "non-negative": x * torch.rand(30, 90),
        "signed": x * torch.randn(30, 90),
    }[kind]
    weight = torch.randn(9, 90)
    qw = fitted(weight, 4, levels=weight_levels, granularity="channel", channels=9, channel_dim=0)(weight)
    quantizer = QLRQuantizer(4).train()
    sparse = quantizer(x.to_sparse_csr())
    expected = sparse.dequantize().double() @ qw.dequantize().double().t()
    assert_near(linear(sparse, qw, None, True), expected, 1e-5)
    assert torch.equal(linear(sparse, qw, None, True), linear(quantizer(x), qw, None, True))


@pytest.mark.parametrize("num_in", [600, 5000, 70_000])  # two digits of the codes, and float64
@pytest.mark.parametrize("weight_levels", ["affine", "symmetric", "half"])
def test_wide_products_of_sparse_features(num_in: int, weight_levels: str) -> None:
    """Sums of 8-bit codes may reach 2^24: rounded once, as those of dense features are, with the same gradients."""
    x = torch.rand(5, num_in) * (torch.rand(5, num_in) < 0.8)
    weight = torch.randn(3, num_in)
    options = {"levels": weight_levels, "granularity": "channel", "channels": 3, "channel_dim": 0}
    results = []
    for features_ in (x.to_sparse_csr(), x):
        quantizer, site = QLRQuantizer(8).train(), fitted(weight, 8, **options)
        own = nn.Parameter(weight.clone())
        out = linear(quantizer(features_), site(own), None, True)
        out.square().sum().backward()
        assert own.grad is not None
        results.append((out.detach(), own.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1].double(), 1e-5)


def test_sums_of_codes_are_exact_integers_in_eval() -> None:
    """4,096 products of 255 x 255 pass 2^24; the order of the features must still not matter."""
    x, weight = torch.rand(8, 4096), torch.rand(5, 4096)
    qx, qw = fitted(x, 8), fitted(weight, 8, levels="unsigned")
    order = torch.randperm(4096)
    out = linear(qx(x), qw(weight), None, True)
    assert torch.equal(out, linear(qx(x[:, order]), qw(weight[:, order]), None, True))
    codes = (qx(x).codes.long() @ qw(weight).codes.long().t()).double()
    scale = qw.log_scale.exp().double() * qx.log_scale.exp().double()
    assert_near(out, codes * scale)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
@pytest.mark.parametrize("levels", ["affine", "symmetric", "half"])
@pytest.mark.parametrize("weighted", [False, True])
def test_aggregate_sum(granularity: str, levels: str, weighted: bool) -> None:
    plan = GraphPlan.from_edges(*erdos_renyi().edge_index, 60, 60)
    weight = torch.randn(plan.num_edges) if weighted else None
    dense = torch.zeros(60, 60, dtype=torch.float64)
    values = torch.ones(plan.num_edges) if weight is None else weight
    dense.index_put_((plan.dst, plan.col.long()), values.double(), accumulate=True)
    for shape in ((60, 10), (60, 3, 4)):
        x = torch.randn(shape)
        if len(shape) == 3 and granularity == "channel":
            continue
        quantized_x = fitted(x, 4, levels=levels, granularity=granularity, channels=10)(x)
        expected = torch.einsum("ij,j...->i...", dense, quantized_x.dequantize().double())
        per_head = weight if weight is None or len(shape) == 2 else weight.unsqueeze(1).expand(-1, 3)
        out = aggregate_sum(quantized_x, plan, per_head)
        assert out.shape == shape
        assert_near(out, expected)


def _sum_of_multiples(x: QuantizedTensor, plan: GraphPlan) -> Tensor:
    """``s sum_j m_j c_j + l sum_j m_j`` from sums of int64."""
    assert x.rows is not None
    multiplier = x.rows.multiplier.long()
    parts = [
        torch.zeros(plan.num_dst, part.size(1), dtype=torch.long).index_add_(0, plan.dst, part[plan.col.long()])
        for part in (x.codes.long() * multiplier, multiplier)
    ]
    total, mass = (part.float() for part in parts)
    return total * x.rows.scale + mass * x.rows.lower


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row", "one bit rows"])
def test_sums_in_eval_are_those_of_the_packed_kernel(
    granularity: str, weighted: bool, compress: bool, backend: str
) -> None:
    """The same bits with and without gradients, and the gradients that training has."""
    plan = GraphPlan.from_edges(*erdos_renyi().edge_index, 60, 60)
    x, weight, cotangent = torch.randn(60, 10), torch.rand(plan.num_edges), torch.randn(60, 10)
    options: dict[str, Any] = {"levels": "half", "granularity": granularity, "channels": 10}
    if granularity == "one bit rows":
        x, options = (x > 0) * torch.rand(60, 1), {"granularity": "node"}
    quantizer = fitted(x, 4, **options)
    outs, gradients = [], []
    for exact in (False, True):
        leaf = x.clone().requires_grad_()
        edge = weight.clone().requires_grad_() if weighted else None
        quantizer.zero_grad()
        with use_backend(backend), qgnn.compressed_activations() if compress else nullcontext():
            sent = quantizer(leaf)
            out = aggregate_sum(sent, plan, edge, exact)
        out.backward(cotangent)
        outs.append(out.detach())
        gradients.append([p.grad for p in (leaf, edge, *quantizer.parameters()) if p is not None])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) >= 2
    for trained, evaluated in zip(*gradients, strict=True):
        assert torch.equal(trained, evaluated) if trained is not None else evaluated is None
    with use_backend(backend), torch.no_grad():
        sent = quantizer(x)
        words = pack_codes(sent.codes, quantizer.stored_bits)
        weights = weight if weighted else None
        given: tuple[Any, ...] = (sent.scale, sent.lower)
        multiplier = None
        if sent.rows is not None:
            given, multiplier = (sent.rows.scale, sent.rows.lower), sent.rows.integers()
        bits = quantizer.stored_bits
        expected = aggregate(words, plan, *given, 10, bits, edge_weight=weights, multiplier=multiplier)
        if sent.rows is not None and not weighted:
            assert torch.equal(expected, _sum_of_multiples(sent, plan))
        assert torch.equal(aggregate_sum(sent, plan, weights, True), expected)
    assert torch.equal(outs[1], expected)


def test_large_sums_in_eval_have_a_gradient() -> None:
    """Of results that lie in memory that is used again."""
    plan = GraphPlan.from_edges(torch.arange(20_000), torch.arange(20_000).flip(0), 20_000, 20_000)
    x, weight = torch.randn(20_000, 64), torch.rand(20_000)
    leaf = x.clone().requires_grad_()
    aggregate_sum(fitted(x, 4, granularity="row")(leaf), plan, weight, exact=True).sum().backward()
    assert leaf.grad is not None
    inside = leaf.grad != 0
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(leaf.grad, weight.flip(0).unsqueeze(1) * inside)  # they are in the order of targets


@pytest.mark.parametrize("degree", [65_793, 65_794, 100_000, 1_200_000])
@pytest.mark.parametrize("high", [255, 254])
def test_sums_of_codes_are_rounded_once(degree: int, high: int) -> None:
    """On both sides of 2^24 / 255, and where digits of four bits would not do."""
    col = torch.arange(degree, dtype=torch.int32) % 3
    plan = GraphPlan(torch.tensor([0, 0, degree, degree]), col, 3)
    codes = torch.tensor([[255.0, 1.0], [high, 0.0], [3.0, 2.0]])
    total = torch.bincount(col, minlength=3).double() @ codes.double()
    assert torch.equal(exact_sum(plan, codes, 255), torch.stack([0 * total, total, 0 * total]).float())


def test_exact_sums_keep_the_gradient() -> None:
    degree = 70_001
    plan = GraphPlan(torch.tensor([0, degree]), torch.arange(degree, dtype=torch.int32) % 5, 5)
    x = torch.rand(5, 2, requires_grad=True)
    quantized_x = fitted(x.detach(), 8)(x)
    aggregate_sum(quantized_x, plan).sum().backward()
    counts = torch.bincount(plan.col, minlength=5).float().view(-1, 1)
    inside = (quantized_x.codes.detach() > 0) & (quantized_x.codes.detach() < 255)
    bound = degree / 5 * torch.finfo(torch.float32).eps  # of a float32 sum over a node's edges
    torch.testing.assert_close(x.grad[inside], counts.expand(5, 2)[inside], rtol=bound, atol=0.0)


def test_too_many_neighbours_are_refused() -> None:
    plan = GraphPlan(torch.tensor([0, 2**24]), torch.zeros(0, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="fewer than 16777216 edges into a node"):
        exact_sum(plan, torch.ones(1, 1), 255)


def test_hubs_sum_exactly_beyond_two_to_the_24() -> None:
    leaves = 70_001
    plan = GraphPlan.from_edges(*star(leaves).edge_index, leaves + 1, leaves + 1)
    x = torch.full((leaves + 1, 1), 1.0)
    x[1, 0] = 0.0
    x[2:, 0] -= torch.arange(leaves - 1) % 2 / 255  # codes 255 and 254 in turn
    quantizer = fitted(x, 8)
    with torch.no_grad():
        quantizer.log_scale.fill_(torch.tensor(1 / 255).log())
    codes = quantizer(x).codes
    total = int(codes[1:].long().sum())
    assert total > 2**24
    out = aggregate_sum(quantizer(x), plan)
    scale = quantizer.log_scale.detach().exp()
    assert out[0, 0] == torch.tensor(float(total)) * scale
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(leaves)])
    assert torch.equal(aggregate_sum(quantizer(x[order]), plan)[0], out[0])
