"""Whatever a layer changes decides how it is converted: subclasses, mixins, bound functions, exchanged parts."""

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from core.support import CONVS, OUT, WIDTH, features, graph, quantized, relative
from torch import Tensor, nn
from torch_geometric.nn import (
    APPNP,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    LGConv,
    MessagePassing,
    SAGEConv,
    SGConv,
    SSGConv,
    TAGConv,
)
from torch_geometric.nn.aggr import MaxAggregation
from torch_geometric.typing import OptTensor

import qgnn_plugin as qgnn
from qgnn_plugin.layers import QuantizedMessagePassing, mixin_for
from qgnn_plugin.layers.linear import QuantizedLinear
from qgnn_plugin.layers.own_weights import QuantizedOwnModule

NATIVE: dict[type[MessagePassing], Callable[[type], Any]] = {
    GCNConv: lambda cls: cls(WIDTH, OUT),
    SAGEConv: lambda cls: cls(WIDTH, OUT),
    GINConv: lambda cls: cls(nn.Linear(WIDTH, OUT)),
    GATConv: lambda cls: cls(WIDTH, OUT, heads=2),
    GATv2Conv: lambda cls: cls(WIDTH, OUT, heads=2),
    APPNP: lambda cls: cls(2, 0.2),
    SGConv: lambda cls: cls(WIDTH, OUT, K=2),
    SSGConv: lambda cls: cls(WIDTH, OUT, alpha=0.1, K=2),
    TAGConv: lambda cls: cls(WIDTH, OUT, K=2),
    LGConv: lambda cls: cls(),
}


