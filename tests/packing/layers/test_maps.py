"""Packed linear maps by type: the converted layer's numbers, however the rows of the types lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import HeteroLinear

import qgnn_plugin as qgnn
from qgnn_plugin.packing.lazy import sizes

ROWS, WIDTH, OUT, TYPES = 90, 16, 6, 4

ORDERS = {
    "stretches": torch.arange(TYPES).repeat_interleave(ROWS // TYPES + 1)[:ROWS],
    "stretches again": torch.arange(TYPES).repeat_interleave(9).repeat(3)[:ROWS],
    "mixed": torch.randint(TYPES, (ROWS,), generator=torch.Generator().manual_seed(1)),
    "one": torch.full((ROWS,), 2),
    "without the first": 1 + torch.arange(ROWS) % (TYPES - 1),
}


class ByType(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.lin = HeteroLinear(WIDTH, OUT, TYPES, bias=bias)

    def forward(self, x: Tensor, type_vec: Tensor) -> Tensor:
        return self.lin(x, type_vec)


def features() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, WIDTH, generator=generator) * torch.rand(ROWS, 1, generator=generator) ** 4


def converted(granularity: str, bias: bool = True, bits: int = 4) -> nn.Module:
    torch.manual_seed(0)
    config = qgnn.QuantConfig(bits=bits, granularity=granularity)
    qmodel = qgnn.quantize_model(ByType(bias).eval(), config=config)
    return qgnn.calibrate(qmodel, [(features(), ORDERS["mixed"])]).eval()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("granularity", ["row", "tensor", "node"])
@torch.no_grad()
def test_packed_maps_by_type_are_the_converted_ones(granularity: str, order: str) -> None:
    qmodel, x, type_vec = converted(granularity), features(), ORDERS[order]
    packed = qgnn.pack_model(qmodel)
    assert torch.equal(packed(x, type_vec), qmodel(x, type_vec))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_each_row_has_the_map_of_its_type(order: str, bias: bool) -> None:
    qmodel, x, type_vec = converted("row", bias), features(), ORDERS[order]
    packed = qgnn.pack_model(qmodel)
    together = packed(x, type_vec)
    alone = torch.cat([packed(x[k : k + 1], type_vec[k : k + 1]) for k in range(ROWS)])
    assert torch.equal(together, alone)


@torch.no_grad()
def test_no_rows_have_no_result() -> None:
    packed = qgnn.pack_model(converted("row"))
    assert packed(features()[:0], ORDERS["mixed"][:0]).shape == (0, OUT)


@torch.no_grad()
def test_types_of_another_length_are_refused() -> None:
    packed = qgnn.pack_model(converted("row"))
    with pytest.raises(ValueError, match=r"Expected features \[N, F\] and types \[N\] at 'lin'"):
        packed(features(), ORDERS["mixed"][:-1])


@torch.no_grad()
def test_numbers_that_are_written_later_are_those_that_are_used() -> None:
    """Parts of the weight are kept from call to call, as long as they hold what they held."""
    qmodel, x, type_vec = converted("row"), features(), ORDERS["stretches"]
    packed, fresh = qgnn.pack_model(qmodel), qgnn.pack_model(qmodel)
    before = packed(x, type_vec)
    state = {name: value.clone() for name, value in packed.state_dict().items()}
    for name, value in state.items():
        if name.endswith(("weight_quantizer.scale", "bias")):
            value *= 3
        elif name.endswith("words"):
            value.copy_(value.flip(0))
    for model in (packed, fresh):
        model.load_state_dict(state)
    after = packed(x, type_vec)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(x, type_vec))
    packed.lin.bias.data += 1
    torch.testing.assert_close(packed(x, type_vec), after + 1)


class Cell(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        out = self.cell(x, h)
        return torch.cat(out, dim=1) if isinstance(out, tuple) else out


@pytest.mark.parametrize("make", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
@torch.no_grad()
def test_cells_by_blocks_of_rows(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = features().repeat(3, 1)
    qmodel = qgnn.calibrate(qgnn.quantize_model(Cell(make(WIDTH, 8)).eval(), bits=4), [(x,)], method="ranges").eval()
    packed = qgnn.pack_model(qmodel)
    expected = packed(x)
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * 4 * 8)
    assert torch.equal(packed(x), expected)
    assert torch.equal(expected, qmodel(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.GRU(WIDTH, 8, batch_first=True),
        nn.RNN(WIDTH, 8, nonlinearity="relu", bidirectional=True),
        nn.LSTM(WIDTH, 8, num_layers=2, bidirectional=True, batch_first=True),
        nn.LSTM(WIDTH, 8, proj_size=4),
    ],
    ids=lambda layer: f"{layer.mode}-{layer.num_layers}",
)
@torch.no_grad()
def test_sequences_by_blocks_of_them(layer: nn.RNNBase, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, batch = 3, 270
    x = features().repeat(3, 1).unsqueeze(0) * torch.tensor([1.0, -1.0, 0.5]).view(steps, 1, 1)
    x = x.transpose(0, 1).contiguous() if layer.batch_first else x
    runs = layer.num_layers * (2 if layer.bidirectional else 1)
    state: Any = tuple(
        torch.randn(runs, batch, width, generator=torch.Generator().manual_seed(width))
        for width in [layer.proj_size or 8, 8]
    )
    state = state if layer.mode == "LSTM" else state[0]
    qmodel = qgnn.calibrate(qgnn.quantize_model(layer.eval(), bits=4), [(x, state)], method="ranges").eval()
    packed = qgnn.pack_model(qmodel)

    def results(model: nn.Module) -> list[Tensor]:
        found = []
        for out, end in (model(x), model(x, state)):
            found += [out, *(end if isinstance(end, tuple) else (end,))]
        return found

    expected = results(packed)
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * 4 * 8 * steps)
    for one, two, three in zip(results(packed), expected, results(qmodel), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(two, three)
    with pytest.raises(ValueError, match="Expected a state of the shape"):
        packed(x, tuple(s[:, 1:] for s in state) if isinstance(state, tuple) else state[:, 1:])


class Attends(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.attention(x, other, other, need_weights=False)[0]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_blocks_of_samples(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding of each sample, keys that are no queries, a mask of all samples; hooks see all samples at once."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, 4, batch_first=True).eval()
    x, other = torch.randn(7, 5, WIDTH), torch.randn(7, 9, WIDTH)
    qmodel = qgnn.calibrate(qgnn.quantize_model(Attends(layer), bits=4), [(x, other)], method="ranges").eval()
    packed = qgnn.pack_model(qmodel).attention
    padding = torch.rand(7, 9) < 0.3
    padding[:, 0] = False
    more = {"key_padding_mask": padding, "attn_mask": torch.randn(5, 9)} if masked else {}
    calls: list[int] = []
    attended = type(packed)._attended

    def counted(self: nn.Module, query: Tensor, *args: object, **kwargs: object) -> object:
        calls.append(query.size(0))
        return attended(self, query, *args, **kwargs)

    monkeypatch.setattr(type(packed), "_attended", counted)
    with torch.no_grad():
        for inputs in ((x, other, other), (x, x, x)):
            given = more if inputs[1] is other else {}
            whole = packed(*inputs, need_weights=False, **given)[0]
            monkeypatch.setattr(sizes, "BLOCK_FLOATS", 2 * WIDTH * sum(t.size(1) for t in inputs))
            parts = packed(*inputs, need_weights=False, **given)[0]
            assert calls == [7, 2, 2, 2, 1]
            torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
            calls.clear()
            assert packed(*inputs, need_weights=True, **given)[1] is not None
            handle = packed.out_proj.register_forward_hook(lambda module, args, out: None)
            packed(*inputs, need_weights=False, **given)
            handle.remove()
            assert calls == [7, 7]
            calls.clear()
            monkeypatch.setattr(sizes, "BLOCK_FLOATS", 1 << 19)


class Tables(nn.Module):
    """What models do with tables: look-ups of few kinds, of few of many rows, and slices of the table itself."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.nodes = nn.Embedding(7, 16, padding_idx=2), nn.Embedding(900, 16, padding_idx=5)
        self.lin = nn.Linear(16, 8)

    def forward(self, kind: Tensor, node: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone()
        x += self.kinds(kind)
        part = self.nodes.weight[4:800]
        taken = (part.index_select(0, node % 700), self.nodes.weight[node], F.embedding(node, self.nodes.weight))
        mapped = self.lin(self.kinds(kind).relu()) + self.lin(self.nodes(node[: kind.numel()]))[: kind.numel()].sum()
        return (x, mapped, self.nodes(node), part, *taken)


@pytest.mark.parametrize("rows", [6, 850])
def test_look_ups_of_tables_are_those_of_the_converted_model(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(sizes, "BLOCK_FLOATS", 64 * 16)
    torch.manual_seed(0)
    kind, node, x = torch.arange(rows) % 7, torch.arange(rows) % 900, torch.randn(rows, 16)
    qmodel = qgnn.quantize_model(Tables().eval(), bits=4)
    qgnn.calibrate(qmodel, [(kind, node, x)], method="ranges")
    packed = qgnn.pack_model(qmodel.eval())
    with torch.no_grad():
        for given in ((kind, node, x), (kind.flip(0), node.flip(0), x)):
            for found, expected in zip(packed(*given), qmodel(*given), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for wrong in (node - 1, node + 900):
            with pytest.raises(IndexError):
                packed(kind, wrong, x)


def test_slices_and_rows_of_a_table_dequantize_no_others() -> None:
    qmodel = qgnn.quantize_model(nn.Sequential(nn.Embedding(50, 8)).eval(), bits=4)
    qgnn.calibrate(qmodel, [torch.arange(50)], method="ranges")
    table = qgnn.pack_model(qmodel)[0]
    weight, whole, taken = table.weight, table.weight.clone(), []
    rows = weight.rows
    weight.rows = lambda index: (taken.append(index.tolist()), rows(index))[1]
    part = weight[10:30][5:]
    assert part.shape == (15, 8)
    assert torch.equal(part[torch.tensor([[0, 3]])], whole[torch.tensor([[15, 18]])])
    assert taken == [[15, 18]]
    assert torch.equal(part.mul(1), whole[15:30])
    assert taken[1:] == [list(range(15, 30))]
    assert torch.equal(weight[torch.tensor([-1, 2])], whole[[-1, 2]])
    with pytest.raises(IndexError):
        weight[torch.tensor([50])]
    with pytest.raises(ValueError, match="read only"):
        part.zero_()
