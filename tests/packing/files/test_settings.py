"""A packed file and a model of other settings: refused by module, setting and both values."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from packing.cases import CLASSES, FEATURES, HIDDEN, quantized
from torch import Tensor, nn
from torch_geometric.nn import (
    APPNP,
    GAT,
    GCN,
    GIN,
    PNA,
    BatchNorm,
    ChebConv,
    EdgeCNN,
    EdgeConv,
    FiLMConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GraphConv,
    GraphSAGE,
    GroupAddRev,
    LGConv,
    ResGatedGraphConv,
    SAGEConv,
    SGConv,
    SSGConv,
    TAGConv,
    TransformerConv,
)

import qgnn_plugin
from qgnn_plugin import SMPConfig, SMPropagation
from qgnn_plugin.packing.files.settings import settings_of


class Around(nn.Module):
    """A linear map, a layer, and what else there is."""

    def __init__(self, layer: nn.Module, *more: nn.Module) -> None:
        super().__init__()
        self.lin, self.layer, self.more = nn.Linear(FEATURES, HIDDEN), layer, nn.Sequential(*more)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        return self.more(self.layer(self.lin(x), edge_index))


class Own(nn.Module):
    """A model with settings of its own."""

    def __init__(self, alpha: float = 0.5, act: Any = torch.relu, sizes: Any = (2, 3), _scale: float = 2.0) -> None:
        super().__init__()
        self.alpha, self.act, self.sizes, self._scale = alpha, act, sizes, _scale
        self.dropout, self.note = alpha / 2, "x"
        self.conv = GCNConv(FEATURES, CLASSES)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        return self.act(self.conv(x, edge_index)) * self.alpha * self._scale


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass
class Options:
    width: int = 4
    names: tuple[str, ...] = ("a",)


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


def mlp() -> nn.Module:
    return nn.Linear(HIDDEN, CLASSES)


Build = Callable[[], nn.Module]


def around(make: Callable[..., nn.Module], *args: Any, **one: tuple[Any, Any]) -> tuple[Build, Build]:
    """Two models whose layer differs in one argument."""
    ((name, values),) = one.items()
    first, second = ({name: value} for value in values)
    return lambda: Around(make(*args, **first)), lambda: Around(make(*args, **second))


def whole(make: Callable[..., nn.Module], **one: tuple[Any, Any]) -> tuple[Build, Build]:
    """Two of PyG's models that differ in one argument."""
    ((name, values),) = one.items()
    first, second = ({name: value} for value in values)
    args = (FEATURES, HIDDEN, 2, CLASSES)
    return lambda: make(*args, **first), lambda: make(*args, **second)


