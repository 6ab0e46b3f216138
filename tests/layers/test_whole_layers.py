"""Converted layers step by step against dense float64 computation, from the codes that they make."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core.support import CONVS, NODES, OUT, WIDTH, features, graph, quantized
from layers.arithmetic_support import assert_near
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GCNConv, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig


class Trace:
    """What every quantizer of a converted layer was given and made of it, followed step by step.

    A step of the reference must agree with what the layer's quantizer was given; it then goes on from the layer's
    own codes: near the border of two codes, float64 and float32 may rightly differ.
    """

    def __init__(self, layer: nn.Module, *args: Any) -> None:
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.sites = qgnn.quantizers(layer)
        handles = [q.register_forward_hook(self._recorder(name)) for name, q in self.sites.items()]
        self.out = layer(*args)
        for handle in handles:
            handle.remove()

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, out: Any) -> None:
            self.calls.setdefault(name, []).append((args[0].detach(), out.dequantize().double().detach()))

        return record

    def __call__(self, site: str, values: Tensor) -> Tensor:
        name = f"{site}_quantizer" if "step" not in site else site
        if name not in self.calls and self.sites[name].bits == 32:
            return values.double()  # a layer may pass by a site that is off
        given, made = self.calls[name].pop(0)
        assert_near(given, values.double())
        return made

    def linear(self, name: str, layer: Any, x: Tensor, bias: bool = True) -> Tensor:
        """``x`` in float64 through a converted linear layer."""
        if layer.input_quantizer is not None:
            x = self(f"{name}.input", x)
        out = x @ self(f"{name}.weight", layer.weight).t()
        return out + layer.bias.detach().double() if bias and layer.bias is not None else out

    def finish(self, expected: Tensor) -> None:
        """The layer's output is ``expected``, and nothing was quantized that the reference did not follow."""
        assert_near(self.out, expected)
        assert not any(self.calls.values()), self.calls


def dense_adjacency(edge_index: Tensor, weight: Tensor | None = None) -> Tensor:
    matrix = torch.zeros(NODES, NODES, dtype=torch.float64)
    values = torch.ones(edge_index.size(1)) if weight is None else weight
    return matrix.index_put((edge_index[1], edge_index[0]), values.double(), accumulate=True)


def with_loops(adjacency: Tensor) -> Tensor:
    missing = (adjacency.diagonal() == 0).double()
    return adjacency + torch.diag(missing)


