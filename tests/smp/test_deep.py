"""Deep stacks: found by width, GCNII's layer by another path, and nothing remembered beyond a forward pass."""

import copy
import gc
import math
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from core.support import NODES, OUT, WIDTH, assert_same_state, features, graph, relative, state
from torch import Tensor, nn
from torch_geometric.nn import GAT, GCN, GIN, GCN2Conv, GCNConv, GraphConv, GraphSAGE, Linear

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig, SMPConfig
from qgnn_plugin.analysis.error_report import error_report
from qgnn_plugin.graph.adjacency import gcn_graph
from qgnn_plugin.smp.deep import StackPlace, find_stacks

HIDDEN, LAYERS = 8, 6
ALPHA, THETA = 0.1, 0.5
STACKED = range(1, LAYERS - 1)


def deep_config(bits: int = 32, **smp: Any) -> QuantConfig:
    return QuantConfig(bits=bits, smp=SMPConfig(**{"initial_residual": ALPHA, "identity_map": THETA, **smp}))


def deep(model: nn.Module, bits: int = 32, **smp: Any) -> Any:
    return qgnn.quantize_model(model, config=deep_config(bits, **smp))


# The arithmetic #######################################################################################################


@pytest.mark.parametrize(
    "smp", [{}, {"initial_residual": None}, {"identity_map": None}], ids=["both", "map", "residual"]
)
def test_gcn_stack_is_gcnii(smp: dict[str, Any]) -> None:
    """Against PyG's own GCN2Conv with the same weights, values and gradients, in float64."""
    model = GCN(WIDTH, HIDDEN, LAYERS, OUT).double()
    ours = deep(model, **smp)
    settings = ours.convs[1].deep_config
    x, edge_index = features().double(), graph()

    def reference(plain: GCN) -> Tensor:
        h = h0 = plain.convs[0](x, edge_index).relu()
        for depth, index in enumerate(STACKED, 1):
            conv = plain.convs[index]
            options = {} if settings.identity_map is None else {"theta": settings.identity_map, "layer": depth}
            layer = GCN2Conv(HIDDEN, settings.initial_residual or 0.0, **options).double()
            del layer.weight1
            layer.weight1 = conv.lin.weight.t()
            h = (layer(h, h0, edge_index) + conv.bias).relu()
        return plain.convs[-1](h, edge_index)

    expected, out = reference(model), ours(x, edge_index)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    expected.square().sum().backward()
    out.square().sum().backward()
    parameters = dict(ours.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model", [GraphSAGE, GAT, GIN])
def test_any_other_stack(model: Any) -> None:
    """``(1 - b) ((1 - a) P H + a H0) + b C((1 - a) H + a H0)`` with the plain layers."""
    plain = model(WIDTH, HIDDEN, LAYERS, OUT).eval()
    x, edge_index = features(), graph()
    operator = gcn_graph(edge_index, None, NODES)
    h = h0 = plain.convs[0](x, edge_index).relu()
    for depth, index in enumerate(STACKED, 1):
        strength = math.log(THETA / depth + 1)
        support = (1 - ALPHA) * operator.apply(h) + ALPHA * h0
        out = plain.convs[index](x=(1 - ALPHA) * h + ALPHA * h0, edge_index=edge_index)
        h = ((1 - strength) * support + strength * out).relu()
    torch.testing.assert_close(deep(plain)(x, edge_index), plain.convs[-1](h, edge_index), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [GCN, GraphSAGE, GAT, GIN])
def test_quantized_stack_follows_the_float_one(model: Any) -> None:
    plain, args = model(WIDTH, HIDDEN, LAYERS, OUT).eval(), (features(), graph())
    expected = deep(plain)(*args)
    errors = [relative(qgnn.calibrate(deep(plain, bits), args, method="ranges")(*args), expected) for bits in (8, 4, 2)]
    assert errors[0] < 0.02
    assert errors[0] < errors[1] < errors[2]


def test_gradients_reach_the_first_of_many_layers() -> None:
    plain = GCN(WIDTH, HIDDEN, 32, OUT)
    norms = []
    for model in (plain, deep(plain)):
        model(features(), graph()).square().sum().backward()
        norms.append(float(model.convs[0].lin.weight.grad.norm()))
    assert norms[1] > 100 * norms[0]


def test_rows_trimmed_away() -> None:
    """Fewer rows than the stack's input are its leading ones, as ``trim_to_layer`` leaves them."""
    model, x, edge_index = deep(GCN(WIDTH, HIDDEN, LAYERS, OUT)), features(), graph()
    seen = model.convs[0](x, edge_index).relu()
    model.convs[1](seen, edge_index)
    kept = (edge_index < 20).all(0)
    last = model.convs[2](seen[:20], edge_index[:, kept])
    assert last.shape == (20, HIDDEN)
    with pytest.raises(ValueError, match=r"shape of that of 'convs\.1'"):
        model.convs[3](torch.randn(NODES + 1, HIDDEN), edge_index)


# Conversion ###########################################################################################################


def test_places_of_pyg_models() -> None:
    model = deep(GCN(WIDTH, HIDDEN, LAYERS, OUT))
    places = {n: m.deep_place for n, m in model.named_modules() if hasattr(m, "deep_place")}
    assert places == {f"convs.{i}": StackPlace("convs.1", i, LAYERS - 2) for i in STACKED}
    assert "GCNConv (deep 2/4)" in str(qgnn.summary(model))


WIDE = (HIDDEN, HIDDEN)


@pytest.mark.parametrize(
    ("widths", "stacks"),
    [
        ({"conv1": WIDE, "conv2": WIDE, "conv3": WIDE}, [["conv1", "conv2", "conv3"]]),
        ({"blocks.0.conv": WIDE, "blocks.1.conv": WIDE}, [["blocks.0.conv", "blocks.1.conv"]]),
        ({"net.0": WIDE, "net.2": WIDE, "net.4": WIDE}, [["net.0", "net.2", "net.4"]]),
        (
            {"a.convs.0": WIDE, "a.convs.1": WIDE, "b.convs.0": WIDE, "b.convs.1": WIDE},
            [["a.convs.0", "a.convs.1"], ["b.convs.0", "b.convs.1"]],
        ),
        (
            {"m.0.c.1": WIDE, "m.0.c.2": WIDE, "m.1.c.2": WIDE, "m.1.c.3": WIDE},
            [["m.0.c.1", "m.0.c.2"], ["m.1.c.2", "m.1.c.3"]],
        ),
        ({"c.0": WIDE, "c.1": (HIDDEN, 3), "c.2": WIDE, "c.3": WIDE}, [["c.2", "c.3"]]),
        ({"c.0": WIDE, "c.1": WIDE, "c.2": (3, 3), "c.3": (3, 3)}, [["c.0", "c.1"], ["c.2", "c.3"]]),
        ({"c.0": WIDE, "c.1": None, "c.2": WIDE}, []),
        ({"first": WIDE, "second": WIDE}, []),
    ],
)  # fmt: skip
def test_stacks_are_runs_of_numbered_layers_of_one_width(widths: dict[str, Any], stacks: list[list[str]]) -> None:
    expected = {n: StackPlace(s[0], d, len(s)) for s in stacks for d, n in enumerate(s, 1)}
    assert find_stacks(widths) == expected


def test_restored_model_is_plain_and_bitwise_the_same() -> None:
    model = GCN(WIDTH, HIDDEN, LAYERS, OUT)
    before, args = state(model), (features(), graph())
    plain = qgnn.restore_model(deep(model, 4))
    assert type(plain) is GCN
    assert vars(plain.convs[2]).keys() == vars(model.convs[2]).keys()
    assert_same_state(plain, before)
    assert torch.equal(plain(*args), model(*args))
    assert type(model) is GCN


def test_without_the_fields_nothing_changes() -> None:
    model, args = GCN(WIDTH, HIDDEN, LAYERS, OUT), (features(), graph())
    off = qgnn.quantize_model(model, 32)
    assert type(off) is GCN
    assert torch.equal(off(*args), model(*args))


def test_layers_left_out_by_an_override() -> None:
    config = QuantConfig(bits=32, smp=deep_config().smp, overrides={"convs.4": {"smp": SMPConfig()}})
    model = qgnn.quantize_model(GCN(WIDTH, HIDDEN, LAYERS, OUT), config=config)
    assert [hasattr(conv, "deep_place") for conv in model.convs] == [False, True, True, True, False, False]
    assert model.convs[1].deep_place.length == 3


@pytest.mark.parametrize("model", [lambda: GCN(WIDTH, HIDDEN, 2, OUT), lambda: GCNConv(WIDTH, WIDTH)])
def test_no_stack_is_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match="two or more consecutive convolutions of equal width"):
        deep(model())
    with pytest.raises(ValueError, match="Expected 'identity_map' in"):
        SMPConfig(identity_map=2.0)
    with pytest.raises(ValueError, match="Expected 'initial_residual' in"):
        SMPConfig(initial_residual=1.0)


