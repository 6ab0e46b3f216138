"""Tables of node state in packed rows: what is written is read to half a step, and nothing else moves."""

import copy

import pytest
import torch
from torch import nn
from torch_geometric.nn import TGNMemory
from torch_geometric.nn.models.tgn import IdentityMessage, LastAggregator

import qgnn_plugin as qgnn
from qgnn_plugin.kernels.layout import row_words


def rows(count: int = 9, width: int = 13, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return x * torch.arange(1, count + 1).unsqueeze(1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_come_back_to_half_a_step(bits: int) -> None:
    x = rows()
    table = qgnn.PackedRows(x, bits)
    step = (x.amax(1) - x.amin(1)) / (2**bits - 1)
    error = (table[torch.arange(9)] - x).abs().amax(1)
    assert bool((error <= step * 0.50001).all())
    assert bool((error > 0).any())
    assert table.nbytes == 9 * (4 * row_words(13, bits) + 8)
    assert table.shape == x.shape
    assert (len(table), table.size(1)) == (9, 13)


def test_writing_some_rows_leaves_the_others() -> None:
    table = qgnn.PackedRows(rows(), 4)
    before, index = table[:].clone(), torch.tensor([7, 2, 4])
    table[index] = rows(3, seed=1)
    after = table[:]
    others = torch.ones(9, dtype=torch.bool)
    others[index] = False
    assert torch.equal(after[others], before[others])
    assert torch.equal(table[others], before[others])
    assert torch.equal(table[index], qgnn.PackedRows(rows(3, seed=1), 4)[:])
    written = table[index]
    table[index] = written  # the ends of a range are levels of it
    torch.testing.assert_close(table[index], written, rtol=1e-5, atol=1e-5)


def test_constant_rows_are_exact() -> None:
    table = qgnn.PackedRows(torch.full((3, 5), 0.3), 2)
    assert torch.equal(table[:], torch.full((3, 5), 0.3))
    assert torch.equal(table.zero_()[:], torch.zeros(3, 5))
    table.fill_(2.0)
    assert torch.equal(table[:], torch.full((3, 5), 2.0))


def test_states_are_saved_and_copied() -> None:
    table, other = qgnn.PackedRows(rows(), 8), qgnn.PackedRows(rows(seed=3), 8)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other[:], table[:])
    twin = copy.deepcopy(table)
    twin[torch.tensor([0])] = torch.zeros(1, 13)
    assert not torch.equal(twin[:], table[:])


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.ones(2, 4), "shape"), (torch.ones(3, 13), "shape"), (torch.full((2, 13), torch.nan), "NaN")],
)
def test_wrong_rows_are_refused_and_nothing_is_written(value: torch.Tensor, message: str) -> None:
    table = qgnn.PackedRows(rows(), 8)
    before = table[:].clone()
    with pytest.raises(ValueError, match=message):
        table[torch.tensor([1, 2])] = value
    assert torch.equal(table[:], before)


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one of \(2, 4, 8\)"):
        qgnn.PackedRows(rows(), 3)
    with pytest.raises(ValueError, match="floats"):
        qgnn.PackedRows(torch.ones(3, 3, dtype=torch.long))
    norm = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="running_mean"):
        qgnn.pack_rows(norm, "memory")
    with pytest.raises(ValueError, match="floats"):
        qgnn.pack_rows(norm, "running_mean")
    assert isinstance(norm.running_mean, torch.Tensor)


def memory() -> TGNMemory:
    torch.manual_seed(0)
    return TGNMemory(20, 3, 8, 4, IdentityMessage(3, 8, 4), LastAggregator())


def events(model: TGNMemory, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for k in range(count):
        src, dst = (torch.randint(20, (6,), generator=generator) for _ in range(2))
        model.update_state(src, dst, torch.full((6,), k), torch.randn(6, 3, generator=generator))
        model.detach()


@pytest.mark.parametrize("training", [False, True])
def test_memory_of_a_temporal_network(training: bool) -> None:
    """Its own code runs on packed rows, and what it remembers is off by codes of 8 bits only."""
    plain, packed = memory(), memory()
    table = qgnn.pack_rows(packed, bits=8)
    for model in (plain, packed):
        model.train(training)
        events(model, 6)
        model.eval()
    assert packed.memory is table
    wanted, time = plain(torch.arange(20))
    found, same = packed(torch.arange(20))
    assert torch.equal(time, same)
    assert float(wanted.detach().abs().max()) > 0.1
    assert float((wanted - found).detach().abs().max()) < 0.03
    packed.reset_state()
    assert not packed(torch.arange(20))[0].any()
