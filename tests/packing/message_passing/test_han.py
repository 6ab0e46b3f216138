"""HANConv in fewer passes: the same as its own forward, and its own forward wherever that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packing.layers_of_pyg import NODES, OUT, WIDTH, graph, x
from packing.message_passing.test_generic import assert_same, pair
from torch import nn
from torch_geometric.nn import HANConv

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.packing.lazy import sizes
from qgnn_plugin.packing.message_passing import han as module
from qgnn_plugin.packing.message_passing import relations

# A type that only sends, one that only receives, two relations into one, one from a type to itself.
METADATA = (["a", "b", "c"], [("a", "r", "b"), ("b", "s", "b"), ("b", "t", "c")])
ARGS = (
    {"a": x(), "b": x(NODES - 3) + 1, "c": x(NODES - 9)},
    {kind: graph(NODES - 3, NODES - 9, seed=k) for k, kind in enumerate(METADATA[1])},
)


class Pair(nn.Module):
    """Two layers, the first one's results in the second's ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.first = HANConv(WIDTH, OUT * 2, METADATA, heads=2)
        self.second = HANConv(OUT * 2, OUT * 2, METADATA, heads=3)

    def forward(self, features: Any, edges: Any) -> Any:
        hidden = self.first(features, edges)
        return self.second({kind: features[kind] @ torch.ones(WIDTH, OUT * 2) if h is None else h.relu()
                            for kind, h in hidden.items()}, edges)  # fmt: skip


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which calls of layers were computed by the form."""
    taken: list[bool] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        out = module.han(*args, **kwargs)
        taken.append(out is not None)
        return out

    monkeypatch.setitem(relations._FORMS, HANConv.forward, counted)
    return taken


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_form_is_the_layer(
    backend: str, bits: int, forms: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * OUT * 2)
    qmodel, packed = pair(lambda: HANConv(WIDTH, OUT * 2, METADATA, heads=2), ARGS, bits)
    with torch.no_grad(), use_backend(backend):
        for _ in range(2):
            expected = qmodel(*ARGS, return_semantic_attention_weights=True)
            found = packed(*ARGS, return_semantic_attention_weights=True)
            for one, other in zip(found, expected, strict=True):
                assert one.keys() == other.keys()
                assert one["a"] is None is other["a"]
                assert_same(one, other)
            assert_same(packed(*ARGS), expected[0])
    assert forms == [True] * 4
    way = "packed: generated kernel" if backend == "cpu" else "packed: kernel"
    assert [layer.runs for layer in qgnn.summary(packed).layers if layer.name == ""] == [way]


def test_layer_after_layer(forms: list[bool]) -> None:
    qmodel, packed = pair(Pair, ARGS, 8)
    with torch.no_grad():
        found, expected = packed(*ARGS), qmodel(*ARGS)
    for kind in ("b", "c"):  # codes of the second layer may turn where floats were rounded otherwise
        assert (found[kind] - expected[kind]).norm() < 1e-3 * expected[kind].norm()
    assert all(forms)


@pytest.mark.parametrize("granularity", ["tensor", "node", "channel"])
def test_ranges_that_no_kernel_knows_beforehand(granularity: Any, forms: list[bool]) -> None:
    model = HANConv(WIDTH, OUT * 2, METADATA, heads=2).eval()
    qmodel = qgnn.quantize_model(model, config=qgnn.QuantConfig(bits=8, granularity=granularity))
    packed = qgnn.pack_model(qgnn.calibrate(qmodel, [ARGS], method="ranges").eval())
    with torch.no_grad():
        assert_same(packed(*ARGS), qmodel(*ARGS))
    assert forms == [granularity == "tensor"]


def test_hooks_and_float_parts_have_its_own_forward(forms: list[bool]) -> None:
    qmodel, packed = pair(lambda: HANConv(WIDTH, OUT * 2, METADATA, heads=2), ARGS)
    seen: list[torch.Size] = []
    with torch.no_grad():
        expected = qmodel(*ARGS)
        handle = packed.k_lin.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
        assert_same(packed(*ARGS), expected)
        assert seen == [(2, NODES - 3, OUT * 2), (1, NODES - 9, OUT * 2)]
        handle.remove()
        handle = packed.register_propagate_forward_hook(lambda *args: None)
        assert_same(packed(*ARGS), expected)
        handle.remove()
        float_part = qgnn.quantize_model(HANConv(WIDTH, OUT * 2, METADATA, heads=2).eval(), exclude="k_lin")
        packed = qgnn.pack_model(qgnn.calibrate(float_part, [ARGS], method="ranges").eval())
        assert_same(packed(*ARGS), float_part(*ARGS))
    assert not any(forms)


def test_edges_between_types_that_are_not_there(forms: list[bool]) -> None:
    qmodel, packed = pair(lambda: HANConv(WIDTH, OUT * 2, METADATA, heads=2), ARGS)
    features = {kind: value for kind, value in ARGS[0].items() if kind != "a"}
    with torch.no_grad():
        for layer in (qmodel, packed):
            with pytest.raises(KeyError):
                layer(features, ARGS[1])
        nothing = {kind: value[:0] for kind, value in ARGS[0].items()}
        edges = {kind: value[:, :0] for kind, value in ARGS[1].items()}
        found, expected = packed(nothing, edges), qmodel(nothing, edges)
        assert found["a"] is None is expected["a"]
        assert all(found[kind].shape == expected[kind].shape == (0, OUT * 2) for kind in "bc")
    assert not any(forms)