def test_configuration_round_trip() -> None:
    config = deep_config(4)
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_error_report_compares_with_the_float_stack() -> None:
    args = (features(), graph())
    report = error_report(qgnn.calibrate(deep(GCN(WIDTH, HIDDEN, LAYERS, OUT), 8), args), args)
    stacked = [layer for layer in report.layers if layer.name != "convs.0"]
    assert len(stacked) == LAYERS - 1
    for layer in stacked:
        assert layer.energy == pytest.approx(layer.float_energy, rel=0.1)
        assert 0 < layer.relative < 0.05


# What is remembered ###################################################################################################


class Blocks(nn.Module):
    """An arbitrary forward: layers in blocks, a linear map between, an early way out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"conv": GraphConv(WIDTH, WIDTH), "lin": Linear(WIDTH, WIDTH)}) for _ in range(4)
        )

    def encode(self, x: Tensor, edge_index: Tensor, depth: int = 4) -> Tensor:
        for block in self.blocks[:depth]:
            x = block["conv"](x, edge_index).relu() + block["lin"](x)
        return x

    def forward(self, x: Tensor, edge_index: Tensor, depth: int = 4) -> Tensor:
        return self.encode(x, edge_index, depth)


def test_arbitrary_forward_and_other_methods() -> None:
    model, args = deep(Blocks()), (features(), graph())
    assert torch.equal(model(*args), model.encode(*args))


def test_input_is_released_after_the_forward() -> None:
    model = deep(Blocks()).eval()
    stack = model.deep_stacks[0]
    for depth in (4, 2):  # the second never reaches the end of the stack
        x = features()
        alive = weakref.ref(x)
        with torch.no_grad():
            model(x, graph(), depth)
        del x
        gc.collect()
        assert stack.initial is None
        assert alive() is None


def test_input_is_released_after_an_error() -> None:
    model, args = deep(Blocks()), (features(), graph())
    expected = model(*args)
    handle = model.blocks[2]["lin"].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(*args)
    handle.remove()
    assert model.deep_stacks[0].initial is None
    assert torch.equal(model(*args), expected)


def test_forward_within_a_forward() -> None:
    model, edge_index = deep(Blocks()), graph()
    x, other = features(), features()
    expected, expected_other = model(x, edge_index), model(other, edge_index)
    seen = []

    def nested(*_: Any) -> None:
        if not seen:
            seen.append(None)
            seen.append(model(other, edge_index))

    handle = model.blocks[2]["conv"].register_forward_pre_hook(nested)
    assert torch.equal(model(x, edge_index), expected)
    handle.remove()
    assert torch.equal(seen[1], expected_other)


def test_threads_do_not_mix() -> None:
    """Replicas of DataParallel share what a module holds besides tensors and run in threads."""
    model, edge_index = deep(Blocks()).eval(), graph()
    inputs = [features() for _ in range(4)]
    with torch.no_grad():
        expected = [model(x, edge_index) for x in inputs]
    results: dict[int, Tensor] = {}
    barrier = threading.Barrier(len(inputs), timeout=60)

    def run(i: int) -> None:
        replica = copy.copy(model)
        with torch.no_grad():
            x = inputs[i]
            replica.deep_stacks[0].initial = None
            for block in replica.blocks:
                barrier.wait()
                x = block["conv"](x, edge_index).relu() + block["lin"](x)
            results[i] = x

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(expected):
        assert torch.equal(results[i], result)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_a_memory_of_their_own(clone: Any) -> None:
    model, args = deep(Blocks()), (features(), graph())
    expected = model(*args)
    model.deep_stacks[0].initial = features()  # as in the middle of a forward
    twin = clone(model)
    layers = [block["conv"] for block in twin.blocks]
    assert {id(layer.deep_stack) for layer in layers} == {id(twin.deep_stacks[0])}
    assert twin.deep_stacks[0] is not model.deep_stacks[0]
    assert twin.deep_stacks[0].initial is None
    assert torch.equal(twin(*args), expected)


def test_layer_on_its_own() -> None:
    model, args = deep(Blocks()), (features(), graph())
    with pytest.raises(RuntimeError, match=r"'blocks\.0\.conv' to run before 'blocks\.2\.conv'"):
        model.blocks[2]["conv"](*args)
    with pytest.raises(ValueError, match="one feature matrix"):
        model.blocks[0]["conv"]((args[0], args[0]), args[1])


def test_failed_conversion_in_place_leaves_the_model_plain() -> None:
    model = GCN(WIDTH, HIDDEN, LAYERS, OUT)
    model.convs[3].message_quantizer = None  # a name that its conversion needs
    with pytest.raises(ValueError, match="message_quantizer"):
        qgnn.quantize_model(model, config=deep_config(4), inplace=True)
    assert not qgnn.is_quantized(model)
    assert type(model) is GCN


@pytest.mark.parametrize("bits", [32, 4])
def test_a_deep_stack_trains(bits: int) -> None:
    """24 layers tell two noisy clusters apart within a few steps."""
    labels = (torch.arange(NODES) >= NODES // 2).long()
    x, edge_index = features() + 0.7 * (2.0 * labels.unsqueeze(1) - 1), graph()
    edge_index = edge_index[:, labels[edge_index[0]] == labels[edge_index[1]]]
    model = deep(GCN(WIDTH, 16, 24, 2), bits)
    optimizer = torch.optim.Adam(qgnn.training.parameter_groups(model, 0.01))
    for _ in range(30):
        optimizer.zero_grad()
        out = model(x, edge_index)
        nn.functional.cross_entropy(out, labels).backward()
        optimizer.step()
    assert float((out.argmax(-1) == labels).float().mean()) > 0.9
