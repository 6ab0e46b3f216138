"""What of a batch goes into a model, by its forward; and what says so where that cannot be told."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.support import NODES, OUT, WIDTH, graph
from torch import Tensor, nn
from torch_geometric.data import Batch, Data, HeteroData, InMemoryDataset
from torch_geometric.loader import DataLoader, RandomNodeLoader
from torch_geometric.nn import GAE, GCNConv, HeteroConv, SAGEConv, Sequential

import qgnn_plugin as qgnn
from qgnn_plugin.inputs import is_data, model_inputs, run_model, tensors_in


def data(**more: Any) -> Data:
    return Data(x=torch.randn(NODES, WIDTH), edge_index=graph(), **more)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(WIDTH, 8), nn.Linear(8, OUT)

    def run(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.head(self.conv(x, edge_index).relu())


class TakesData(Base):
    def forward(self, data):
        return self.run(data.x, data.edge_index)


class Static(Base):
    """On one graph, which it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", graph())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.edges)


class TakesBatch(Base):
    def forward(self, batch, return_all=False):
        return self.run(batch.x, batch.edge_index)


class TakesAnnotated(Base):
    def forward(self, inputs: Data) -> Tensor:
        return self.run(inputs.x, inputs.edge_index)


class Encoder(Base):
    def encode(self, x, edge_index):
        return self.conv(x, edge_index)

    def decode(self, z):
        return self.head(z)


class Dataset(InMemoryDataset):
    def __init__(self, graphs: list[Data]) -> None:
        super().__init__()
        self._data, self.slices = self.collate(graphs)


BATCHES: dict[str, Callable[[], Any]] = {
    "Data": data,
    "Batch": lambda: Batch.from_data_list([data(), data()]),
    "list": lambda: [data(), data()],
    "tuple": lambda: (data(), data()),
    "tuples": lambda: [(data(),), (data(),)],
    "DataLoader": lambda: DataLoader([data(), data()], batch_size=2),
    "generator": lambda: (data() for _ in range(2)),
    "Dataset": lambda: Dataset([data(), data()]),
    "keywords": lambda: None,
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("make", [TakesData, TakesBatch, TakesAnnotated])
def test_models_that_take_the_batch_itself(make: type[Base], kind: str) -> None:
    name = {TakesData: "data", TakesBatch: "batch", TakesAnnotated: "inputs"}[make]
    batches = {name: data()} if kind == "keywords" else BATCHES[kind]()
    qmodel = qgnn.calibrate(qgnn.quantize_model(make()), batches)
    assert all(q.is_set for q in qgnn.quantizers(qmodel).values() if "gap" not in q.site)
    packed = qgnn.pack_model(qmodel.eval())
    d = data()
    assert torch.equal(packed(d), qmodel(d))


def test_error_report_of_a_model_that_takes_data() -> None:
    d = data()
    qmodel: Any = qgnn.calibrate(qgnn.quantize_model(TakesData()), d)
    assert [layer.name for layer in qgnn.error_report(qmodel, d).layers] == ["conv"]
    assert d.x.dtype == torch.float32

    qmodel = qgnn.quantize_model(Encoder())
    run = lambda model, batch: model.decode(model.encode(batch.x, batch.edge_index))  # noqa: E731
    qgnn.calibrate(qmodel, d, forward=run)
    assert [layer.name for layer in qgnn.error_report(qmodel, d, forward=run).layers] == ["conv"]


@pytest.mark.parametrize("call", [qgnn.calibrate, qgnn.error_report])
def test_a_model_without_forward_says_how(call: Callable[..., Any]) -> None:
    qmodel = qgnn.quantize_model(Encoder())
    with pytest.raises(TypeError, match=r"which has none, with encode and decode\); .*forward=lambda .*model\.encode"):
        call(qmodel, data())
    assert not any(q.is_set for q in qgnn.quantizers(qmodel).values())


class Records(nn.Module):
    """Takes what ``arguments`` say."""

    def __init__(self, arguments: str) -> None:
        super().__init__()
        namespace: dict[str, Any] = {"Data": Data, "Tensor": Tensor}
        exec(f"def forward(self, {arguments}): return dict(locals())", namespace)
        self.__class__ = type("Records", (Records,), {"forward": namespace["forward"]})


FULL = {"edge_weight": 1, "edge_attr": 2, "batch": 3, "pos": 4, "y": 5, "z": 6, "train_mask": 7}


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ("x", "x"),
        ("x, edge_index", "x edge_index"),
        ("features, adj", "x edge_index"),
        ("h, edges", "x edge_index"),
        ("x, edge_index=None, mask=None", "x edge_index"),
        ("x, mask=None, edge_index=None", "x"),
        ("x, y=None", "x"),
        ("edge_index", "edge_index"),
        ("edge_index, x", "edge_index x"),
        ("x, pos, edge_index", "x pos edge_index"),
        ("z, pos, batch=None", "z pos batch"),
        ("x, pos, batch", "x pos batch"),
        ("x, edge_index, edge_attr, batch", "x edge_index edge_attr batch"),
        ("x, edge_index, edge_weight=None, y=None, batch=None", "x edge_index edge_weight batch"),
        ("x, edge_index, *, edge_attr, dim_size=None", "x edge_index edge_attr"),
        ("x, edge_index, train_mask", "x edge_index train_mask"),
        ("x, edge_index, num_nodes", "x edge_index num_nodes"),
        ("input: Tensor", "x"),
        ("*args", "x edge_index"),
        ("data", "data"),
        ("batch", "data"),
        ("graph, train=True", "data"),
        ("g", "data"),
        ("sample: 'Data'", "data"),
        ("batch: Data", "data"),
        ("data=None", "data"),
    ],
)
def test_arguments_by_name_and_place(arguments: str, passed: str) -> None:
    d = data(**FULL)
    args, kwargs = model_inputs(Records(arguments), d)
    given = {id(value) for value in (*args, *kwargs.values())}
    assert given == {id(d if name == "data" else getattr(d, name)) for name in passed.split()}
    Records(arguments)(*args, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("data, edge_index", r"'data' may be the object or its features"),
        ("g, feat", r"'g' may be the object or its features"),
        ("inputs", r"'inputs' may be the object or its features"),
        ("x, edge_index, state", r"requires \(got no 'state' in Data"),
        ("x, batch", r"requires \(got no 'batch'"),
        ("pos, edge_index", r"requires \(got no 'pos'"),
    ],
)
def test_what_cannot_be_told_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(TypeError, match=rf"{message}.*forward=lambda model, batch: model\("):
        model_inputs(Records(arguments), data())