CONFIGS = {
    "4 bits": QuantConfig(bits=4),
    "8 bits": QuantConfig(bits=8),
    "2 bits": QuantConfig(bits=2),
    "mixed": QuantConfig(bits=4, weight_bits=2, message_bits=8, weight_levels="affine", attention_bits=4),
    "half messages": QuantConfig(bits=4, message_levels="half", weight_granularity="tensor"),
    "per node": QuantConfig(bits=4, granularity="node"),
    "per row": QuantConfig(bits=4, granularity="row"),
    "per channel": QuantConfig(bits=4, granularity="channel"),
    "float weights": QuantConfig(bits=4, weight_bits=32),
    "float messages": QuantConfig(bits=4, message_bits=32, attention_bits=32),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gcn(config: str, weighted: bool) -> None:
    x, edge_index = features(), graph()
    weight = torch.rand(edge_index.size(1)) + 0.1 if weighted else None
    args = (x, edge_index, weight)
    layer: Any = quantized(GCNConv(WIDTH, OUT), *args, config=CONFIGS[config])
    matrix = with_loops(dense_adjacency(edge_index, weight))
    factor = matrix.sum(1).rsqrt().unsqueeze(1)
    trace = Trace(layer, *args)
    messages = trace("message", trace.linear("lin", layer.lin, x) * factor)
    trace.finish(factor * (matrix @ messages) + layer.bias.detach().double())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("out", [OUT, 2 * WIDTH])
@pytest.mark.parametrize("aggr", ["mean", "sum"])
def test_sage(config: str, out: int, aggr: str) -> None:
    x, edge_index = features(), graph()
    layer: Any = quantized(SAGEConv(WIDTH, out, aggr=aggr), x, edge_index, config=CONFIGS[config])
    matrix = dense_adjacency(edge_index)
    operator = matrix / matrix.sum(1, keepdim=True).clamp_min(1) if aggr == "mean" else matrix
    trace = Trace(layer, x, edge_index)
    sent = trace("input", x)
    bias = layer.lin_l.bias.detach().double()
    if out <= WIDTH:
        neighbours = operator @ trace("message", trace.linear("lin_l", layer.lin_l, sent, bias=False))
    else:
        neighbours = trace.linear("lin_l", layer.lin_l, operator @ sent, bias=False)
    trace.finish(neighbours + bias + trace.linear("lin_r", layer.lin_r, sent))


@pytest.mark.parametrize("config", CONFIGS)
def test_gin(config: str) -> None:
    x, edge_index = features(), graph()
    conv = CONVS["GINConv"]()
    conv.eps.data.fill_(0.3)
    layer: Any = quantized(conv, x, edge_index, config=CONFIGS[config])
    trace = Trace(layer, x, edge_index)
    sent = trace("message", x)
    hidden = dense_adjacency(edge_index) @ sent + 1.3 * sent
    trace.finish(trace.linear("nn.2", layer.nn[2], trace.linear("nn.0", layer.nn[0], hidden).relu()))


@pytest.mark.parametrize("config", CONFIGS)
def test_appnp(config: str) -> None:
    x, edge_index = features(), graph()
    layer: Any = quantized(APPNP(3, 0.2), x, edge_index, config=CONFIGS[config])
    matrix = with_loops(dense_adjacency(edge_index))
    factor = matrix.sum(1).rsqrt().unsqueeze(1)
    trace = Trace(layer, x, edge_index)
    start = out = trace("input", x)
    for step in range(3):
        out = 0.8 * factor * (matrix @ trace(f"step_quantizers.{step}", out * factor)) + 0.2 * start
    trace.finish(out)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv"])
def test_attention(config: str, name: str) -> None:
    """Softmax over a dense matrix of logits, its numerators rounded half up to ``Q`` levels."""
    x, edge_index = features(), graph()
    layer: Any = quantized(CONVS[name](), x, edge_index, config=CONFIGS[config])
    shape = (NODES, layer.heads, layer.out_channels)
    mask = with_loops(dense_adjacency(edge_index)).unsqueeze(-1) > 0
    trace = Trace(layer, x, edge_index)
    if name == "GATConv":
        z = trace.linear("lin", layer.lin, x).view(shape)
        sent = trace("message", z)
        logits = (z * layer.att_src.double()).sum(-1) + (z * layer.att_dst.double()).sum(-1).unsqueeze(1)
        logits = F.leaky_relu(logits, layer.negative_slope)
    else:
        sent = trace("message", trace.linear("lin_l", layer.lin_l, x).view(shape))
        target = trace("target", trace.linear("lin_r", layer.lin_r, x).view(shape))
        hidden = F.leaky_relu(sent.unsqueeze(0) + target.unsqueeze(1), layer.negative_slope)
        logits = (hidden * layer.att.double()).sum(-1)
    logits = logits.detach().masked_fill(~mask, -torch.inf)
    numerator = (logits - logits.amax(1, keepdim=True)).exp()
    if layer.attention_bits != 32:
        numerator = torch.floor(numerator * (2**layer.attention_bits - 1) + 0.5)
    expected = torch.einsum("ijh,jhc->ihc", numerator, sent) / numerator.sum(1).unsqueeze(-1)
    trace.finish(expected.flatten(1) + layer.bias.detach().double())


@pytest.mark.parametrize("config", CONFIGS)
def test_linear_layer(config: str) -> None:
    x = features()
    layer: Any = quantized(nn.Linear(WIDTH, OUT), x, config=CONFIGS[config])
    trace = Trace(layer, x)
    given, _ = trace.calls["input_quantizer"][0]
    assert torch.equal(given, x)
    made = trace("input", x) @ trace("weight", layer.weight).t()
    trace.finish(made + layer.bias.detach().double())