SIZES = (HIDDEN, CLASSES)
PAIRS: dict[str, tuple[Build, Build]] = {
    "GCNConv normalize": around(GCNConv, *SIZES, normalize=(True, False)),
    "GCNConv add_self_loops": around(GCNConv, *SIZES, add_self_loops=(True, False)),
    "GCNConv improved": around(GCNConv, *SIZES, improved=(False, True)),
    "GCNConv flow": around(GCNConv, *SIZES, flow=("source_to_target", "target_to_source")),
    "SAGEConv aggr": around(SAGEConv, *SIZES, aggr=("mean", "sum")),
    "SAGEConv normalize": around(SAGEConv, *SIZES, normalize=(False, True)),
    "GINConv aggr": around(lambda aggr: GINConv(mlp(), aggr=aggr), aggr=("add", "mean")),
    "GINConv eps": around(lambda eps: GINConv(mlp(), eps=eps), eps=(0.0, 0.5)),
    "GATConv negative_slope": around(GATConv, *SIZES, negative_slope=(0.2, 0.3)),
    "GATConv add_self_loops": around(GATConv, *SIZES, add_self_loops=(True, False)),
    "GATConv heads": (lambda: Around(GATConv(HIDDEN, 6, heads=2)), lambda: Around(GATConv(HIDDEN, 4, heads=3))),
    "GATConv concat": (
        lambda: Around(GATConv(HIDDEN, 6, heads=1, concat=True)),
        lambda: Around(GATConv(HIDDEN, 6, heads=1, concat=False)),
    ),
    "GATv2Conv negative_slope": around(GATv2Conv, *SIZES, negative_slope=(0.2, 0.3)),
    "APPNP K": around(lambda K: APPNP(K, 0.1), K=(2, 3)),
    "APPNP alpha": around(lambda alpha: APPNP(2, alpha), alpha=(0.1, 0.2)),
    "APPNP normalize": around(lambda normalize: APPNP(2, 0.1, normalize=normalize), normalize=(True, False)),
    "SGConv add_self_loops": around(SGConv, *SIZES, add_self_loops=(True, False)),
    "SSGConv alpha": around(lambda alpha: SSGConv(*SIZES, alpha), alpha=(0.1, 0.2)),
    "TAGConv normalize": around(TAGConv, *SIZES, normalize=(True, False)),
    "LGConv normalize": around(LGConv, normalize=(True, False)),
    "SMPropagation alpha": around(lambda alpha: SMPropagation(K=2, alpha=alpha), alpha=(0.1, 0.2)),
    "SMPropagation terms": around(
        lambda terms: SMPropagation(K=2, smp=SMPConfig(multiplier=0.3, terms=terms)), terms=(4, 5)
    ),
    "GraphConv aggr": around(GraphConv, *SIZES, aggr=("add", "mean")),
    "EdgeConv aggr": around(lambda aggr: EdgeConv(nn.Linear(2 * HIDDEN, CLASSES), aggr=aggr), aggr=("max", "mean")),
    "FiLMConv act": around(FiLMConv, *SIZES, act=(nn.ReLU(), nn.Tanh())),
    "ResGatedGraphConv act": around(ResGatedGraphConv, *SIZES, act=(nn.Sigmoid(), nn.Tanh())),
    "TransformerConv beta": around(TransformerConv, *SIZES, concat=(True, False)),
    "ChebConv normalization": around(lambda norm: ChebConv(*SIZES, 2, norm), norm=("sym", "rw")),
    "GCN jk": whole(GCN, jk=(None, "last")),
    "GCN act": whole(GCN, act=("relu", "tanh")),
    "GCN act_first": whole(GCN, act_first=(False, True)),
    "GCN act_kwargs": (
        lambda: GCN(FEATURES, HIDDEN, 2, CLASSES, act="leaky_relu", act_kwargs={"negative_slope": 0.1}),
        lambda: GCN(FEATURES, HIDDEN, 2, CLASSES, act="leaky_relu", act_kwargs={"negative_slope": 0.2}),
    ),
    "GCN norm eps": (
        lambda: GCN(FEATURES, HIDDEN, 2, CLASSES, norm="BatchNorm"),
        lambda: GCN(FEATURES, HIDDEN, 2, CLASSES, norm="BatchNorm", norm_kwargs={"eps": 0.1}),
    ),
    "GraphSAGE aggr": whole(GraphSAGE, aggr=("mean", "max")),
    "GIN eps": whole(GIN, eps=(0.0, 0.1)),
    "GAT negative_slope": whole(GAT, negative_slope=(0.2, 0.1)),
    "EdgeCNN act": whole(EdgeCNN, act=("relu", "elu")),
    "PNA scalers": (
        lambda: PNA(FEATURES, HIDDEN, 2, CLASSES, aggregators=["mean"], scalers=["identity"], deg=torch.ones(9).long()),
        lambda: PNA(FEATURES, HIDDEN, 2, CLASSES, aggregators=["max"], scalers=["identity"], deg=torch.ones(9).long()),
    ),
    "own alpha": (Own, lambda: Own(alpha=0.25)),
    "own private": (Own, lambda: Own(_scale=3.0)),
    "own function": (Own, lambda: Own(act=torch.tanh)),
    "own partial": (
        lambda: Own(act=functools.partial(nn.functional.leaky_relu, negative_slope=0.1)),
        lambda: Own(act=functools.partial(nn.functional.leaky_relu, negative_slope=0.2)),
    ),
    "own anonymous function": (lambda: Own(act=lambda x: x.relu()), lambda: Own(act=lambda x: x.tanh())),
    "own closure": (lambda: Own(act=times(2.0)), lambda: Own(act=times(3.0))),
    "own options": (lambda: Own(sizes=Options(4)), lambda: Own(sizes=Options(5))),
    "own sizes": (Own, lambda: Own(sizes=(2, 4))),
    "own mapping": (lambda: Own(sizes={"a": [1]}), lambda: Own(sizes={"a": [2]})),
    "own enumeration": (lambda: Own(sizes=Colour.RED), lambda: Own(sizes=Colour.BLUE)),
    "own infinity": (lambda: Own(sizes=float("inf")), lambda: Own(sizes=-float("inf"))),
    "own type": (lambda: Own(sizes=torch.float32), lambda: Own(sizes=torch.float16)),
    "a module more": (
        lambda: Around(GCNConv(*SIZES), nn.ReLU()),
        lambda: Around(GCNConv(*SIZES), nn.ReLU(), nn.ReLU6()),
    ),
    "a module less": (lambda: Around(GCNConv(*SIZES), nn.ReLU()), lambda: Around(GCNConv(*SIZES))),
    "another module": (
        lambda: Around(GCNConv(*SIZES), nn.ReLU()),
        lambda: Around(GCNConv(*SIZES), nn.GELU()),
    ),
    "norm eps": (
        lambda: Around(GCNConv(*SIZES), BatchNorm(CLASSES)),
        lambda: Around(GCNConv(*SIZES), BatchNorm(CLASSES, eps=1e-3)),
    ),
    "norm statistics": (
        lambda: Around(GCNConv(*SIZES), nn.LayerNorm(CLASSES)),
        lambda: Around(GCNConv(*SIZES), nn.LayerNorm(CLASSES, eps=1e-2)),
    ),
    "one layer": (lambda: GCNConv(FEATURES, CLASSES), lambda: GCNConv(FEATURES, CLASSES, improved=True)),
}


