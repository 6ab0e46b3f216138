"""RGATConv by nodes in the place of edges: the same as its own forward, which all other forms of it have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packing.layers_of_pyg import NODES, WIDTH, graph, per_edge, types, x
from packing.message_passing.test_generic import assert_same, pair, runs
from torch_geometric.nn import RGATConv

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.packing.message_passing import relations, rgat

ARGS = (x(), graph(), types())


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which calls of layers were computed by the form."""
    taken: list[bool] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        out = rgat.rgat(*args, **kwargs)
        taken.append(out is not None)
        return out

    monkeypatch.setitem(relations._FORMS, RGATConv.forward, counted)
    return taken


@pytest.mark.parametrize("options", [{}, {"num_bases": 2, "concat": False, "negative_slope": 0.3}, {"bias": False}])
@pytest.mark.parametrize("bits", [2, 8])
def test_the_form_is_the_layer(options: Any, bits: int, forms: list[bool]) -> None:
    """Three relations of four, one of them without edges, an isolated target and a hub."""
    qmodel, packed = pair(lambda: RGATConv(WIDTH, 6, 4, heads=2, **options), ARGS, bits)
    with torch.no_grad(), use_backend("cpu"):
        assert_same(packed(*ARGS), qmodel(*ARGS))
        found, (edges, alpha) = packed(*ARGS, return_attention_weights=True)
        expected, (_, wanted) = qmodel(*ARGS, return_attention_weights=True)
        assert_same((found, alpha), (expected, wanted))
        assert edges is ARGS[1]
        few = ARGS[0], ARGS[1][:, :30], ARGS[2][:30]
        assert_same(packed(*few), qmodel(*few))
    assert forms == [True] * 3
    assert runs(packed) == {"packed: kernel"}
    assert packed._alpha is None


@pytest.mark.parametrize(
    "options",
    [
        {"attention_mechanism": "within-relation"}, {"mod": "additive"}, {"mod": "f-scaled"}, {"num_blocks": 2},
        {"attention_mode": "multiplicative-self-attention", "dim": 2}, {"flow": "target_to_source"},
    ],
)  # fmt: skip
def test_other_forms_of_the_layer_are_its_own(options: Any, forms: list[bool]) -> None:
    qmodel, packed = pair(lambda: RGATConv(WIDTH, 6, 3, heads=2, **options), ARGS)
    with torch.no_grad(), use_backend("cpu"):
        assert_same(packed(*ARGS), qmodel(*ARGS))
    assert forms == [False]


def test_other_arguments_are_its_own(forms: list[bool]) -> None:
    qmodel, packed = pair(lambda: RGATConv(WIDTH, 6, 3, heads=2, edge_dim=1), (*ARGS, per_edge()))
    with torch.no_grad(), use_backend("cpu"):
        assert_same(packed(*ARGS, per_edge()), qmodel(*ARGS, per_edge()))
        none = (x(), graph()[:, :0], types()[:0])
        assert_same(packed(*none), qmodel(*none))
        for wrong in (types() + 1, types() - 1):
            with pytest.raises((IndexError, RuntimeError)):
                packed(x(), graph(), wrong)
        with pytest.raises((IndexError, ValueError)):
            packed(x(), graph() + NODES // 2, types())
    assert not any(forms)
