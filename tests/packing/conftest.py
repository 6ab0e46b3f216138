"""The references execute the ops here: backends are held to them by tests of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from packing.forms import LAYERS, Model, forms_of, inputs
from torch import nn
from torch_geometric.nn import FastRGCNConv

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.packing.message_passing import call as propagation_call
from qgnn_plugin.packing.message_passing import relations, row_blocks


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def made() -> Callable[[str], dict[str, nn.Module]]:
    """The forms of a model around a layer, made once."""
    known: dict[str, dict[str, nn.Module]] = {}

    def forms(name: str) -> dict[str, nn.Module]:
        if name not in known:
            known[name] = forms_of(Model(LAYERS[name]()), inputs())
        return known[name]

    return forms


@pytest.fixture
def blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without message kernels, so that blocks have everything to do."""
    monkeypatch.setattr(propagation_call, "_finders", [])
    monkeypatch.delitem(relations._FORMS, FastRGCNConv.forward)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, blocks_alone: None) -> list[int]:
    """Blocks of a few edges; gives how many edges each had."""
    sizes: list[int] = []
    run = row_blocks.Runner.__call__

    def counted(self: Any, edges: Any) -> Any:
        sizes.append(edges.count)
        return run(self, edges)

    monkeypatch.setattr(row_blocks.RowBlocks, "edges_per_block", lambda self: 16)
    monkeypatch.setattr(row_blocks.Runner, "__call__", counted)
    return sizes