def saved(model: nn.Module, path: Path) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    args = torch.randn(30, FEATURES), torch.randint(0, 30, (2, 90))
    packed = qgnn_plugin.pack_model(quantized(model, *args, bits=4))
    qgnn_plugin.save_packed(packed, path)
    return packed, args


@pytest.mark.parametrize("name", PAIRS)
def test_other_settings_are_refused(name: str, tmp_path: Path) -> None:
    build, other = PAIRS[name]
    packed, args = saved(build(), tmp_path / "model")
    assert torch.equal(qgnn_plugin.load_packed(tmp_path / "model", build())(*args), packed(*args))
    with pytest.raises(ValueError, match=r"model'.*first difference is .*: .* in the file, .* in the model"):
        qgnn_plugin.load_packed(tmp_path / "model", other())
    reason = r"first difference is .*: .* in the file, .* in the model"
    saved(other(), tmp_path / "other")
    with pytest.raises(ValueError, match=reason):
        qgnn_plugin.load_packed(tmp_path / "other", build())


def test_what_does_not_matter_may_differ(tmp_path: Path) -> None:
    """Dropout, caches, initial values; the mode; and attributes that one of the two does not have."""
    packed, args = saved(GCN(FEATURES, HIDDEN, 2, CLASSES, dropout=0.5, act_kwargs={"inplace": True}), tmp_path / "m")
    other: Any = GCN(FEATURES, HIDDEN, 2, CLASSES, dropout=0.1, cached=True).train()
    other.more = 3
    assert torch.equal(qgnn_plugin.load_packed(tmp_path / "m", other)(*args), packed(*args))
    packed, args = saved(Around(GCNConv(*SIZES), nn.Dropout(0.5), nn.ReLU()), tmp_path / "m")
    other = Around(GCNConv(*SIZES), nn.Identity(), nn.ReLU())
    assert torch.equal(qgnn_plugin.load_packed(tmp_path / "m", other)(*args), packed(*args))


