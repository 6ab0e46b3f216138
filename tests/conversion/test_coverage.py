"""What of a model stays float is said: in a summary, and by a warning where it is most of it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.support import CONVS, NODES, OUT, WIDTH, Plain, features, graph
from torch import Tensor, nn
from torch_geometric.nn import (
    GAT,
    GCN,
    GIN,
    PNA,
    EdgeCNN,
    GraphSAGE,
    LGConv,
    MessagePassing,
)

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.conversion.coverage import Coverage


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(NODES, 64)), nn.Linear(64, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table[: x.size(0)])


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.conv = nn.EmbeddingBag(200, 64), LGConv()


class Gated(MessagePassing):
    """A convolution with a weight for each node and feature."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(NODES, WIDTH))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x * self.gate)


class OwnCell(nn.GRUCell):
    """A subclass that computes something else."""

    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        return nn.GRUCell.forward(self, x, hx).relu()


class Around(nn.Module):
    """A float part, and a linear layer on what it makes of ``[N, WIDTH]``."""

    def __init__(self, part: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.run = part, run
        with torch.no_grad():
            self.head = nn.Linear(run(part, features()).size(-1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.part, x))


# A float part each, and what is said about it.
PARTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], str]] = {
    "OwnCell": (lambda: OwnCell(WIDTH, 16), lambda m, x: m(x), "its forward is its own"),
    "Conv3d": (lambda: nn.Conv3d(1, 8, (1, 1, WIDTH)), lambda m, x: m(x[None, None])[:, 0, :, 0].t(), "Conv1d and"),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(WIDTH, 16, 1), lambda m, x: m(x.t()).t(), "convolutions over a"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(50, 16), lambda m, x: m(x[:, :2].abs().long()), "looked up"),
    "Gated": (lambda: Gated(), lambda m, x: m(x, graph()), "no factors of products"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_float_parts_are_named_with_their_share(name: str) -> None:
    make, run, reason = PARTS[name]
    model = Around(make(), run)
    with pytest.warns(UserWarning, match=rf"% of the weights of Around are quantized.*part[.\w]* \({name}, [\d,]+\)"):
        qmodel = qgnn.quantize_model(model)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    for done in (qmodel, qgnn.calibrate(qmodel, [(features(),)]).eval(), qgnn.pack_model(qmodel)):
        report: Any = qgnn.summary(done)
        found: Coverage = report.coverage
        assert found.quantized == model.head.weight.numel()
        assert found.total == weights
        part = next(part for part in found.parts if part.type == name)
        assert reason in part.reason
        assert f"float: {part.name} ({name}, {part.weights:,} weights): " in str(report)
        assert f"quantized: {found.quantized:,} of {weights:,} weights ({found.share:.0%})" in str(report)


def test_each_layer_has_its_share() -> None:
    """Of its own weights what is quantized, and of all multiply-adds what it does, which packed files do not hold."""
    model = nn.Sequential(nn.Linear(WIDTH, 30), nn.Linear(30, 10), nn.Linear(10, OUT))
    config = QuantConfig(bits=4, overrides={"1": {"weight_bits": 32}})
    qmodel = qgnn.quantize_model(model, config=config).eval()
    assert {qgnn.summary(qmodel).coverage.cells(name)[1] for name in "012"} == {"-"}
    qgnn.calibrate(qmodel, [(features(),)])
    work = [NODES * WIDTH * 30, NODES * 30 * 10, NODES * 10 * OUT]
    report: Any = qgnn.summary(qmodel)
    assert [report.coverage.layers[name].total_work for name in "012"] == work
    assert [report.coverage.layers[name].quantized_work for name in "012"] == [work[0], 0, work[2]]
    shares = [report.coverage.cells(name) for name in "012"]
    assert shares == [(q, f"{w / sum(work):.0%}") for q, w in zip(("100%", "0%", "100%"), work, strict=True)]
    rows = [line.split() for line in str(report).splitlines()[2:5]]
    assert [tuple(row[-2:]) for row in rows] == shares
    assert report.coverage.work_share == (work[0] + work[2]) / sum(work)
    packed = qgnn.summary(qgnn.pack_model(qmodel))
    assert [line.split()[-1] for line in str(packed).splitlines()[2:5]] == [q for q, _ in shares]
    assert report.coverage.cells("nowhere") == ("-", "-")


def test_multiply_adds_are_known_from_calibration() -> None:
    model = Around(nn.Embedding(50, 16), lambda m, x: m(x[:, 0].abs().long()))
    qmodel: Any = qgnn.quantize_model(model)
    report: Any = qgnn.summary(qmodel)
    assert report.coverage.work_share is None
    qgnn.calibrate(qmodel, [(features(),), (features(),)])
    assert qgnn.summary(qmodel).coverage.work_share == 1.0  # type: ignore[union-attr]  # a lookup multiplies nothing
    assert "100% of the multiply-adds with weights" in str(qgnn.summary(qmodel))

    model = Around(nn.GRUCell(WIDTH, 16), lambda m, x: m(x))
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, include="head"), [(features(),)])
    own, other = NODES * 16 * 2, NODES * (3 * 16 * WIDTH + 3 * 16 * 16)
    assert qgnn.summary(qmodel).coverage.work_share == own / (own + other)  # type: ignore[union-attr]
    report = qgnn.summary(qmodel)
    assert report.coverage.layers["part"].total_work == other
    assert (report.coverage.layers["part"].quantized, report.coverage.layers["part"].quantized_work) == (0, 0)
    layer: Any = qgnn.calibrate(
        qgnn.quantize_model(CONVS["SAGEConv"]()), (features(), graph())
    )  # calls its maps itself
    assert qgnn.summary(layer).coverage.work == 2 * WIDTH * OUT * NODES  # type: ignore[union-attr]