@pytest.mark.parametrize("batch", [(1, 2, 3), {"x": 1, "edges": 2}])
def test_arguments_that_do_not_fit_are_refused_before_anything_runs(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"fits Records\.forward\(x, edge_index\) \(got .*\); .*forward="):
        run_model(Records("x, edge_index"), batch)
    with pytest.raises(TypeError, match=r"forward=lambda"):
        qgnn.calibrate(qgnn.quantize_model(TakesData()), [(data(), data().edge_index)])


def test_data_without_features_are_refused() -> None:
    with pytest.raises(TypeError, match=r"got no 'x' in Data"):
        qgnn.calibrate(qgnn.quantize_model(GCNConv(WIDTH, OUT)), Data(edge_index=graph(), num_nodes=NODES))


def hetero() -> HeteroData:
    d = HeteroData()
    d["a"].x, d["b"].x = torch.randn(NODES, WIDTH), torch.randn(NODES, WIDTH)
    for relation in (("a", "to", "b"), ("b", "to", "a")):
        d[relation].edge_index = graph()
        d[relation].edge_attr = torch.randn(graph().size(1), 2)
    return d


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ("x_dict, edge_index_dict", ["x", "edge_index"]),
        ("x_dict, edge_index_dict, edge_attr_dict=None, edge_weight_dict=None", ["x", "edge_index", "edge_attr"]),
        ("x, edge_index", ["x", "edge_index"]),  # of to_hetero
    ],
)
def test_dictionaries_by_type(arguments: str, passed: list[str]) -> None:
    d = hetero()
    args, kwargs = model_inputs(Records(arguments), d)
    assert [list(value) for value in (*args, *kwargs.values())] == [list(d.collect(name)) for name in passed]


def test_heterogeneous_models_of_both_forms() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = HeteroConv({r: SAGEConv((WIDTH, WIDTH), 8) for r in hetero().edge_types})
            self.head = nn.Linear(8, OUT)

        def forward(self, data):
            h = self.conv(data.x_dict, data.edge_index_dict)
            return {name: self.head(value) for name, value in h.items()}

    class Dicts(Takes):
        def forward(self, x_dict, edge_index_dict):
            return {name: self.head(value) for name, value in self.conv(x_dict, edge_index_dict).items()}

    for make in (Takes, Dicts):
        qmodel = qgnn.calibrate(qgnn.quantize_model(make()), [hetero()])
        assert all(q.is_set for q in qgnn.quantizers(qmodel).values() if "gap" not in q.site)