def tripled(base: Any) -> dict[str, type]:
    """Subclasses of ``base`` that change one thing each."""

    class ByPropagate(base):
        def propagate(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Tensor:
            return 3 * super().propagate(edge_index, size=size, **kwargs)

    class ByAggregate(base):
        def aggregate(self, inputs: Tensor, index: Tensor, ptr: OptTensor = None,
                      dim_size: Optional[int] = None) -> Tensor:  # noqa: UP045
            return 3 * super().aggregate(inputs, index, ptr, dim_size)

    class ByUpdate(base):
        def update(self, inputs: Tensor) -> Tensor:
            return 3 * inputs

    class ByForward(base):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 3 * super().forward(*args, **kwargs)

    class Mixin:
        def aggregate(self, inputs: Tensor, index: Tensor, ptr: OptTensor = None,
                      dim_size: Optional[int] = None) -> Tensor:  # noqa: UP045
            return 3 * super().aggregate(inputs, index, ptr, dim_size)  # type: ignore[misc]

    class ByMixin(Mixin, base):
        pass

    classes = (ByPropagate, ByAggregate, ByUpdate, ByForward, ByMixin)
    for cls in classes:  # PyG tells classes apart by their names
        cls.__name__ = f"{base.__name__}{cls.__name__}"
    return {cls.__name__: cls for cls in classes}


@pytest.mark.parametrize("base", NATIVE, ids=lambda cls: cls.__name__)
def test_what_a_subclass_changes_stays(base: type[MessagePassing]) -> None:
    x, edge_index = features(), graph()
    for name, cls in tripled(base).items():
        assert mixin_for(cls) is QuantizedMessagePassing, name
        torch.manual_seed(0)
        conv = NATIVE[base](cls).eval()
        expected = conv(x, edge_index)
        assert torch.equal(qgnn.quantize_model(conv, 32)(x, edge_index), expected), name
        qconv = quantized(conv, x, edge_index)
        assert 0 < relative(qconv(x, edge_index), expected) < 0.05, name
        outs = [other(x, edge_index) for other in (copy.deepcopy(qconv), qconv, qgnn.pack_model(qconv))]
        assert all(torch.equal(out, outs[0]) for out in outs), name
        assert torch.equal(qgnn.restore_model(qconv)(x, edge_index), expected), name


@pytest.mark.parametrize("base", NATIVE, ids=lambda cls: cls.__name__)
def test_what_changes_nothing_keeps_its_kernels(base: type[MessagePassing]) -> None:
    class Logged(base):  # type: ignore[valid-type, misc]
        """With a docstring and a name of its own."""

        calls = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

        def __repr__(self) -> str:
            return "Logged()"

        def reset_parameters(self) -> None:
            super().reset_parameters()

        @property
        def width(self) -> int:
            return WIDTH

    Logged.__name__ = f"{base.__name__}Logged"
    for layer in (Logged, NATIVE[base](Logged), base):
        assert mixin_for(layer) is mixin_for(base) is not QuantizedMessagePassing


class HalfUpdater(GATConv):
    """An ``edge_updater`` of its own, which PyG would overwrite on a subclass."""

    def edge_updater(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Tensor:
        return 0.5 * super().edge_updater(edge_index, size=size, **kwargs)


class Positional(GCNConv):
    """A signature of its own, called by position."""

    def propagate(self, edge_index: Any, x: Tensor, edge_weight: OptTensor, size: Any = None) -> Tensor:  # type: ignore[override]
        return 2 * super().propagate(edge_index, x=x, edge_weight=edge_weight, size=size)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:  # type: ignore[override]
        return self.propagate(edge_index, self.lin(x), None)

    def message(self, x_j: Tensor, edge_weight: OptTensor) -> Tensor:
        return x_j


@pytest.mark.parametrize("make", [lambda: HalfUpdater(WIDTH, OUT), lambda: Positional(WIDTH, OUT)])
def test_signatures_and_updaters_of_its_own(make: Callable[[], Any]) -> None:
    x, edge_index = features(), graph()
    conv = make().eval()
    qconv = quantized(conv, x, edge_index)
    for other in (qconv, pickle.loads(pickle.dumps(qconv)), copy.deepcopy(qconv), qconv):
        assert 0 < relative(other(x, edge_index), conv(x, edge_index)) < 0.05


def doubled(self: Any, x_j: Tensor, edge_weight: OptTensor) -> Tensor:
    return 2 * x_j


def test_functions_bound_to_a_layer() -> None:
    x, edge_index = features(), graph()
    conv = GCNConv(WIDTH, OUT)
    conv.message = types.MethodType(doubled, conv)
    assert mixin_for(conv) is QuantizedMessagePassing
    assert 0 < relative(quantized(conv, x, edge_index)(x, edge_index), conv(x, edge_index)) < 0.05
    for wrap in (lambda run: lambda *args: 2 * run(*args), functools.partial):
        conv = GCNConv(WIDTH, OUT)
        conv.forward = wrap(conv.forward)
        with pytest.raises(ValueError, match="'conv', a GCNConv, to define forward"):
            qgnn.quantize_model(nn.ModuleDict({"conv": conv, "lin": nn.Linear(2, 2)}))


def test_exchanged_parts() -> None:
    x, edge_index = features(), graph()
    sage, gcn, listed = SAGEConv(WIDTH, OUT), GCNConv(WIDTH, OUT), SAGEConv(WIDTH, OUT)
    sage.aggr_module = MaxAggregation()
    gcn.lin = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, OUT))
    listed.lin_l = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, OUT))
    for conv in (sage, gcn, listed):
        assert mixin_for(conv) is QuantizedMessagePassing
        assert 0 < relative(quantized(conv, x, edge_index)(x, edge_index), conv(x, edge_index)) < 0.05


def test_a_class_changed_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(self: Any, x_j: Tensor, edge_weight: OptTensor) -> Tensor:
        return 2 * x_j

    monkeypatch.setattr(GCNConv, "message", message)
    assert mixin_for(GCNConv(WIDTH, OUT)) is QuantizedMessagePassing
    monkeypatch.undo()
    assert mixin_for(GCNConv(WIDTH, OUT)) is not QuantizedMessagePassing


def test_linear_maps() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(1, self.out_features)

    class Named(nn.Linear):
        def extra_repr(self) -> str:
            return "named"

    class Added(nn.Linear):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            self.extra = nn.Parameter(torch.randn(*args))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.extra

    assert mixin_for(Doubled) is QuantizedLinear
    assert mixin_for(Added(2, 2)) is QuantizedOwnModule  # by the products of both
    assert mixin_for(Other) is None
    assert mixin_for(Named) is QuantizedLinear
    assert mixin_for(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is QuantizedLinear


def test_every_layer_as_made_keeps_its_kernels() -> None:
    for name, make in CONVS.items():
        if not name.startswith("GraphConv"):
            assert mixin_for(make()) is not QuantizedMessagePassing, name
