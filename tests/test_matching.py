"""Calibration by outputs: codes of weights that are chosen for what the model returns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core.support import NODES, OUT, WIDTH, assert_same_state, features, graph
from torch import Tensor, nn
from torch_geometric.nn import GAT, GCN, GIN, MLP, GraphSAGE, TransformerConv

import qgnn_plugin as qgnn
from qgnn_plugin import QuantConfig
from qgnn_plugin.config import OFF
from qgnn_plugin.matching import match_weights

MODELS: dict[str, Any] = {
    "gcn": lambda: GCN(WIDTH, 16, 2, OUT),
    "gat": lambda: GAT(WIDTH, 16, 2, OUT, heads=2),
    "sage": lambda: GraphSAGE(WIDTH, 16, 2, OUT),
    "gin": lambda: GIN(WIDTH, 16, 2, OUT),
}


def relative_error(model: nn.Module, wanted: Tensor, args: tuple[Any, ...]) -> float:
    with torch.no_grad():
        return float((model(*args) - wanted).norm() / (wanted - wanted.mean(0)).norm())


def calibrated(model: nn.Module, args: tuple[Any, ...], bits: int = 2, **options: Any) -> Any:
    qmodel = qgnn.quantize_model(model, config=QuantConfig(bits=bits)).eval()
    return qgnn.calibrate(qmodel, args, **options)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_come_closer_and_weights_stay(name: str) -> None:
    torch.manual_seed(1)
    model, args = MODELS[name]().eval(), (features(), graph())
    with torch.no_grad():
        wanted = model(*args)
    plain = calibrated(model, args, method="ranges")
    matched = calibrated(model, args, method="outputs", steps=40)
    assert relative_error(matched, wanted, args) < relative_error(plain, wanted, args)
    assert any(q.shift is not None for q in qgnn.quantizers(matched).values())
    restored = qgnn.restore_model(matched)
    for key, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(restored(*args), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_moved_weights_bring_outputs_closer_by_the_nearest_codes(name: str) -> None:
    torch.manual_seed(1)
    model, args = MODELS[name]().eval(), (features(), graph())
    with torch.no_grad():
        wanted = model(*args)
    qmodel = calibrated(model, args, method="ranges")
    before = relative_error(qmodel, wanted, args)
    match_weights(qmodel, [args], None, steps=40)
    assert relative_error(qmodel, wanted, args) < before
    assert all(q.shift is None for q in qgnn.quantizers(qmodel).values())
    assert all(p.grad is None and p.requires_grad for p in qmodel.parameters())


def test_weights_stay_where_moving_them_is_no_improvement() -> None:
    torch.manual_seed(1)
    model, args = MODELS["gcn"]().eval(), (features(), graph())
    qmodel = calibrated(model, args, method="ranges")
    for site in qgnn.quantizers(qmodel).values():  # the outputs are those of the float model already
        site.bits = OFF
    state = copy.deepcopy(qmodel.state_dict())
    with pytest.raises(ValueError, match="depend on a quantized weight"):
        match_weights(qmodel, [args], None, steps=2)
    assert_same_state(qmodel, state)


@pytest.mark.parametrize("name", MODELS)
def test_chosen_codes_are_packed_saved_and_copied(name: str) -> None:
    torch.manual_seed(1)
    model, args = MODELS[name]().eval(), (features(), graph())
    qmodel = calibrated(model, args, method="outputs", steps=15)
    with torch.no_grad():
        expected = qmodel(*args)
        torch.testing.assert_close(qgnn.pack_model(qmodel)(*args), expected, rtol=0, atol=0 if name != "gat" else 1e-5)
        fresh = qgnn.quantize_model(model, config=QuantConfig(bits=2)).eval()
        fresh.load_state_dict(qmodel.state_dict())
        assert torch.equal(fresh(*args), expected)
        assert torch.equal(copy.deepcopy(qmodel)(*args), expected)
        # A state without chosen codes takes them away.
        fresh.load_state_dict(calibrated(model, args, method="ranges").state_dict())
        assert torch.equal(fresh(*args), calibrated(model, args, method="ranges")(*args))


def test_calibrating_again_rounds_to_the_nearest_codes() -> None:
    model, args = MODELS["gcn"]().eval(), (features(), graph())
    plain = calibrated(model, args, method="ranges")
    matched = calibrated(model, args, method="outputs", steps=10)
    qgnn.calibrate(matched, args, method="ranges")
    with torch.no_grad():
        assert torch.equal(matched(*args), plain(*args))


def test_codes_stay_within_their_width_and_train_on() -> None:
    model, args = MODELS["gcn"]().eval(), (features(), graph())
    qmodel = calibrated(model, args, method="outputs", steps=10)
    layer: Any = next(m for m in qmodel.modules() if hasattr(m, "weight_quantizer"))
    shift = torch.randint(-300, 300, layer.weight.shape, dtype=torch.int16)
    layer.weight_quantizer.shift = shift
    codes = layer.weight_quantizer(layer.weight).codes
    assert codes.min() == 0
    assert codes.max() == 3
    layer.weight_quantizer(layer.weight).dequantize().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


def test_nothing_changes_where_a_batch_fails_or_there_is_nothing_to_move() -> None:
    model, args = MODELS["gcn"](), (features(), graph())
    qmodel = calibrated(model, args, method="ranges")
    before = {k: v.clone() for k, v in qmodel.state_dict().items()}
    calls = []

    def failing(m: nn.Module, batch: Any) -> Tensor:
        calls.append(0)
        if len(calls) > 4:
            raise RuntimeError("enough")
        return m(2 * batch[0], batch[1])

    with pytest.raises(RuntimeError, match="enough"):
        qgnn.calibrate(qmodel, [args], method="outputs", forward=failing)
    for key, value in qmodel.state_dict().items():
        assert torch.equal(value, before[key]), key
    with pytest.raises(ValueError, match="depend on a quantized weight"):
        qgnn.calibrate(qmodel, [args], method="outputs", forward=lambda m, batch: m(*batch).detach())


def test_gradients_modes_and_frozen_parameters_come_back() -> None:
    model, args = MODELS["gcn"](), (features(), graph())
    qmodel = qgnn.quantize_model(model, bits=2).train()
    first = next(qmodel.parameters()).requires_grad_(False)
    last = list(qmodel.parameters())[-1]
    last.grad = torch.ones_like(last)
    qgnn.calibrate(qmodel, args, method="outputs", steps=3)
    assert qmodel.training
    assert not first.requires_grad
    assert last.requires_grad
    assert torch.equal(last.grad, torch.ones_like(last))
    assert all(p.grad is None for p in list(qmodel.parameters())[:-1])


@pytest.mark.parametrize("options", [{"method": "best"}, {"steps": 0}, {"method": "outputs", "steps": 1.5}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    qmodel = qgnn.quantize_model(MODELS["gcn"](), bits=2)
    with pytest.raises(ValueError, match=r"method|steps"):
        qgnn.calibrate(qmodel, (features(), graph()), **options)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_default_matches_outputs_where_there_are_few_levels(bits: int) -> None:
    model, args = MODELS["gcn"]().eval(), (features(), graph())
    method = "outputs" if bits < 4 else "ranges"
    default, chosen = calibrated(model, args, bits, steps=5), calibrated(model, args, bits, method=method, steps=5)
    assert_same_state(default, chosen.state_dict())
    assert (bits == 2) == any(q.shift is not None for q in qgnn.quantizers(default).values())


UNMATCHABLE: dict[str, tuple[Any, str]] = {
    "classes": (lambda m, batch: m(*batch).argmax(-1), "returns a tensor of floats"),
    "no gradient": (lambda m, batch: m(*batch).detach(), "depend on a quantized weight"),
    "infinite": (lambda m, batch: m(*batch) / 0, "finite outputs"),
}


@pytest.mark.parametrize("name", UNMATCHABLE)
def test_the_default_says_why_it_keeps_ranges(name: str) -> None:
    model, args = MODELS["gcn"]().eval(), (features(), graph())
    forward, reason = UNMATCHABLE[name]
    with pytest.warns(UserWarning, match=reason):
        default = calibrated(model, [args], forward=forward)
    assert_same_state(default, calibrated(model, args, method="ranges").state_dict())


def test_much_data_is_not_read_for_minutes_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = MODELS["gcn"]().eval(), (features(), graph())
    monkeypatch.setattr("qgnn_plugin.calibration.LARGEST", 100)
    with pytest.warns(UserWarning, match="would take minutes"):
        calibrated(model, args)


def test_of_a_loader_so_many_batches_are_read_again_as_there_are_steps() -> None:
    model, batches = MODELS["gcn"]().eval(), [(features(), graph(seed=seed)) for seed in range(5)]
    read = []

    def forward(m: nn.Module, batch: Any) -> Tensor:
        read.append(next(i for i, other in enumerate(batches) if other is batch))
        return m(*batch)

    calibrated(model, iter(batches), forward=forward, steps=3)
    assert read[:5] == [0, 1, 2, 3, 4]
    assert set(read[5:]) == {0, 1, 2}


class Stateful(nn.Module):
    """Draws random numbers and counts its calls, in eval mode too; with a branch that no data reach."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused = GCN(WIDTH, 8, 2, OUT), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(nn.functional.dropout(x, 0.2), edge_index)


