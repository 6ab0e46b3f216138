"""Layers with weights that are no Linear's: converted, restored, and packed with the very numbers of the converted."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core.support import NODES, WIDTH, features, graph
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch_geometric.nn import HeteroLinear, LightGCN
from torch_geometric.nn import Linear as PyGLinear
from torch_geometric.nn.models.linkx import SparseLinear

import qgnn_plugin as qgnn
from qgnn_plugin.layers.recurrent import next_state

Run = Callable[[Any, Tensor], Any]
LENGTHS = torch.tensor([3, 8, 1, 4, 5])


class Around(nn.Module):
    def __init__(self, part: nn.Module, run: Run) -> None:
        super().__init__()
        self.part, self.run = part, run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.part, x)


def _parts(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [part for item in out if item is not None for part in _parts(item)]


def _flat(out: Any) -> Tensor:
    return torch.cat([part.flatten().float() for part in _parts(out)])


def _sequences(x: Tensor) -> Any:
    return pack_padded_sequence(x.view(8, 5, WIDTH), LENGTHS, enforce_sorted=False)


def _state(m: Any, x: Tensor) -> Any:
    runs = m.num_layers * (2 if m.bidirectional else 1)
    h = x[:5].mean().expand(runs, 5, m.proj_size or m.hidden_size)
    return (h, x[5].mean().expand(runs, 5, m.hidden_size)) if m.mode == "LSTM" else h


LAYERS: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    "GRUCell": (lambda: nn.GRUCell(WIDTH, 6), lambda m, x: m(x, x[:, :6])),
    "GRUCell, one": (lambda: nn.GRUCell(WIDTH, 6, bias=False), lambda m, x: m(x[0])),
    "LSTMCell": (lambda: nn.LSTMCell(WIDTH, 6), lambda m, x: m(x, (x[:, :6], x[:, 6:]))),
    "RNNCell": (lambda: nn.RNNCell(WIDTH, 6, nonlinearity="relu"), lambda m, x: m(x)),
    "GRU": (lambda: nn.GRU(WIDTH, 6, 2, bidirectional=True), lambda m, x: m(x.view(8, 5, WIDTH))),
    "GRU, several lengths": (
        lambda: nn.GRU(WIDTH, 6, bidirectional=True),
        lambda m, x: (lambda out: (out[0].data, out[1]))(m(_sequences(x), _state(m, x))),
    ),
    "LSTM": (
        lambda: nn.LSTM(WIDTH, 6, 2, batch_first=True, bias=False),
        lambda m, x: m(x.view(5, 8, WIDTH), _state(m, x)),
    ),
    "LSTM, projected": (lambda: nn.LSTM(WIDTH, 6, proj_size=4, bidirectional=True), lambda m, x: m(_sequences(x))[1]),
    "RNN, one sequence": (lambda: nn.RNN(WIDTH, 6), lambda m, x: m(x)),
    "Conv1d": (
        lambda: nn.Conv1d(WIDTH, 8, 3, padding=1, stride=2, dilation=2, groups=2),
        lambda m, x: m(x.t()[None].repeat(2, 1, 1)),
    ),
    "Conv1d, circular": (
        lambda: nn.Conv1d(WIDTH, 8, 3, padding="same", padding_mode="circular", bias=False),
        lambda m, x: m(x.t()),
    ),
    "Conv2d": (
        lambda: nn.Conv2d(3, 6, (2, 3), padding=(1, 2), stride=(2, 1)),
        lambda m, x: m(x.view(2, 3, 8, 10)),
    ),
    "Bilinear": (lambda: nn.Bilinear(WIDTH, WIDTH, 4), lambda m, x: m(x, 2 * x)),
    "HeteroLinear": (lambda: HeteroLinear(WIDTH, 8, 4), lambda m, x: m(x, torch.arange(NODES) % 3)),
    "SparseLinear": (lambda: SparseLinear(NODES, 8), lambda m, x: m(graph())),
    "SparseLinear, weighted": (
        lambda: SparseLinear(NODES, 8, bias=False),
        lambda m, x: m(graph(), x.abs().mean() + torch.arange(graph().size(1)) / 100),
    ),
    "Embedding": (lambda: nn.Embedding(50, 16), lambda m, x: m((3 * x[:, :3].abs()).long())),
    "Embedding, padded": (
        lambda: nn.Embedding(50, 16, padding_idx=1, max_norm=2.0),
        lambda m, x: m((3 * x[:, :3].abs()).long()),
    ),
    "attention": (lambda: nn.MultiheadAttention(WIDTH, 2), lambda m, x: m(x, x, x)),
    "attention of others": (
        lambda: nn.MultiheadAttention(WIDTH, 2, kdim=8, vdim=6),
        lambda m, x: m(x, x[:9, :8], x[:9, :6]),
    ),
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def model(request: pytest.FixtureRequest) -> Around:
    make, run = LAYERS[request.param]
    return Around(make(), run)


@pytest.mark.parametrize("bits", [2, 8])
def test_packed_as_converted_and_restored(model: Around, bits: int, tmp_path: Path) -> None:
    x = features()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    qmodel: Any = qgnn.calibrate(qgnn.quantize_model(model, bits), [(x,)], steps=5).eval()
    assert type(qmodel.part).__name__ == type(model.part).__name__
    assert isinstance(qmodel.part, type(model.part))
    assert weights.keys() <= qmodel.state_dict().keys()
    with torch.no_grad():
        expected, found = model(x), qmodel(x)
    assert [p.shape for p in _parts(expected)] == [p.shape for p in _parts(found)]
    if bits == 8:
        assert float((_flat(found) - _flat(expected)).norm() / _flat(expected).norm()) < 0.05
    else:
        assert not torch.equal(_flat(found), _flat(expected))
    packed: Any = qgnn.pack_model(qmodel)
    assert torch.equal(_flat(packed(x)), _flat(found))
    assert qgnn.summary(packed).coverage.share == 1  # type: ignore[union-attr]
    assert not any(name in weights and "weight" in name for name in packed.state_dict()), "a weight stays float"
    qgnn.save_packed(packed, tmp_path / "packed.safetensors")
    loaded = qgnn.load_packed(tmp_path / "packed.safetensors", model)
    for other in (copy.deepcopy(packed), loaded):
        assert torch.equal(_flat(other(x)), _flat(found))
    restored: Any = qgnn.restore_model(qmodel)
    assert type(restored.part) is type(model.part)
    trained = {name: p for name, p in qmodel.named_parameters() if name in weights}
    assert all(torch.equal(p, trained[name]) for name, p in restored.named_parameters())
    with torch.no_grad():
        again = _flat(model(x))  # which scales rows of a bounded norm once more
        assert torch.equal(_flat(restored(x)), again)
        torch.testing.assert_close(again, _flat(expected))


def test_off_is_bitwise_the_original(model: Around) -> None:
    qmodel = qgnn.quantize_model(model, 32).eval()
    x = features()
    with torch.no_grad():
        assert torch.equal(_flat(qmodel(x)), _flat(model(x)))


def test_training_reaches_every_parameter_and_copies_stay_quantized(model: Around) -> None:
    x = features()
    qmodel: Any = qgnn.quantize_model(model, 4).train()
    _flat(qmodel(x)).square().sum().backward()
    assert all(p.grad is not None for p in qmodel.parameters())
    pickled = pickle.loads(pickle.dumps(qmodel.part))
    file = io.BytesIO()
    torch.save(qmodel.part, file)
    file.seek(0)
    for part in (copy.deepcopy(qmodel).part, pickled, torch.load(file, weights_only=False)):
        assert torch.equal(_flat(model.run(part.eval(), x)), _flat(qmodel.eval()(x)))
    state = qmodel.state_dict()
    other = qgnn.quantize_like(model, state)
    other.load_state_dict(state)
    assert torch.equal(_flat(other.eval()(x)), _flat(qmodel(x)))


def test_autocast_changes_nothing(model: Around) -> None:
    x = features()
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 4), [(x,)]).eval()
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        for one in (qmodel, packed):
            expected = _flat(one(x))
            with torch.autocast("cpu", torch.bfloat16):
                out = one(x)
            tolerance = {"rtol": 0.02, "atol": 0.02} if "attention" in str(type(model.part)).lower() else {}
            torch.testing.assert_close(_flat(out), expected, **tolerance)


def test_weights_of_packed_layers_are_read_only(model: Around) -> None:
    x = features()
    packed: Any = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(model, 8), [(x,)]).eval())
    for name, weight in model.part.named_parameters(recurse=False):
        if not name.startswith("weight") and "proj_weight" not in name:
            continue
        held = getattr(packed.part, name)
        assert held.shape == weight.shape
        if getattr(model.part, "max_norm", None) is None:  # else it is scaled as a look-up would
            torch.testing.assert_close(held.clone(), weight.detach(), rtol=0.05, atol=0.05)
        with pytest.raises(ValueError, match="read only"):
            held.mul_(2)
        with pytest.raises(ValueError, match="read only"):
            setattr(packed.part, name, weight)


def test_states_from_before_these_layers_were_converted(model: Around) -> None:
    qmodel = qgnn.quantize_model(model, 4)
    sites = {f"part.{name}" for name, _ in qmodel.get_submodule("part").own_quantizers()}  # type: ignore[operator]
    state = {key: value for key, value in qmodel.state_dict().items() if key.rpartition(".")[0] not in sites}
    qmodel.load_state_dict(state)


@pytest.mark.parametrize("name", ["GRU", "GRUCell", "Conv1d", "Bilinear", "HeteroLinear", "attention"])
def test_second_derivatives(name: str) -> None:
    """Forces are gradients of energies, and are trained."""
    make, run = LAYERS[name]
    x = features().double().requires_grad_()
    qmodel = qgnn.quantize_model(Around(make(), run).double(), 8).train()
    energy = _flat(qmodel(x)).square().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    force.square().sum().backward()
    weights = [p for name, p in qmodel.named_parameters() if "quantizer" not in name and p.dim() > 1]
    assert all(p.grad is not None and bool(p.grad.any()) for p in weights)


# Against a second path ################################################################################################


def _of_codes(x: Tensor, site: Any) -> Tensor:
    return site(x).dequantize()


def test_a_gru_is_its_equations_over_quantized_factors() -> None:
    layer = nn.GRU(WIDTH, 6).double()
    x = torch.randn(4, 5, WIDTH).double()
    q: Any = qgnn.calibrate(qgnn.quantize_model(layer, 4), [(x,)]).eval()
    w_ih, w_hh = (
        _of_codes(q.weight_ih_l0, q.weight_ih_l0_quantizer),
        _of_codes(q.weight_hh_l0, q.weight_hh_l0_quantizer),
    )
    h, outs = x.new_zeros(5, 6), []
    for step in x:
        gi = F.linear(_of_codes(step, q.input_quantizer), w_ih, q.bias_ih_l0).chunk(3, -1)
        gh = F.linear(_of_codes(h, q.hidden_l0_quantizer), w_hh, q.bias_hh_l0).chunk(3, -1)
        r, z = torch.sigmoid(gi[0] + gh[0]), torch.sigmoid(gi[1] + gh[1])
        h = (1 - z) * torch.tanh(gi[2] + r * gh[2]) + z * h
        outs.append(h)
    torch.testing.assert_close(q(x)[0], torch.stack(outs))


def test_a_convolution_is_that_of_quantized_patches_and_weights() -> None:
    layer = nn.Conv1d(WIDTH, 8, 3, padding=1, stride=2, groups=2).double()
    x = torch.rand(2, WIDTH, 9).double()  # zero, which pads, is a code
    q: Any = qgnn.calibrate(qgnn.quantize_model(layer, 4), [(x,)]).eval()
    weight = _of_codes(q.weight.flatten(1), q.weight_quantizer).view_as(q.weight)
    expected = F.conv1d(_of_codes(x, q.input_quantizer), weight, q.bias, 2, 1, 1, 2)
    torch.testing.assert_close(q(x), expected)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_results_are_laid_out_as_floats_are(name: str) -> None:
    """Callers take ``view`` of what torch returns in one piece."""
    make, run = LAYERS[name]
    model, x = Around(make(), run).eval(), features()
    qmodel = qgnn.quantize_model(model, 8)
    qgnn.calibrate(qmodel, [(x,)], method="ranges")
    want = [part.is_contiguous() for part in _parts(model(x))]
    for converted in (qmodel.train(), copy.deepcopy(qmodel).eval(), qgnn.pack_model(qmodel.eval())):
        parts = _parts(converted(x))
        assert [part.is_contiguous() for part, whole in zip(parts, want, strict=True) if whole] == [True] * sum(want)


def test_channels_last_images_stay_so() -> None:
    layer = nn.Conv2d(3, 6, 3)
    x = torch.randn(2, 3, 8, 10).contiguous(memory_format=torch.channels_last)
    qmodel = qgnn.calibrate(qgnn.quantize_model(layer, 8), [(x,)], method="ranges").eval()
    for model in (layer, qmodel, qgnn.pack_model(qmodel)):
        assert model(x).is_contiguous(memory_format=torch.channels_last)


# Tables ###############################################################################################################


def test_gradients_of_a_table_stay_sparse() -> None:
    table: Any = qgnn.quantize_model(nn.Embedding(1000, 8, sparse=True), 4).train()
    before = table.weight.detach().clone()
    index = torch.tensor([3, 5, 5, 900])
    table(index).square().sum().backward()
    assert table.weight.grad.is_sparse
    torch.optim.SparseAdam([table.weight], lr=0.1).step()
    assert (table.weight != before).any(1).nonzero().view(-1).tolist() == [3, 5, 900]


@pytest.mark.parametrize("bits", [2, 4])
def test_padding_stays_what_it_was(bits: int) -> None:
    table = nn.Embedding(20, 7, padding_idx=4)
    index = torch.tensor([[4, 3], [4, 4]])
    qtable = qgnn.calibrate(qgnn.quantize_model(table, bits), [(torch.arange(20),)], steps=5).eval()
    packed = qgnn.pack_model(qtable)
    for one in (qtable, packed):
        assert not one(index)[index == 4].any()
        assert torch.equal(one(index)[0, 1], qtable(index)[0, 1])
    qtable.train()(index).sum().backward()
    grad: Any = qtable.weight.grad
    assert not grad[4].any()
    assert grad[3].any()


def test_indices_outside_of_a_packed_table() -> None:
    packed = qgnn.pack_model(qgnn.calibrate(qgnn.quantize_model(nn.Embedding(20, 7), 4), [(torch.arange(20),)]).eval())
    for index in (torch.tensor([20]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="0 to 19"):
            packed(index)
    with pytest.raises(TypeError, match="indices"):
        packed(torch.rand(3))
    assert packed(torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2, 7)


def test_a_single_index_is_looked_up() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), [(torch.arange(20),)]).eval()
    packed, index = qgnn.pack_model(qmodel), torch.tensor(3)
    assert packed(index).shape == (3,)
    torch.testing.assert_close(packed(index), qmodel(index).detach())
    assert torch.equal(packed(index), packed(index[None])[0])


@pytest.mark.parametrize(("make", "shape"), [(nn.Linear, (6, 0)), (nn.Linear, (0, 6)), (PyGLinear, (6, 0))])
def test_maps_without_weights_stay_as_they_are(make: Any, shape: tuple[int, int]) -> None:
    """Such as the last one of a model whose number of classes is read from data without any."""
    model = nn.ModuleList([make(*shape), nn.Linear(6, 3)])
    qmodel = qgnn.quantize_model(model, 4)
    assert [type(m) for m in (model[0], qmodel[0])] == [make, make]
    assert qmodel[0](torch.randn(2, shape[0])).shape == (2, shape[1])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [1, 5])
def test_weights_of_one_magnitude_get_gradients(bits: int, width: int) -> None:
    """The only value of a channel is an end of its range, and rounding of the end must not put it outside."""
    for seed in range(5):
        torch.manual_seed(seed)
        lin = nn.Linear(width, 40, bias=False)
        with torch.no_grad():
            lin.weight.copy_(lin.weight[:, :1].expand(40, width))
        x = torch.randn(30, width)
        qlin: Any = qgnn.calibrate(qgnn.quantize_model(lin, bits), [(x,)], method="ranges")
        found = qlin.weight_quantizer(lin.weight).dequantize()
        torch.testing.assert_close(found, lin.weight, rtol=1e-5, atol=0)
        qlin(x).sum().backward()
        lin(x).sum().backward()
        assert bool((qlin.weight.grad != 0).all())
        if bits == 8:
            assert float((qlin.weight.grad - lin.weight.grad).norm() / lin.weight.grad.norm()) < 0.05


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(8, 4, 3), (0, 8, 10)),
        (lambda: nn.Conv2d(8, 4, 3, groups=2), (0, 8, 5, 6)),
        (lambda: nn.GRU(8, 4, bidirectional=True), (3, 0, 8)),
        (lambda: nn.LSTM(8, 4, batch_first=True, proj_size=3), (0, 3, 8)),
        (lambda: nn.RNN(8, 4, 2), (3, 0, 8)),
    ],
)
def test_batches_of_nothing(make: Any, shape: tuple[int, ...]) -> None:
    layer, data = make(), torch.randn([size or 5 for size in shape])
    qmodel = qgnn.calibrate(qgnn.quantize_model(layer, bits=4), [(data,)], method="ranges").eval()
    for model in (qmodel, qgnn.pack_model(qmodel)):
        got, want = _parts(model(torch.zeros(shape))), _parts(layer(torch.zeros(shape)))
        assert [part.shape for part in got] == [part.shape for part in want]


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.table(index))

    index = torch.arange(20)
    qmodel: Any = qgnn.calibrate(qgnn.quantize_model(Tied(), 4), [(index,)]).eval()
    assert qmodel.head.weight is qmodel.table.weight
    assert qgnn.summary(qmodel).coverage.quantized == 160  # type: ignore[union-attr]
    assert torch.equal(qgnn.pack_model(qmodel)(index), qmodel(index))
    restored: Any = qgnn.restore_model(qmodel)
    assert restored.head.weight is restored.table.weight


def test_lightgcn_reads_quantized_tables() -> None:
    edge_index, bits = graph(), 4
    model = LightGCN(NODES, 16, 2)
    qmodel: Any = qgnn.calibrate(qgnn.quantize_model(model, bits), [(edge_index,)]).eval()
    assert isinstance(qmodel, LightGCN)
    assert qmodel.embedding.weight is qmodel._modules["embedding"]._parameters["weight"]  # whoever asks from outside
    packed: Any = qgnn.pack_model(qmodel)
    with torch.no_grad():
        expected = qmodel.get_embedding(edge_index)
        assert torch.equal(packed.get_embedding(edge_index), expected)
        assert torch.equal(packed(edge_index), qmodel(edge_index))
        assert torch.equal(packed.recommend(edge_index, k=3), qmodel.recommend(edge_index, k=3))
        assert not torch.equal(expected, model.get_embedding(edge_index))
    assert "embedding.weight" not in packed.state_dict()
    assert qgnn.packed_bytes(packed).ratio > 3
    qmodel.train()
    loss = qmodel.recommendation_loss(torch.rand(6), torch.rand(6), torch.arange(6))
    (loss + qmodel(edge_index).sum()).backward()
    assert bool(qmodel.embedding.weight.grad.any())


def test_lazy_layers_once_they_have_run() -> None:
    x = features()
    model = Around(HeteroLinear(-1, 8, 3), lambda m, x: m(x, torch.arange(NODES) % 3))
    with pytest.raises(ValueError, match="run the model once"):
        qgnn.quantize_model(model)
    model(x)
    qmodel = qgnn.calibrate(qgnn.quantize_model(model, 8), [(x,)]).eval()
    assert torch.equal(qgnn.pack_model(qmodel)(x), qmodel(x))
    lazy = Around(nn.LazyConv1d(4, 3), lambda m, x: m(x.t()))
    lazy(x)
    qmodel = qgnn.calibrate(qgnn.quantize_model(lazy, 8), [(x,)]).eval()
    assert torch.equal(qgnn.pack_model(qmodel)(x), qmodel(x))


def test_computed_weights_are_packed_as_floats() -> None:
    cell = nn.utils.parametrizations.weight_norm(nn.GRUCell(WIDTH, 6), "weight_ih")
    qmodel = qgnn.calibrate(qgnn.quantize_model(Around(cell, lambda m, x: m(x)), 8), [(features(),)]).eval()
    packed = qgnn.pack_model(qmodel)
    x = features()
    assert torch.equal(packed(x), qmodel(x))
    assert "its weights are computed from others" in str(qgnn.summary(packed))


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN_TANH", "RNN_RELU"])
def test_states_are_those_of_torch(kind: str) -> None:
    """One step of torch's own cells, of gates near zero as of ones that saturate."""
    cells = {"GRU": nn.GRUCell, "LSTM": nn.LSTMCell}
    cell = cells[kind](8, 8) if kind in cells else nn.RNNCell(8, 8, nonlinearity=kind[4:].lower())
    x, state = torch.randn(60, 8) * 10.0 ** torch.randint(-4, 3, (60, 1)), (torch.randn(60, 8), torch.randn(60, 8))
    hx = state if kind == "LSTM" else state[:1]
    with torch.no_grad():
        expected = cell(x, hx if kind == "LSTM" else hx[0])
        gates = F.linear(x, cell.weight_ih, cell.bias_ih), F.linear(hx[0], cell.weight_hh, cell.bias_hh)
        found = next_state(kind, *gates, hx)
    for got, wanted in zip(found, expected if kind == "LSTM" else (expected,), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