def test_wrapped_models_are_asked_themselves() -> None:
    d = data()
    assert model_inputs(torch.compile(TakesData(), backend="eager"), d)[0] == (d,)
    assert model_inputs(nn.DataParallel(TakesData()), d)[0] == (d,)
    assert model_inputs(GAE(GCNConv(WIDTH, OUT)), d)[0][0] is d.x
    stack = Sequential("x, edge_index, batch", [(GCNConv(WIDTH, OUT), "x, edge_index -> x")])
    assert len(model_inputs(stack, Batch.from_data_list([d]))[0]) == 3
    assert model_inputs(Sequential("data", [(TakesData(), "data -> x")]), d)[0] == (d,)


def test_a_decorator_that_adds_arguments_is_trusted() -> None:
    import functools

    def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, 1, *args, **kwargs)

        return inner

    class Model(nn.Module):
        @decorated
        def forward(self, extra: int, x: Tensor, edge_index: Tensor) -> Tensor:
            return x

    d = data()
    assert run_model(Model(), (d.x, d.edge_index)) is d.x


def test_collections_of_graphs_are_no_graph() -> None:
    d = data()
    dataset = Dataset([d, data()])
    assert hasattr(dataset, "edge_index")
    assert not is_data(dataset)
    assert is_data(d)
    assert is_data(hetero())
    assert is_data(SimpleNamespace(x=d.x, edge_index=d.edge_index))
    assert not is_data([d])
    assert not is_data({"x": d.x})
    assert not is_data(Data)
    loader = RandomNodeLoader(d, num_parts=2)
    assert hasattr(loader, "edge_index")
    assert not is_data(loader)
    qmodel = qgnn.calibrate(qgnn.quantize_model(GCNConv(WIDTH, OUT)), loader)
    assert all(q.is_set for q in qgnn.quantizers(qmodel).values())


def test_tensors_of_a_batch() -> None:
    d = hetero()
    assert len(list(tensors_in(d))) == 6
    assert len(list(tensors_in([(d["a"].x, {"e": d["b"].x}), 3]))) == 2
    assert len(list(tensors_in(SimpleNamespace(x=d["a"].x, edge_index=graph())))) == 2


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ("graphs", r"an iterable of these \(got str\)"),
        ([1, 2], r"\(got int\)"),
        ([torch.zeros(3, 3)], r"\(got \(Tensor\): missing"),
        ({"x": torch.zeros(3, 3), "edges": 1}, r"fits GCNConv\.forward\(x, edge_index, edge_weight\)"),
    ],
)
def test_what_is_no_batch_is_refused(batches: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        qgnn.calibrate(qgnn.quantize_model(GCNConv(WIDTH, OUT)), batches)


def test_other_wrong_arguments() -> None:
    qmodel: Any = qgnn.quantize_model(GCNConv(WIDTH, OUT))
    with pytest.raises(TypeError, match=r"a function of model and batch as 'forward' \(got int\)"):
        qgnn.calibrate(qmodel, data(), forward=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"names, patterns or types to select by \(got 3\)"):
        qgnn.quantize_model(GCNConv(WIDTH, OUT), include=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"made by quantize_model \(got a int\)"):
        qgnn.calibrate(3, data())  # type: ignore[arg-type]


def test_loaders_of_inputs_and_targets() -> None:
    """What comes at the end of a list and has no argument is a target; a tuple is of arguments."""
    x, y = torch.randn(4, NODES, WIDTH), torch.zeros(4, NODES)
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    states = []
    for batches in (pairs, [x[:2], x[2:]], [(x[:2],), (x[2:],)]):
        qmodel = qgnn.calibrate(qgnn.quantize_model(Static(), bits=8), batches)
        assert all(site.is_set for site in qgnn.quantizers(qmodel).values())
        states.append(qgnn.quantizers(qmodel)["conv.lin.input_quantizer"].range())
    assert states[0] == states[1] == states[2]
    graphs = DataLoader([data(y=torch.zeros(1))] * 2, batch_size=2)
    qgnn.calibrate(qgnn.quantize_model(TakesData(), bits=8), [[batch, batch.y] for batch in graphs])
    with pytest.raises(TypeError, match="too many positional"):
        run_model(Static(), (x, y))
