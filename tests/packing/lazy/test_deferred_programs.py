"""Random programs of what models do with features, on results that are not computed yet and on plain tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.packing.lazy import sizes
from qgnn_plugin.packing.lazy.deferred import DeferredTensor
from qgnn_plugin.packing.lazy.producers import Producer

ROWS, WIDTH = 150, 8
RANGE = {"out_scale": torch.tensor(0.3), "out_offset": torch.tensor(-1.0), "out_bits": 4}
Operation = Callable[..., Any]

ROW_WISE: list[Operation] = [
    torch.relu, F.elu, F.gelu, F.silu, torch.sigmoid, torch.tanh, lambda x: F.leaky_relu(x, 0.1), lambda x: 0.3 * x / 7,
    lambda x: x * torch.tensor(2.0), lambda x: x * True, nn.BatchNorm1d(WIDTH).eval(), lambda x: x.detach(),
    lambda x: F.dropout(x, training=False), lambda x: F.layer_norm(x, x.shape[1:]), F.normalize, lambda x: 1 - x,
]  # fmt: skip
VIEWS: list[Operation] = [
    lambda x: x.view(ROWS, 2, -1), lambda x: x.reshape(-1, WIDTH), lambda x: x.flatten(1), lambda x: x[:, :1],
    lambda x: x[:, 1:], lambda x: x.chunk(2, 1)[-1], lambda x: x.split(1, 1)[0], lambda x: x[:, 0], lambda x: x[:],
    lambda x: x.contiguous(), lambda x: x.data, lambda x: x.unsqueeze(1), lambda x: x.as_strided(x.shape, x.stride()),
    lambda x: x.reshape(-1).view(x.shape), lambda x: x.transpose(0, 1).reshape(x.shape), lambda x: x.clone(),
]  # fmt: skip
IN_PLACE: list[Operation] = [
    torch.relu_, torch.tanh_, lambda x: F.elu(x, inplace=True), lambda x: x.mul_(0.5), lambda x: x.add_(0.25),
    lambda x: x[:10].zero_(), lambda x: x[:, :1].relu_(), lambda x: x.view(x.shape).neg_(), lambda x: x.data.mul_(0.9),
    lambda x: x.masked_fill_(x < -1, -1), lambda x: x.__setitem__(x > 0.5, 0), lambda x: torch.add(x, 0.2, out=x),
    lambda x: x.numpy().__setitem__(0, 0.5), lambda x: setattr(x, "data", torch.ones(x.shape)), lambda x: x.div_(2),
    lambda x: x.apply_(lambda number: number / 2), lambda x: x.index_add_(0, torch.tensor([1]), torch.ones_like(x[:1])),
]  # fmt: skip
OF_TWO: list[Operation] = [
    torch.add, torch.mul, torch.maximum, lambda x, y: torch.add(x, y, alpha=0.5), lambda x, y: torch.where(x > y, x, y),
    lambda x, y: torch.cat([x, y], -1), lambda x, y: torch.cat([x, y], -1)[..., 1:], lambda x, y: x + y + x,
    lambda x, y: torch.stack([x, y]).sum(0), lambda x, y: torch.stack([x, y], -1).amax(-1), lambda x, y: x - y / 2,
]  # fmt: skip
ONTO: list[Operation] = [
    lambda x, y: x.add_(y), lambda x, y: x.mul_(y), lambda x, y: x.copy_(y), lambda x, y: x[:5].copy_(y[:5]),
    lambda x, y: torch.mul(x, y, out=y), lambda x, y: x.index_copy_(0, torch.arange(3), y[:3]),
]  # fmt: skip
KINDS = [(ROW_WISE, 4), (VIEWS, 4), (IN_PLACE, 3), (OF_TWO, 3), (ONTO, 1)]


def deferred(value: Tensor) -> DeferredTensor:
    return DeferredTensor(Producer.of(value.clone()))


def outcome(operation: Operation, values: list[Any]) -> tuple[Any, bool]:
    try:
        return operation(*values), True
    except (RuntimeError, ValueError, IndexError):
        return None, False


def expect_codes(x: Any, expected: Tensor) -> None:
    if type(x) is DeferredTensor:
        assert torch.equal(x.pending.packed(**RANGE), quantize_pack(expected.contiguous(), *RANGE.values()))  # type: ignore[arg-type]


def run(seed: int) -> None:
    """One program; every value, in any order, is that of plain tensors, as are shapes, strides and what raises."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    plain: list[Tensor] = [torch.randn(ROWS, WIDTH) for _ in range(2)]
    late: list[Any] = [deferred(value) for value in plain]
    for _ in range(rng.randint(3, 12)):
        operations, = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])
        at = [rng.randrange(len(plain)) for _ in range(2 if operations in (OF_TWO, ONTO) else 1)]
        if len({plain[k].shape for k in at}) > 1:
            continue
        operation = rng.choice(operations)
        wanted, runs = outcome(operation, [plain[k] for k in at])
        found, also = outcome(operation, [late[k] for k in at])
        assert runs is also
        if runs and operations not in (IN_PLACE, ONTO):
            assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
            if wanted.dim() > 1:
                plain.append(wanted)
                late.append(found)
        if rng.random() < 0.2:
            expect_codes(late[at[0]], plain[at[0]])
    for k in rng.sample(range(len(plain)), len(plain)):
        torch.testing.assert_close(late[k] + 0, plain[k] + 0, equal_nan=True)


@pytest.mark.parametrize("blocks", [False, True])
def test_programs_give_what_they_give_of_plain_tensors(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks:
        monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * WIDTH)
    with torch.no_grad():
        for seed in range(200):
            run(1000 * blocks + seed)
