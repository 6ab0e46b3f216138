"""Everything about a range is in ``state_dict``, and nothing but training or calibration changes it."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from qgnn_plugin import QLRQuantizer
from qgnn_plugin.quantizers import RangeKind

OPTIONS = [
    {},
    {"levels": "half"},
    {"granularity": "channel", "channels": 6},
    {"granularity": "node"},
    {"granularity": "row"},
    {"truncation": "sbt"},
    {"truncation": "bt", "levels": "symmetric"},
]


def data(kind: RangeKind) -> Tensor:
    binary = (torch.rand(30, 6) < 0.4).float()
    return {
        RangeKind.FREE: torch.randn(30, 6),
        RangeKind.NONNEGATIVE: torch.rand(30, 6),
        RangeKind.ZERO_ONE_ROWS: torch.rand(30, 1) * (torch.rand(30, 60) < 0.4),
        RangeKind.ZERO_ONE: binary,
    }[kind]


KINDS = [RangeKind.FREE, RangeKind.NONNEGATIVE, RangeKind.ZERO_ONE]


def snapshot(quantizer: QLRQuantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def assert_same_state(quantizer: QLRQuantizer, before: dict[str, Tensor]) -> None:
    after = quantizer.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def make(options: dict[str, object], x: Tensor) -> QLRQuantizer:
    quantizer = QLRQuantizer(4, **options)  # type: ignore[arg-type]
    quantizer.set_range(x)
    return quantizer.eval()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trips_bitwise(options: dict[str, object], kind: RangeKind) -> None:
    x = data(kind)
    quantizer = make(options, x)
    expected = quantizer(x).dequantize()
    buffer = io.BytesIO()
    torch.save(quantizer.state_dict(), buffer)
    buffer.seek(0)
    fresh = QLRQuantizer(4, **options).eval()  # type: ignore[arg-type]
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assigned = QLRQuantizer(4, **options).eval()  # type: ignore[arg-type]
    assigned.load_state_dict(quantizer.state_dict(), assign=True)
    pickled = pickle.loads(pickle.dumps(quantizer))
    for other in (fresh, assigned, pickled, copy.deepcopy(quantizer), quantizer):
        assert other.range_kind == quantizer.range_kind
        assert torch.equal(other(x).dequantize(), expected)


def test_row_scaled_kind_round_trips() -> None:
    x = data(RangeKind.ZERO_ONE_ROWS)
    quantizer = make({}, x)
    assert quantizer.range_kind == RangeKind.ZERO_ONE_ROWS
    fresh = QLRQuantizer(4).eval()
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x).dequantize(), x)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_eval_changes_nothing(options: dict[str, object], kind: RangeKind) -> None:
    x = data(kind)
    quantizer = make(options, x)
    before = snapshot(quantizer)
    quantizer(x.clone().requires_grad_()).dequantize().sum().backward()
    with torch.inference_mode():
        quantizer(x * 0.5)
    quantizer(torch.zeros_like(x))
    quantizer(x[:0])
    assert_same_state(quantizer, before)


def test_a_range_is_set_and_read_in_inference_mode() -> None:
    x = torch.randn(5, 4)
    with torch.inference_mode():
        quantizer = QLRQuantizer(4)  # whose buffers count no versions
        assert not quantizer.is_set
        quantizer.set_range(x)
        assert quantizer.range_kind == RangeKind.FREE
        found = quantizer.eval()(x).dequantize()
        quantizer.unset()
        assert not quantizer.is_set
    assert torch.equal(found, make({}, x).eval()(x).dequantize())


def test_loading_an_unset_range_unsets() -> None:
    quantizer = make({}, torch.randn(5, 4))
    quantizer.load_state_dict(QLRQuantizer(4).state_dict())
    assert not quantizer.is_set
    with pytest.raises(RuntimeError, match="unset"):
        quantizer(torch.randn(5, 4))


def test_writing_the_buffers_in_place_counts() -> None:
    """As averaged models and DistributedDataParallel's broadcasts do."""
    x = torch.rand(20, 4)
    quantizer = QLRQuantizer(4)
    averaged = AveragedModel(quantizer)
    quantizer.train()(x)
    averaged.update_parameters(quantizer)
    averaged.update_parameters(quantizer)
    assert averaged.module.range_kind == RangeKind.NONNEGATIVE
    expected = quantizer.eval()(x).dequantize()
    torch.testing.assert_close(averaged.eval()(x).dequantize(), expected)
    with torch.no_grad():
        for mine, theirs in zip(
            quantizer.buffers(), QLRQuantizer(4).buffers(), strict=True
        ):
            mine.copy_(theirs)
    assert not quantizer.is_set


def test_functional_call_uses_the_given_state() -> None:
    x = torch.rand(20, 4)
    quantizer = make({}, x)
    unset = QLRQuantizer(4).eval()
    out = torch.func.functional_call(unset, dict(quantizer.state_dict()), (x,))
    assert torch.equal(out.dequantize(), quantizer(x).dequantize())
    assert not unset.is_set


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_to_another_precision_keeps_the_range(dtype: torch.dtype) -> None:
    x = torch.rand(20, 4)
    quantizer = make({"truncation": "sbt"}, x)
    moved = copy.deepcopy(quantizer).to(dtype)
    assert moved.kind.dtype == torch.uint8
    assert moved.range_kind == RangeKind.NONNEGATIVE
    expected = quantizer(x).dequantize().to(dtype)
    tolerance = {"rtol": 0.05, "atol": 0.07} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(moved(x.to(dtype)).dequantize(), expected, **tolerance)


def test_meta_round_trip() -> None:
    x = torch.rand(20, 4)
    quantizer = make({}, x)
    state = snapshot(quantizer)
    empty = QLRQuantizer(4, device=torch.device("meta")).eval()
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty(x).dequantize(), quantizer(x).dequantize())


def test_repr_tells_what_matters() -> None:
    assert repr(make({}, torch.rand(3, 4))).startswith(
        "QLRQuantizer(bits=4, levels=affine, granularity=tensor, NONNEGATIVE"
    )


def test_the_former_name_of_zero_one_data_is_deprecated() -> None:
    quantizer = QLRQuantizer(4)
    quantizer.set_range((torch.rand(20, 3) < 0.5).float())
    with pytest.warns(DeprecationWarning, match="is_zero_one"):
        assert quantizer.is_one_bit


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_that_train_together_take_no_ranges_of_their_own(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only gradients are averaged: ranges from each process's own first batch would differ for good."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: processes)
    x = torch.randn(30, 6)
    learned, fixed, weight = QLRQuantizer(4), QLRQuantizer(4, learn=False), QLRQuantizer(4, channel_dim=0)
    if processes == 1:
        learned(x)
    else:
        with pytest.raises(RuntimeError, match=r"before 2 processes train .*calibrate\(model, data"):
            learned(x)
    assert learned.is_set == (processes == 1)
    for same_everywhere in (fixed, weight, make({}, x).train()):  # a broadcast buffer, a shared weight, one that is set
        assert same_everywhere(x).codes.shape == x.shape
