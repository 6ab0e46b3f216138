"""Deferred results: what packed layers hand each other inside a packed model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.packing.lazy import sizes
from qgnn_plugin.packing.lazy.deferred import DeferredTensor
from qgnn_plugin.packing.lazy.producers import Producer, row_blocks

ROWS, WIDTH = 150, 7
RANGE = {"out_scale": torch.tensor(0.3), "out_offset": torch.tensor(-1.0), "out_bits": 4}


class Counted:
    """A producer of ``value`` that counts its runs."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.runs, self.repeats = value, 0, 0
        self.inner = Producer.of(value)

    def run(self, start: int, stop: int, **out: Any) -> Tensor:
        self.runs += 1
        return self.inner.run(start, stop, **out)

    def tensor(self) -> DeferredTensor:
        producer = Producer(*self.value.shape, self.value.device, self.run)
        return DeferredTensor(producer, self._repeat)

    def _repeat(self) -> None:
        self.repeats += 1


@pytest.fixture
def source() -> Counted:
    return Counted(torch.randn(ROWS, WIDTH))


def codes(value: Tensor) -> Tensor:
    return quantize_pack(value, *RANGE.values())  # type: ignore[arg-type]


NOTED: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda x: x,
    "torch.relu": torch.relu,
    "F.relu": F.relu,
    "method": lambda x: x.relu(),
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "dropout": lambda x: F.dropout(x.relu(), 0.5, training=False),
    "dropout module": nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).eval(),
    "elu": F.elu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "relu twice": lambda x: F.elu(x.relu()).relu(),
    "numbers": lambda x: (x + 2) * x - 1,
    "gate": lambda x: x.relu() * x.sigmoid(),
    "softplus": lambda x: F.softplus(x) - 0.5,
    "layer norm": nn.LayerNorm(WIDTH),
    "softmax": lambda x: x.softmax(-1).log_softmax(dim=1),
    "norms and activations": nn.Sequential(nn.BatchNorm1d(WIDTH), nn.SiLU(), nn.LayerNorm(WIDTH), nn.ReLU6()).eval(),
    "batch norm": nn.BatchNorm1d(WIDTH, affine=True).eval(),
    "norm and relu": nn.Sequential(nn.BatchNorm1d(WIDTH).eval(), nn.ReLU()).eval(),
    "views": lambda x: x.view(-1, WIDTH).reshape(ROWS, WIDTH).flatten(1).contiguous().float(),
    "detach": lambda x: x.detach().relu(),
    "by a number": lambda x: 0.3 * (2 * x.relu()) / 7,
}


@pytest.mark.parametrize("name", NOTED)
def test_noted_operations_run_nothing_until_codes_are_asked_for(name: str, source: Counted) -> None:
    with torch.no_grad():
        out = NOTED[name](source.tensor())
        assert source.runs == 0
        assert isinstance(out, DeferredTensor)
        assert (out.shape, out.dtype, out.dim(), len(out)) == ((ROWS, WIDTH), torch.float32, 2, ROWS)
        expected = NOTED[name](source.value.clone())
        assert torch.equal(out.pending.packed(**RANGE), codes(expected))
        assert torch.equal(out + 0, expected)


TOUCHES: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda x: (2 - x) ** 3,
    "product": lambda x: x @ torch.ones(WIDTH, 2),
    "index": lambda x: x[3:5],
    "mask": lambda x: x[x > 0],
    "cat": lambda x: torch.cat([x, x], dim=-1),
    "reduction": lambda x: x.sum(),
    "other view": lambda x: x.view(-1),
    "clone": lambda x: x.clone(),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "list": lambda x: torch.tensor(x.tolist()),
    "item": lambda x: torch.tensor(x[0, 0].item()),
    "double": lambda x: x.double(),
    "dropout": lambda x: F.dropout(x, 1.0, training=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "text": lambda x: torch.tensor([ord(c) for c in repr(x)]),
    "dlpack": lambda x: torch.utils.dlpack.from_dlpack(x),
    "module": nn.Linear(WIDTH, 3),
}


