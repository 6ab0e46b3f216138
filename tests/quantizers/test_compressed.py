"""Compressed activations: how many bytes a training step keeps, and what its gradients are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GATv2Conv, GCNConv, GINConv, SAGEConv

import qgnn_plugin as qgnn
from qgnn_plugin.quantizers.compressed import compressing

NODES, EDGES = 4000, 32000
WIDTHS = (128, 256, 256, 40)
HEADS = 4


class Model(nn.Module):
    """Three convolutions with ReLU and dropout between them, as papers train them."""

    def __init__(self, make: Callable[[int, int, bool], nn.Module], widths: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        last = len(widths) - 2
        self.convs = nn.ModuleList(make(a, b, i == last) for i, (a, b) in enumerate(pairwise(widths)))
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x = F.dropout(conv(x, edge_index).relu(), self.dropout, self.training)
        return self.convs[-1](x, edge_index)


def _gat(a: int, b: int, last: bool) -> nn.Module:
    return GATConv(a, b) if last else GATConv(a, b // HEADS, heads=HEADS)


def _gin(a: int, b: int, last: bool) -> nn.Module:
    return GINConv(nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, b)), train_eps=True)


LAYERS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "GCN": lambda a, b, last: GCNConv(a, b),
    "GraphSAGE": lambda a, b, last: SAGEConv(a, b),
    "GAT": _gat,
    "GIN": _gin,
    "GATv2": lambda a, b, last: GATv2Conv(a, b) if last else GATv2Conv(a, b // HEADS, heads=HEADS),
}


def graph(nodes: int = NODES, edges: int = EDGES, width: int = WIDTHS[0]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(nodes, width)
    return x, torch.randint(nodes, (2, edges)), torch.randint(WIDTHS[-1], (nodes,))


def converted(model: nn.Module, x: Tensor, edge_index: Tensor, **config: object) -> nn.Module:
    model = qgnn.quantize_model(model, config=qgnn.QuantConfig(**config))  # type: ignore[arg-type]
    qgnn.calibrate(model, (x, edge_index), method="ranges")
    return model.train()


class SavedBytes:
    """Bytes of distinct memory that autograd keeps, without ``known`` tensors (parameters, data, graph)."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.kept: dict[int, Tensor] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        strided = tensor if tensor.layout == torch.strided else tensor.values()
        pointer = strided.untyped_storage().data_ptr()
        if pointer not in self.known:
            self.kept[pointer] = strided
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    @property
    def total(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.kept.values())


def step_bytes(model: nn.Module, x: Tensor, edge_index: Tensor, y: Tensor, compress: bool) -> int:
    """What one step keeps, loss included; the whole graph is alive until it is counted."""
    saved = SavedBytes([x, edge_index, y, *model.parameters(), *model.buffers()])
    with saved.counting(), qgnn.compressed_activations() if compress else nullcontext():
        loss = F.cross_entropy(model(x, edge_index), y)
    total = saved.total
    loss.backward()
    return total


@pytest.mark.parametrize(("bits", "dropout"), [(2, 0.0), (4, 0.0), (4, 0.5)])
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_step_keeps_at_most_a_quarter_of_the_float_steps_bytes(name: str, bits: int, dropout: float) -> None:
    model = Model(LAYERS[name], WIDTHS, dropout)
    x, edge_index, y = graph()
    full = step_bytes(model.train(), x, edge_index, y, compress=False)
    kept = step_bytes(converted(model, x, edge_index, bits=bits), x, edge_index, y, compress=True)
    assert kept <= full / 4, f"{name} int{bits} keeps {kept / full:.1%}"


