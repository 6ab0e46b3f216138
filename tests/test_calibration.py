"""calibrate and the reading of batches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from core.support import (
    NODES,
    OUT,
    WIDTH,
    Plain,
    adjacency,
    assert_same_state,
    features,
    graph,
    quantized,
    relative,
    state,
)
from torch import Tensor, nn
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN, GCNConv, GraphConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.inputs import model_inputs
from qgnn_plugin.quantizers import search_range


def converted(bits: int = 4) -> nn.Module:
    return qgnn.quantize_model(GCN(WIDTH, 8, 2, OUT), bits)


def data(seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return Data(x=torch.randn(NODES, WIDTH, generator=generator), edge_index=graph(self_loops=False, seed=seed))


BATCHES: dict[str, Any] = {
    "Data": lambda d: d,
    "adj_t": lambda d: Data(x=d.x, adj_t=adjacency(d.edge_index, "csr")),
    "arguments": lambda d: (d.x, d.edge_index),
    "keywords": lambda d: {"x": d.x, "edge_index": d.edge_index},
    "list of Data": lambda d: [d],
    "tuple of Data": lambda d: (d,),
    "list of arguments": lambda d: [(d.x, d.edge_index)],
    "list of keywords": lambda d: [{"x": d.x, "edge_index": d.edge_index}],
    "Batch": lambda d: Batch.from_data_list([d]),
    "loader": lambda d: DataLoader([d], batch_size=1),
    "generator": lambda d: (item for item in [d]),
}


@pytest.mark.parametrize("how", BATCHES)
def test_batches_in_every_form_give_the_same_ranges(how: str) -> None:
    qmodel, reference = converted(), converted()
    reference.load_state_dict(qmodel.state_dict())
    assert qgnn.calibrate(qmodel, BATCHES[how](data())) is qmodel
    qgnn.calibrate(reference, [data()], forward=lambda m, d: m(d.x, d.edge_index))
    assert all(q.is_set for q in qgnn.quantizers(qmodel).values())
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(qmodel.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_ranges_come_from_the_float_models_activations() -> None:
    """Each site is fitted to what the unquantized model has there, not to errors made before it."""
    d = data()
    model = nn.ModuleDict({"a": nn.Linear(WIDTH, 8), "b": nn.Linear(8, OUT)})
    qmodel: Any = qgnn.quantize_model(model, config=QuantConfig(bits=2, granularity="tensor"))
    qgnn.calibrate(qmodel, [d.x], method="ranges", forward=lambda m, x: m["b"](m["a"](x).relu()))
    hidden = model["a"](d.x).relu().detach()
    scale, _ = search_range(hidden.reshape(1, -1), 3, 0.0)
    torch.testing.assert_close(qmodel["b"].input_quantizer.log_scale.exp(), scale[0])
    scale, _ = search_range(model["b"].weight.detach(), 3, 1.5)
    torch.testing.assert_close(qmodel["b"].weight_quantizer.log_scale.exp(), scale)


def test_several_batches_widen_the_range() -> None:
    small, large = data(), data(1)
    large.x = large.x * 10
    one, both = converted(8), converted(8)
    both.load_state_dict(one.state_dict())
    qgnn.calibrate(one, small)
    qgnn.calibrate(both, [small, large])
    first = "convs.0.lin.input_quantizer.log_scale"
    assert both.state_dict()[first] > one.state_dict()[first] + 1


def test_modes_weights_and_generator_are_left_alone() -> None:
    qmodel = qgnn.quantize_model(GCN(WIDTH, 8, 2, OUT, dropout=0.5, norm="batch_norm"), 4)
    qmodel.convs[0].eval()
    modes = {n: m.training for n, m in qmodel.named_modules()}
    before = {n: v for n, v in state(qmodel).items() if "quantizer" not in n}
    generator = torch.random.get_rng_state()
    qgnn.calibrate(qmodel, data())
    assert {n: m.training for n, m in qmodel.named_modules()} == modes
    after = qmodel.state_dict()
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(p.grad is None for p in qmodel.parameters())


def test_calibrating_again_replaces_ranges() -> None:
    qmodel = converted(8)
    qgnn.calibrate(qmodel, data())
    first = state(qmodel)
    scaled = data()
    scaled.x = scaled.x * 100
    qgnn.calibrate(qmodel, scaled)
    site = "convs.0.lin.input_quantizer.log_scale"
    assert not torch.equal(qmodel.state_dict()[site], first[site])
    qgnn.calibrate(qmodel, data())
    assert_same_state(qmodel, first)


def test_sites_that_see_nothing_keep_their_state() -> None:
    qmodel: Any = qgnn.quantize_model(Plain(), 4)
    qgnn.calibrate(qmodel, {"x": features(), "edge_index": graph(), "head": "main"})
    assert qmodel.heads["main"].input_quantizer.is_set
    assert not qmodel.heads["other"].input_quantizer.is_set
    with pytest.raises(RuntimeError, match=r"'heads\.other\.input' is unset"):
        qmodel.eval()(features(), graph(), head="other")


@pytest.mark.parametrize("empty", [[], (), iter(())])
def test_no_batch_is_an_error(empty: Any) -> None:
    qmodel = converted()
    with pytest.raises(ValueError, match=r"at least one batch to calibrate on \(got none\)"):
        qgnn.calibrate(qmodel, empty)
    assert not any(q.is_set for q in qgnn.quantizers(qmodel).values())


def test_plain_models_and_other_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="made by quantize_model"):
        qgnn.calibrate(GCN(WIDTH, 8, 2, OUT), data())
    for batch, kind in ((3, "int"), (None, "NoneType"), (features(), "Tensor")):
        with pytest.raises(TypeError, match=rf"a PyG Data object, .* \(got {kind}\)"):
            qgnn.calibrate(converted(), batch)
    with pytest.raises(TypeError, match=r"\(got str\)"):
        qgnn.calibrate(converted(), ["batch"])


def failing(first: Data) -> Iterator[Data]:
    yield first
    bad = data()
    bad.x[3, 4] = float("nan")
    yield bad


def test_nothing_changes_if_a_batch_fails() -> None:
    qmodel = quantized(GCN(WIDTH, 8, 2, OUT), *(data().x, data().edge_index))
    before = state(qmodel.train())
    with pytest.raises(ValueError, match=r"finite values at 'convs\.0\.lin\.input' \(got 1 NaN"):
        qgnn.calibrate(qmodel, failing(data(1)))
    assert_same_state(qmodel, before)
    assert qmodel.training
    assert relative(qmodel.eval()(data().x, data().edge_index), qmodel(data().x, data().edge_index)) == 0


def test_calibration_alone_keeps_the_predictions_at_eight_bits() -> None:
    d = data()
    model = GCN(WIDTH, 16, 3, OUT).eval()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), d).eval()
    expected = model(d.x, d.edge_index)
    assert relative(qmodel(d.x, d.edge_index), expected) < 0.03
    agree = (qmodel(d.x, d.edge_index).argmax(1) == expected.argmax(1)).float().mean()
    assert agree >= 0.9


def test_frozen_ranges_are_calibrated_too() -> None:
    qmodel = qgnn.quantize_model(GCN(WIDTH, 8, 2, OUT), config=QuantConfig(learn_ranges=False))
    qgnn.calibrate(qmodel, data())
    assert all(q.is_set for q in qgnn.quantizers(qmodel).values())


# What goes into a model ##############################################################################


class Wide(nn.Module):
    """Takes some of the optional fields."""

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_weight: Any = None, batch: Any = None, *, pos: Any = None
    ) -> None:
        raise NotImplementedError


def test_fields_that_forward_names_are_passed() -> None:
    d = data()
    d.edge_weight, d.edge_attr, d.pos = torch.ones(d.num_edges), torch.ones(d.num_edges, 2), torch.zeros(NODES, 3)
    args, kwargs = model_inputs(Wide(), d)
    assert [a is b for a, b in zip(args, (d.x, d.edge_index), strict=True)] == [True, True]
    assert set(kwargs) == {"edge_weight", "pos"}
    args, kwargs = model_inputs(Wide(), Batch.from_data_list([d, d]))
    assert set(kwargs) == {"edge_weight", "pos", "batch"}
    assert model_inputs(Wide(), [d.x, d.edge_index])[0] == (d.x, d.edge_index)
    assert model_inputs(Wide(), {"x": d.x}) == ((), {"x": d.x})


def test_adjacency_is_preferred_to_the_edge_index() -> None:
    d = data()
    d.adj_t = torch.eye(NODES).to_sparse_csr()
    assert model_inputs(Wide(), d)[0][1] is d.adj_t


def test_a_converted_model_is_given_what_the_original_is() -> None:
    """A generic layer at the root once hid its arguments."""
    d = data()
    d.edge_weight = torch.rand(d.num_edges)
    for conv in (GraphConv(WIDTH, OUT), GCNConv(WIDTH, OUT)):
        for config in (QuantConfig(), QuantConfig(output_bits=4)):
            assert "edge_weight" in model_inputs(qgnn.quantize_model(conv, config=config), d)[1]


def test_heterogeneous_data_gives_its_dictionaries() -> None:
    d = HeteroData()
    d["a"].x = torch.randn(3, 2)
    d["a", "to", "a"].edge_index = torch.zeros(2, 1, dtype=torch.long)
    args, kwargs = model_inputs(Wide(), d)
    assert list(args[0]) == ["a"]
    assert list(args[1]) == [("a", "to", "a")]
    assert kwargs == {}


def test_other_objects_are_no_batch() -> None:
    with pytest.raises(TypeError, match=r"a tensor, a tuple of arguments or a dict of keywords \(got int\)"):
        model_inputs(Wide(), 3)