def test_buffers_and_random_numbers_are_those_of_one_pass() -> None:
    model, args = Stateful().eval(), (features(), graph())
    torch.manual_seed(5)
    plain = calibrated(model, args, method="ranges")
    drawn = torch.random.get_rng_state()
    torch.manual_seed(5)
    matched: Any = calibrated(model, args, steps=4)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert matched.calls == plain.calls == 1
    assert any(q.shift is not None for q in qgnn.quantizers(matched).values())


def test_rows_of_a_table_are_as_they_are_in_any_order() -> None:
    """A look-up quantizes the rows that it takes: there are no codes of the table to choose."""
    table = nn.Embedding(20, WIDTH).eval()
    qtable = calibrated(table, [(torch.arange(20),)], steps=5)
    index = torch.tensor([3, 3, 7])
    with torch.no_grad():
        assert torch.equal(qtable(index), qtable(torch.arange(20))[index])
    assert all(q.shift is None for q in qgnn.quantizers(qtable).values())


def test_inside_inference_mode() -> None:
    model, args = MODELS["gcn"]().eval(), (features(), graph())
    qmodel = qgnn.quantize_model(model, bits=2).eval()
    with torch.inference_mode():
        qgnn.calibrate(qmodel, args, steps=5)
    assert_same_state(qmodel, calibrated(model, args, steps=5).state_dict())


def test_any_converted_model_batches_and_tuples() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = TransformerConv(WIDTH, 4, heads=2), MLP([8, 8, 3], norm="batch_norm")

        def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
            h = self.conv(x, edge_index).relu()
            return h, self.head(h)

    model = Model().eval()
    batches = [(features(), graph(seed=seed)) for seed in range(3)]
    qmodel = qgnn.quantize_model(model, bits=2).eval()
    qgnn.calibrate(qmodel, iter(batches), method="outputs", steps=9)
    assert qmodel(*batches[0])[1].shape == (NODES, 3)