def test_architectures_without_weights(tmp_path: Path) -> None:
    """On the meta device; lazy ones once they have run, before which they are refused as elsewhere."""
    lazy = GCN(-1, HIDDEN, 2, CLASSES)
    lazy(torch.randn(30, FEATURES), torch.randint(0, 30, (2, 90)))
    packed, args = saved(lazy, tmp_path / "model")
    with torch.device("meta"):
        empty = GCN(FEATURES, HIDDEN, 2, CLASSES)
    for model in (empty, lazy, GCN(FEATURES, HIDDEN, 2, CLASSES)):
        assert torch.equal(qgnn_plugin.load_packed(tmp_path / "model", model)(*args), packed(*args))
    with pytest.raises(ValueError, match=r"Expected a model whose sizes are known .*run it once on a batch"):
        qgnn_plugin.load_packed(tmp_path / "model", GCN(-1, HIDDEN, 2, CLASSES))


def test_what_running_a_model_assigns_is_no_setting(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.nodes, self.widest, self.factor = 0, None, None, 2.0
            self.conv = GCNConv(FEATURES, CLASSES)

        def note(self, x: Tensor) -> None:
            self.nodes = x.size(0)
            self.size_of_last = x.size(1)

        @property
        def size_of_last(self) -> int | None:
            return self.widest

        @size_of_last.setter
        def size_of_last(self, value: int) -> None:
            self.widest = value

        def forward(self, x: Tensor, edge_index: Any) -> Tensor:
            self.calls += 1
            self.note(x)
            return self.conv(x, edge_index) * self.factor

    packed, args = saved(Counting(), tmp_path / "model")
    loaded = qgnn_plugin.load_packed(tmp_path / "model", Counting())
    assert torch.equal(loaded(*args), packed(*args))
    other: Any = Counting()
    other.factor = 3.0
    with pytest.raises(ValueError, match="setting 'factor'"):
        qgnn_plugin.load_packed(tmp_path / "model", other)


def test_settings_can_be_ignored_by_name(tmp_path: Path) -> None:
    packed, args = saved(Own(), tmp_path / "model")
    other: Any = Own()
    other.note = "y"
    with pytest.raises(ValueError, match=r"setting 'note' of the model, a Own: 'x' in the file, 'y' in.*ignore="):
        qgnn_plugin.load_packed(tmp_path / "model", other)
    for ignore in ("note", ["no*"], [".note"]):
        loaded = qgnn_plugin.load_packed(tmp_path / "model", other, ignore=ignore)
        assert torch.equal(loaded(*args), packed(*args))


def test_settings_are_those_of_the_time_of_saving(tmp_path: Path) -> None:
    packed, args = saved(Own(), tmp_path / "model")
    packed.alpha = 3.0
    qgnn_plugin.save_packed(packed, tmp_path / "model")
    loaded = qgnn_plugin.load_packed(tmp_path / "model", Own(alpha=3.0), ignore="alpha")
    assert torch.equal(loaded(*args), packed(*args))


def test_packing_adds_no_setting(tmp_path: Path) -> None:
    model = Own()
    packed, _ = saved(model, tmp_path / "model")
    assert settings_of(packed)[""].values == settings_of(model)[""].values


def test_reversible_blocks_as_they_were_built(tmp_path: Path) -> None:
    """Packing turns off how they save memory for a backward pass, of which a file says nothing."""

    def build(**settings: Any) -> nn.Module:
        return Around(GroupAddRev(GCNConv(HIDDEN // 2, HIDDEN // 2), num_groups=2, **settings), nn.ReLU())

    with torch.no_grad():
        packed, args = saved(build(), tmp_path / "model")
        for model in (build(), build(disable=True), build(num_bwd_passes=2)):
            assert torch.equal(qgnn_plugin.load_packed(tmp_path / "model", model)(*args), packed(*args))


@pytest.mark.parametrize("name", PAIRS)
def test_settings_survive_conversion(name: str) -> None:
    """A converted model has those of the float model, as far as both have them."""
    model = PAIRS[name][0]()
    before, after = settings_of(model), settings_of(qgnn_plugin.quantize_model(model, 4))
    for module, (kind, values) in before.items():
        assert after[module].type == kind
        assert {key: after[module].values[key] for key in values if key in after[module].values} == values
    assert before


def test_parameters_with_two_names_stay_one(tmp_path: Path) -> None:
    """Tied weights and modules under two names: saved once, loaded as one, saved again the same."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(30, HIDDEN), nn.Bilinear(HIDDEN, HIDDEN, CLASSES)
            self.again, self.weight = self.out, nn.Parameter(self.table.weight.detach())
            self.same = self.weight
            self.listed = [self.weight]
            self.conv = GCNConv(HIDDEN, HIDDEN)
            self.convs = nn.ModuleList([self.conv, GraphConv(HIDDEN, HIDDEN)])

        def forward(self, x: Tensor, edge_index: Any) -> Tensor:
            z = self.table.weight + self.same + self.listed[0]
            for conv in self.convs:
                z = conv(z, edge_index)
            return self.again(z, z) + x.sum()

    path, again = tmp_path / "model", tmp_path / "again"
    packed, args = saved(Tied(), path)
    loaded: Any = qgnn_plugin.load_packed(path, Tied())
    assert torch.equal(loaded(*args), packed(*args))
    assert loaded.same is loaded.weight is loaded.listed[0]
    assert loaded.again is loaded.out
    qgnn_plugin.save_packed(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_edge_networks_in_a_list_of_their_own(tmp_path: Path) -> None:
    """Modules that generic layers hold and the model lists first, some of them left in floats."""

    class Cloud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlps = nn.ModuleList([nn.Sequential(nn.Linear(2 * w, HIDDEN), nn.ReLU()) for w in (FEATURES, HIDDEN)])
            self.convs = nn.ModuleList([EdgeConv(network, aggr="mean") for network in self.mlps])

        def forward(self, x: Tensor, edge_index: Any) -> Tensor:
            for conv in self.convs:
                x = conv(x, edge_index)
            return x

    args = torch.randn(30, FEATURES), torch.randint(0, 30, (2, 90))
    for config in ({}, {"overrides": {"mlps.0.0": {"weight_bits": 32, "activation_bits": 32, "input_bits": 32}}}):
        packed = qgnn_plugin.pack_model(quantized(Cloud(), *args, bits=4, input_bits=8, **config))
        qgnn_plugin.save_packed(packed, tmp_path / "model")
        loaded = qgnn_plugin.load_packed(tmp_path / "model", Cloud())
        assert torch.equal(loaded(*args), packed(*args))
        assert str(qgnn_plugin.summary(loaded)) == str(qgnn_plugin.summary(packed))


@pytest.mark.parametrize("tensor", [True, False])
def test_state_of_the_users_own(tensor: bool, tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.count = GCNConv(FEATURES, CLASSES), 0

        def get_extra_state(self) -> Any:
            return torch.tensor(self.count) if tensor else {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = int(state)

        def forward(self, x: Tensor, edge_index: Any) -> Tensor:
            return self.conv(x, edge_index) + self.count

    args = torch.randn(30, FEATURES), torch.randint(0, 30, (2, 90))
    model: Any = Counting()
    model.count = 7
    packed = qgnn_plugin.pack_model(quantized(model, *args, bits=4))
    if not tensor:
        with pytest.raises(ValueError, match=r"got a dict at '_extra_state'.*return a tensor"):
            qgnn_plugin.save_packed(packed, tmp_path / "model")
        return
    qgnn_plugin.save_packed(packed, tmp_path / "model")
    loaded: Any = qgnn_plugin.load_packed(tmp_path / "model", Counting(), ignore="count")
    assert loaded.count == 7
    assert torch.equal(loaded(*args), packed(*args))