@pytest.mark.parametrize("name", TOUCHES)
def test_anything_else_finds_an_ordinary_tensor(name: str, source: Counted) -> None:
    out = TOUCHES[name](source.tensor())
    assert type(out) is Tensor
    assert torch.equal(out, TOUCHES[name](source.value))
    assert source.runs == 1


def test_a_value_is_computed_once(source: Counted) -> None:
    x = source.tensor()
    assert torch.equal(x.abs(), source.value.abs())
    assert torch.equal(x.pending.packed(**RANGE), codes(source.value))
    assert torch.equal(x.relu(), source.value.relu())
    assert (source.runs, source.repeats) == (1, 0)


def test_two_consumers_get_what_each_needs(source: Counted) -> None:
    x = source.tensor()
    y = x.relu()
    assert torch.equal(y.pending.packed(**RANGE), codes(source.value.relu()))
    assert source.repeats == 0
    assert torch.equal(x.abs(), source.value.abs())  # the residual connection around the next layer
    assert torch.equal(y.pending.packed(**RANGE), codes(source.value.relu()))
    assert source.repeats > 0


def test_changes_in_place(source: Counted) -> None:
    x = source.tensor()
    alias = x.view(ROWS, WIDTH)
    before = x.relu()
    assert x.relu_() is x
    x.mul_(2)
    x[0] = 5.0
    expected = source.value.relu() * 2
    expected[0] = 5.0
    assert torch.equal(alias + 0, expected)
    assert torch.equal(x.pending.packed(**RANGE), codes(expected))
    assert torch.equal(before + 0, source.value.relu())


def test_statistics_of_a_norm_are_those_of_its_call(source: Counted) -> None:
    norm = nn.BatchNorm1d(WIDTH).eval()
    with torch.no_grad():
        expected, out = norm(source.value), norm(source.tensor())
        for statistic in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            statistic.add_(1)  # type: ignore[union-attr]
        assert source.runs == 0
        assert torch.equal(out + 0, expected)


def test_sums_and_steps_of_producers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * WIDTH)
    first, second = Counted(torch.randn(ROWS, WIDTH)), Counted(torch.randn(ROWS, WIDTH))
    total = Producer.plus(Producer.of(first.value), Producer(ROWS, WIDTH, torch.device("cpu"), second.run))
    expected = first.value + second.value
    assert torch.equal(DeferredTensor(total).pending.packed(**RANGE), codes(expected))
    assert second.runs == 2  # blocks of 128 rows and the rest
    assert torch.equal(DeferredTensor(total).relu() + 0, expected.relu())
    assert torch.equal(DeferredTensor(total.then(F.softplus)).pending.packed(**RANGE), codes(F.softplus(expected)))


@pytest.mark.parametrize("num_rows", [0, 1, 63, 64, 65, 150, 1_000, 1_407, 20_011])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_blocks_have_all_rows_and_are_of_one_size(num_rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for less than 64 rows for each block that the last one lacks; none is half as large again as asked for."""
    limit = 128 * 3
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", limit)
    blocks = list(row_blocks(num_rows, width, torch.device("cpu")))
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, num_rows)
    first = blocks[0].stop
    assert all(block.start % 64 == 0 and block.stop - block.start == first for block in blocks[:-1])
    assert first * width <= 1.5 * limit + 64 * width
    assert num_rows < 2 * 64 or len(blocks) <= max(1, round(num_rows * width / limit))


def test_empty_matrix() -> None:
    x = Counted(torch.empty(0, WIDTH)).tensor()
    assert x.relu().pending.packed(**RANGE).shape == (0, 1)
    assert Producer.plus(Producer.of(torch.empty(0, 3)), Producer.of(torch.empty(0, 3)))().shape == (0, 3)