def test_embeddings_and_parameters_of_the_model_itself() -> None:
    with pytest.warns(UserWarning, match=r"^Only 0% of the weights of Bags .*; bag \(EmbeddingBag, 12,800\)"):
        qgnn.quantize_model(Bags())
    with pytest.warns(UserWarning, match=r"\(model\) \(OwnParameter, 2,560\)"):
        qmodel = qgnn.quantize_model(OwnParameter())
    assert "(model) (OwnParameter, 2,560 weights): weights of its own, which the code around them" in str(
        qgnn.summary(qmodel)
    )


QUIET: dict[str, Callable[[], nn.Module]] = {
    **CONVS,
    "plain": Plain,
    "GCN": lambda: GCN(WIDTH, 8, 2, OUT, norm="batch_norm"),
    "GAT": lambda: GAT(WIDTH, 8, 2, OUT, heads=2),
    "GATv2": lambda: GAT(WIDTH, 8, 2, OUT, v2=True),
    "GIN": lambda: GIN(WIDTH, 8, 2, OUT),
    "GraphSAGE": lambda: GraphSAGE(WIDTH, 8, 2, OUT, jk="cat"),
    "EdgeCNN": lambda: EdgeCNN(WIDTH, 8, 2, OUT),
    "PNA": lambda: PNA(WIDTH, 8, 2, OUT, aggregators=["mean", "max"], scalers=["identity"], deg=torch.ones(9).long()),
    "attention": lambda: nn.TransformerEncoderLayer(16, 4, 32),
}


@pytest.mark.parametrize("name", QUIET)
def test_ordinary_models_bring_no_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bits in (4, 32):
            qgnn.quantize_model(QUIET[name](), bits)


def test_a_choice_brings_no_warning() -> None:
    model = nn.ModuleList([nn.Linear(40, 40), nn.Linear(4, 4), nn.Embedding(3, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = qgnn.quantize_model(model, include="1")
        qgnn.quantize_model(model, exclude="0")
        config = QuantConfig(bits=4, overrides={"0": {"weight_bits": 32}})
        chosen = qgnn.quantize_model(model, config=config)
        qgnn.quantize_model(model, config=QuantConfig(bits=4, weight_bits=32))
    assert "0 (Linear, 1,600 weights): not converted" in str(qgnn.summary(some))
    assert "0 (Linear, 1,600 weights): 32 bits by its configuration" in str(qgnn.summary(chosen))


def test_layers_that_are_never_called() -> None:
    """Their weights are read by other code, or not at all."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.used(x), self.read.weight.t())

    qmodel = qgnn.quantize_model(Functional())
    assert qgnn.summary(qmodel).coverage.share == 1  # type: ignore[union-attr]
    qgnn.calibrate(qmodel, [(features(),)]).eval()
    assert "read (Linear, 144 weights): never ran" in str(qgnn.summary(qmodel))
    with pytest.warns(UserWarning, match="never ran"):
        packed = qgnn.pack_model(qmodel)
    assert "read (Linear, 144 weights): never ran" in str(qgnn.summary(packed))
    x = features()
    assert torch.equal(packed(x), qmodel(x))


def test_tied_weights_count_once() -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model[1].weight = model[0].weight
    assert qgnn.summary(qgnn.quantize_model(model)).coverage.quantized == 64  # type: ignore[union-attr]


@pytest.mark.parametrize("name", sorted(CONVS.keys() - {"GATv2Conv shared"}))
@pytest.mark.parametrize("bits", [4, 32])
def test_gradients_of_every_parameter(name: str, bits: int) -> None:
    """What does not learn is no parameter."""
    x, edge_index = features(), graph()
    layer = qgnn.quantize_model(CONVS[name](), bits)
    out = layer.train()(x, edge_index)
    parameters = list(layer.parameters())
    assert all(p.requires_grad for p in parameters)
    if parameters:
        assert all(g is not None for g in torch.autograd.grad(out.sum(), parameters))
    assert [*qgnn.range_parameters(layer)] == [p for q in qgnn.quantizers(layer).values() for p in q.parameters()]
    if bits == 32:
        assert qgnn.range_parameters(layer) == []


class Holder:
    """An object of the user's that is no module."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


HELD: dict[str, Any] = {
    "[0]": lambda layer: [layer],
    "['a']": lambda layer: {"a": layer},
    ".layer": Holder,
    "(...)": lambda layer: functools.partial(layer),
    "[1][0]": lambda layer: (1, [layer]),
}


@pytest.mark.parametrize("where", HELD)
def test_layers_that_torch_does_not_see_are_told(where: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    hidden = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    model[0].held = HELD[where](hidden)
    with pytest.warns(UserWarning, match="where torch does not look") as caught:
        qmodel = qgnn.quantize_model(model)
    assert any(f"'0.held{where}' (Sequential, 24 weights)" in str(w.message) for w in caught)
    qgnn.calibrate(qmodel, [(torch.randn(9, 4),)], method="ranges").eval()
    for told in (qmodel, qgnn.pack_model(qmodel)):
        assert f"0.held{where} (Sequential, 24 weights)" in str(qgnn.summary(told))
        assert "(100%)" in str(qgnn.summary(told))  # of what torch sees


def test_layers_that_are_registered_as_well_are_not_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].order = [("again", model[1])]
    model[0].call = lambda x, layer=model[1]: layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qmodel = qgnn.quantize_model(model)
    assert qmodel[0].order[0][1] is qmodel[1]
