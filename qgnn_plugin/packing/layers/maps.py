"""Packed recurrent layers, convolutions over a grid, bilinear maps, maps by type, attention and tables."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.aggregate import aggregate
from ...kernels.cpu.memory import empty
from ...layers.bilinear import QuantizedBilinear, QuantizedHeteroLinear, RunsBilinear, RunsHeteroLinear
from ...layers.embedding import QuantizedEmbedding
from ...layers.grid import QuantizedGridConv, RunsGridConv
from ...layers.multihead import PROJECTIONS, QuantizedMultiheadAttention, RunsMultiheadAttention
from ...layers.products import INPUT
from ...layers.recurrent import QuantizedCell, QuantizedRecurrent, RunsCell, RunsSequence
from ...layers.sparse_linear import QuantizedSparseLinear, adjacency_of
from ...layers.watched import is_watched, own_propagate
from ..lazy import sizes
from ..lazy.deferred import materialized
from ..lazy.producers import Producer, row_blocks
from ..lazy.steps import with_epilogue
from .base import LayerSpec, register_packed
from .guard import inference
from .linear import PackedLinear
from .matrix import PackedMatrix
from .ranges import PackedTensor
from .weights import PackedWeights

__all__ = [
    "PackedBilinear",
    "PackedCell",
    "PackedEmbedding",
    "PackedGridConv",
    "PackedHeteroLinear",
    "PackedMultiheadAttention",
    "PackedRecurrent",
    "PackedSparseLinear",
]

GATES = 4  # of an LSTM; others have fewer
MOST_SPANS = 8  # stretches of rows of one type, per type: with more of them rows are put in order first


class PackedCell(RunsCell, PackedWeights):
    """Packed ``GRUCell``, ``LSTMCell`` or ``RNNCell``."""

    @inference
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return self._step(input, hx)

    def _next(self, kind: str, x: Any, h: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """By blocks of rows, whose gates stay in the cache."""
        num_rows = state[0].size(0)
        blocks = list(row_blocks(num_rows, GATES * self.hidden_size, state[0].device))
        if len(blocks) == 1 or not (isinstance(x, PackedTensor) and isinstance(h, PackedTensor)):
            return super()._next(kind, x, h, state)
        state = tuple(materialized(part) for part in state)
        outs = tuple(torch.empty_like(part) for part in state)
        for rows in blocks:
            own, before = (x.rows(rows.start, rows.stop), h.rows(rows.start, rows.stop)), tuple(s[rows] for s in state)
            for out, part in zip(outs, super()._next(kind, *own, before), strict=True):
                out[rows] = part
        return outs

    @classmethod
    def _returns_tuples(cls, layer: Any) -> bool:
        return isinstance(layer, torch.nn.LSTMCell)


class PackedRecurrent(RunsSequence, PackedWeights):
    """Packed ``GRU``, ``LSTM`` or ``RNN``."""

    @classmethod
    def kept(cls, layer: Any) -> dict[str, Any]:
        return {**super().kept(layer), "_flat_weights": [], "_flat_weight_refs": []}

    @inference
    def forward(self, input: Any, hx: Any = None) -> Any:
        out = self._by_sequences(input, hx)
        return self._sequence(input, hx) if out is None else out

    def _by_sequences(self: Any, input: Any, hx: Any) -> tuple[Tensor, Any] | None:
        """The result by blocks of sequences, whose gates stay in the cache; :obj:`None` where one has all."""
        if torch.compiler.is_compiling() or not isinstance(input, Tensor) or input.dim() != 3:
            return None
        axis = 0 if self.batch_first else 1
        batch, gates = input.size(axis), 2 * GATES * self.hidden_size * input.size(1 - axis)  # and the states
        blocks = list(row_blocks(batch, gates, input.device))
        sites = [site for name, site in self._modules.items() if not name.startswith("weight")]
        if len(blocks) == 1 or not all(site.spec.is_row_local for site in sites):
            return None
        input = materialized(input)
        state = None if hx is None else tuple(map(materialized, self._initial(hx, input, batch, None)))
        outs: list[Tensor] = []  # what it gives, and the state at the end
        for rows in blocks:
            part = None if state is None else tuple(s[:, rows] for s in state)
            y, end = self._sequence(input.narrow(axis, rows.start, rows.stop - rows.start), part)
            found = [(y, axis), *((one, 1) for one in (end if isinstance(end, tuple) else (end,)))]
            outs = outs or [one.new_empty((*one.shape[:dim], batch, *one.shape[dim + 1 :])) for one, dim in found]
            for out, (one, dim) in zip(outs, found, strict=True):
                out.narrow(dim, rows.start, rows.stop - rows.start).copy_(one)
        return outs[0], self._final(tuple(outs[1:]), None)

    @classmethod
    def _returns_tuples(cls, layer: Any) -> bool:
        return True

    # Of what float layers keep for cuDNN there is nothing.

    def _init_flat_weights(self) -> None:
        self.__dict__ |= {"_flat_weights": [], "_flat_weight_refs": []}

    def flatten_parameters(self) -> None:
        """Nothing: there are no float weights to lay out."""


class PackedGridConv(RunsGridConv, PackedWeights):
    """Packed ``Conv1d`` or ``Conv2d``."""

    @inference
    def forward(self, input: Tensor) -> Tensor:
        return self._convolved(input)


class PackedBilinear(RunsBilinear, PackedWeights):
    """Packed :class:`torch.nn.Bilinear`."""

    @inference
    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return self._product(input1, input2)


class PackedHeteroLinear(RunsHeteroLinear, PackedWeights):
    """Packed :class:`torch_geometric.nn.HeteroLinear`."""

    @inference
    def forward(self, x: Tensor, type_vec: Tensor) -> Tensor:
        return self._by_type(x, type_vec)

    def _by_type(self: Any, x: Tensor, type_vec: Tensor) -> Tensor:
        """Rows are quantized all at once, as each has its codes to itself, and multiplied where they lie."""
        if torch.compiler.is_compiling() or not self._modules[INPUT].spec.is_row_local or x.dim() != 2:
            return super()._by_type(x, type_vec)
        if type_vec.shape != x.shape[:1] or type_vec.dtype is not torch.int64 or x.size(0) == 0:
            return super()._by_type(x, type_vec)
        taken, width, parts = self._taken(x, INPUT), self.out_channels, self._parts_by_type()
        if not isinstance(taken, PackedTensor):
            return super()._by_type(x, type_vec)
        firsts, order = _spans(type_vec), None
        if len(firsts) > MOST_SPANS * self.num_types:
            order = type_vec.argsort(stable=True)
            type_vec, taken = type_vec[order], taken.take(order)
            firsts = _spans(type_vec)
        out = empty((x.size(0), width), x.dtype) if x.is_cpu else x.new_empty(x.size(0), width)
        kinds = type_vec[torch.tensor(firsts, device=x.device)].tolist()
        for kind, start, stop in zip(kinds, firsts, [*firsts[1:], x.size(0)], strict=True):
            y = self._times(taken.rows(start, stop), *parts[kind])
            if order is None:
                out[start:stop] = y
            else:
                out.index_copy_(0, order[start:stop], y)
        return out

    def _parts_by_type(self: Any) -> list[tuple[PackedMatrix | Tensor, Tensor | None]]:
        """Weight and bias of each type."""
        weights, last = self._equal_parts("weight", self.num_types), self._packed.last
        if self.bias is None:
            return [(weight, None) for weight in weights]
        known = last.parts.get("bias")
        if known is None or known[0][0] is not self.bias:
            known = last.parts["bias"] = ((self.bias,), list(self.bias))
        return list(zip(weights, known[1], strict=True))


def _spans(type_vec: Tensor) -> list[int]:
    """The first row of each stretch of rows of one type."""
    changes = (type_vec[1:] != type_vec[:-1]).nonzero().view(-1) + 1
    return [0, *changes.tolist()]


class PackedMultiheadAttention(RunsMultiheadAttention, PackedWeights):
    """Packed :class:`torch.nn.MultiheadAttention`: all four projections are packed."""

    @inference
    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self._by_samples(query, key, value, *args, **kwargs)
        return self._attended(query, key, value, *args, **kwargs) if out is None else (out, None)

    def _by_samples(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Tensor | None:
        """The result by blocks of samples, whose projections stay in the cache; :obj:`None` where one has all."""
        inputs, out_proj = (query, key, value), self.out_proj
        if torch.compiler.is_compiling() or need_weights or not self.batch_first or query.device.type != "cpu":
            return None
        if any(x.is_nested or x.dim() != 3 or x.size(0) != query.size(0) for x in inputs):
            return None
        if attn_mask is not None and attn_mask.dim() != 2:
            return None
        sites = [self._modules.get(name) for name in (INPUT, *(f"{name}_quantizer" for name in PROJECTIONS))]
        if not isinstance(out_proj, PackedLinear) or out_proj._is_seen:
            return None
        if any(s is not None and not s.spec.is_row_local for s in (*sites, out_proj.input_quantizer)):
            return None
        each = sum(x.size(1) for x in inputs) * self.embed_dim
        step = max(1, sizes.BLOCK_FLOATS // max(1, each))
        if query.size(0) <= step:
            return None
        out = query.new_empty(query.shape)
        for start in range(0, query.size(0), step):
            rows = slice(start, start + step)
            held = {id(x): x[rows] for x in inputs}  # what is given twice is quantized once
            mask = None if key_padding_mask is None else key_padding_mask[rows]
            part = self._attended(*(held[id(x)] for x in inputs), mask, False, attn_mask, is_causal=is_causal)
            out[rows] = materialized(part[0])
        return out

    @classmethod
    def _returns_tuples(cls, layer: Any) -> bool:
        return True


class PackedEmbedding(PackedWeights):
    """Packed :class:`torch.nn.Embedding`: a look-up dequantizes the rows that it takes."""

    padding_row: Tensor | None
    padding_idx: int | None
    num_embeddings: int
    embedding_dim: int
    max_norm: float | None
    norm_type: float

    def freeze(self: Any, layer: Any, spec: LayerSpec) -> None:
        super().freeze(layer, spec)
        row = None
        if layer.padding_idx is not None:
            row = torch.zeros(layer.embedding_dim, dtype=torch.float32, device=layer.weight.device)
        self.register_buffer("padding_row", row)

    @torch.no_grad()
    def fill(self, layer: Any) -> None:
        weight = layer.weight.detach()
        if layer.max_norm is not None:  # as each row would be before it is taken
            weight = weight.clone()
            F.embedding(torch.arange(len(weight), device=weight.device), weight, None, layer.max_norm, layer.norm_type)
        target = self.get_submodule("weight_quantizer")
        target.fill(weight, layer.weight_quantizer(weight))
        if self.padding_row is not None:
            self.padding_row.copy_(weight[self.padding_idx])

    @inference
    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"Expected indices into a table (got {input.dtype}); convert them with .long()")
        index = input.reshape(-1).long()
        if index.numel() and not torch.compiler.is_compiling() and not input.is_cuda:
            low, high = map(int, index.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(
                    f"Expected indices of 0 to {self.num_embeddings - 1} at '{self._qualified_name}' (got {low} to "
                    f"{high})"
                )
        is_one_block = index.numel() * self.embedding_dim <= sizes.BLOCK_FLOATS // 2
        # Of more rows than there are, as types of edges are, the table of floats is the smaller part.
        is_plain = is_one_block or index.numel() > self.num_embeddings or input.is_cuda
        if input.dim() != 1 or is_plain or torch.compiler.is_compiling():
            return self._rows(index).view(*input.shape, self.embedding_dim)
        return self.deferred(self._looked_up(index.clone()))

    def _looked_up(self, index: Tensor) -> Producer:
        """The rows numbered by ``index``, by blocks."""

        def run(start: int, stop: int, **out: Any) -> Any:
            return with_epilogue(self._rows(index[start:stop]), **out)

        def taken(rows: Tensor) -> Producer:
            return self._looked_up(index[rows])

        return Producer(index.numel(), self.embedding_dim, index.device, run, is_fused=False, taken=taken)

    def _dequantized(self, name: str) -> Tensor:
        return self._rows(None)

    def _stand_in(self, name: str) -> Tensor:
        weight = super()._stand_in(name)
        weight.rows = self._rows  # type: ignore[attr-defined]
        return weight

    def _rows(self, index: Tensor | None) -> Tensor:
        if index is not None and index.numel() > self.num_embeddings:  # types of edges, and the like
            return self._rows(None).index_select(0, index)
        table = self._quantized_weight("weight")
        assert isinstance(table, PackedMatrix)
        values = (table.packed if index is None else table.packed.take(index)).dequantize()
        if self.padding_row is not None and self.padding_idx is not None:
            taken = torch.arange(len(values), device=values.device) if index is None else index
            values[taken == self.padding_idx] = self.padding_row
        return values


class PackedSparseLinear(PackedWeights):
    """Packed ``SparseLinear`` of LINKX: sums of packed rows of its weight."""

    bias: Tensor | None

    @inference
    def forward(self, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
        table = self._quantized_weight("weight")
        assert isinstance(table, PackedMatrix)
        if is_watched(self):
            values = self._dequantized("weight")
            out = own_propagate(self)(self, edge_index, weight=values, edge_weight=edge_weight)
            return out if self.bias is None else out + self.bias
        graph = adjacency_of(self, edge_index, edge_weight)
        rows, weight = table.packed, graph.weight
        return aggregate(
            rows.words, graph.plan, rows.scale, rows.lower, rows.num_features, rows.bits, edge_weight=weight,
            bias=self.bias,
        )  # fmt: skip


for _mixin, _packed in {
    QuantizedCell: PackedCell,
    QuantizedRecurrent: PackedRecurrent,
    QuantizedGridConv: PackedGridConv,
    QuantizedBilinear: PackedBilinear,
    QuantizedHeteroLinear: PackedHeteroLinear,
    QuantizedMultiheadAttention: PackedMultiheadAttention,
    QuantizedEmbedding: PackedEmbedding,
    QuantizedSparseLinear: PackedSparseLinear,
}.items():
    register_packed(_mixin, _packed)