@pytest.mark.parametrize("granularity", ["tensor", "node", "channel", "row"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_gradients_agree_with_those_of_a_plain_step(name: str, granularity: str) -> None:
    model = Model(LAYERS[name], (24, 16, 16, 40), dropout=0.5)
    x, edge_index, y = graph(60, 300, 24)
    model = converted(model, x, edge_index, bits=4, granularity=granularity)
    outputs, gradients = [], []
    for compress in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        with qgnn.compressed_activations() if compress else nullcontext():
            out = model(x, edge_index)
            loss = F.cross_entropy(out, y)
        loss.backward()
        outputs.append(out.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for key, want in gradients[0].items():
        if "log_scale" in key or "offset" in key:
            continue
        error = (gradients[1][key] - want).norm() / want.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{key}: {error:.2e}"


@pytest.mark.parametrize("granularity", ["tensor", "node", "channel", "row"])
@pytest.mark.parametrize("name", ["GCN", "GraphSAGE", "GAT"])
def test_messages_that_are_computed_again_have_exact_range_gradients(name: str, granularity: str) -> None:
    conv = LAYERS[name](24, 16, False)
    x, edge_index, _ = graph(60, 300, 24)
    conv = converted(conv, x, edge_index, bits=2, granularity=granularity)
    cotangent = torch.randn(60, 16)
    gradients = []
    for compress in (False, True):
        conv.zero_grad()
        with qgnn.compressed_activations() if compress else nullcontext():
            out = conv(x, edge_index)
        out.backward(cotangent, retain_graph=True)
        out.backward(cotangent)
        ranges = conv.message_quantizer.parameters()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in ranges]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_messages_that_a_hook_changed_are_not_computed_again_without_it() -> None:
    conv = converted(GCNConv(24, 16), *graph(60, 300, 24)[:2], bits=4)
    conv.lin.register_forward_hook(lambda module, args, out: out.sin())
    x, edge_index, _ = graph(60, 300, 24)
    gradients = []
    for compress in (False, True):
        conv.zero_grad()
        with qgnn.compressed_activations() if compress else nullcontext():
            out = conv(x, edge_index)
        out.square().sum().backward()
        gradients.append(conv.lin.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codes_kept", [False, True])
def test_range_gradients_are_within_the_rounding_they_estimate(codes_kept: bool) -> None:
    quantizer = qgnn.QLRQuantizer(4)
    x = 2 * torch.randn(400, 64)
    quantizer.set_range(x)
    quantizer.train()
    grad = torch.randn(400, 64)
    exact, kept = [], []
    for compress, into in ((False, exact), (True, kept)):
        quantizer.zero_grad()
        leaf = x.clone().requires_grad_()
        with qgnn.compressed_activations() if compress else nullcontext():
            values = quantizer(leaf, codes_kept).dequantize()
        values.backward(grad)
        into += [leaf.grad, quantizer.log_scale.grad, quantizer.offset.grad]
    torch.testing.assert_close(kept[0], exact[0], rtol=1e-4, atol=1e-5)
    # |c - v| is uniform on [0, 1/2] around the 1/4 that stands for it: its standard deviation is 1 / (4 sqrt 3).
    with torch.no_grad():
        scale, _ = quantizer.range()
        spread = float(scale) * float(grad.norm()) / (4 * 3**0.5)
    assert abs(float(kept[1] - exact[1])) < 5 * spread
    torch.testing.assert_close(kept[2], exact[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(7,), (5, 33), (3, 4, 40)])
def test_relu_and_dropout_give_bitwise_the_same_gradients(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    x.view(-1)[0] = 0.0
    results = []
    for compress in (False, True):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        with qgnn.compressed_activations() if compress else nullcontext():
            out = F.dropout(nn.ReLU()(leaf).relu() + torch.relu(leaf), 0.3)
        (out * torch.arange(out.numel()).view(shape)).sum().backward()
        results.append((out.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_context_ends_and_eval_is_left_alone() -> None:
    model = Model(LAYERS["GCN"], (24, 16, 16, 40), dropout=0.5)
    x, edge_index, _ = graph(60, 300, 24)
    model = converted(model, x, edge_index, bits=2).eval()
    want = model(x, edge_index)
    with qgnn.compressed_activations():
        assert compressing()
        assert torch.equal(model(x, edge_index), want)
        with torch.no_grad():
            assert torch.equal(model(x, edge_index), want)
    assert not compressing()
