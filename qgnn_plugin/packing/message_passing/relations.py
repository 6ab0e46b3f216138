"""Layers with a weight per relation: relations of a graph cached, integer products added up where they are made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch_geometric.typing
from torch import Tensor
from torch_geometric.nn import FastRGCNConv, HANConv, RGATConv, RGCNConv

from ...kernels.aggregate import aggregate
from ...kernels.arithmetic import multiplied
from ...kernels.backend import backend_for
from ...kernels.generated.program import MAX_WIDTH, Node, Operand, Program, Use
from ...kernels.generated.run import row_program
from ...kernels.plan import GraphPlan
from ..layers.matrix import PackedMatrix
from ..layers.ranges import PackedTensor
from ..lazy.deferred import DeferredTensor, materialized
from ..lazy.producers import Producer, with_epilogue
from .han import han
from .nodes import PackedNodes
from .plans import found_by_contents, plan_of
from .rgat import rgat

__all__ = ["own_form"]

Form = Callable[..., Any]
FLOAT_BITS = 32


def own_form(forward: Callable[..., Any]) -> Form | None:
    """What computes a ``forward`` of PyG in fewer passes; it gives nothing for arguments that it does not take."""
    return _FORMS.get(forward)


def edges_by_relation(edge_index: Tensor, edge_type: Tensor, num_relations: int) -> list[Tensor]:
    """The edges of each relation, in order; the same tensors while ``edge_index`` and ``edge_type`` hold the same."""

    def build() -> list[Tensor]:
        return [edge_index[:, edge_type == relation] for relation in range(num_relations)]

    return found_by_contents((edge_index, edge_type), ("relations", num_relations), build)


def rgcn(layer: Any, x: Any, edge_index: Any, edge_type: Any = None) -> Tensor | None:
    r"""RGCNConv: :math:`\sum_r \left( \mathrm{mean}_{j \in N_r(i)} x_j \right) W_r + x_i W_0 + b`.

    Term by term as PyG's own, in the same order, each added by the product that makes it.
    """
    x_l, x_r = x if isinstance(x, tuple) else (x, x)
    tensors = (x_l, x_r, edge_index, edge_type)
    if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors):
        return None
    if not (x_l.is_floating_point() and x_r.is_floating_point()) or torch_geometric.typing.WITH_SEGMM:
        return None
    terms = _Terms(layer)
    if terms.weight is None or not terms.are_packed:
        return None
    size = (x_l.size(0), x_r.size(0))
    if layer.num_bases is not None and layer.num_bases < layer.num_relations:
        term = _by_bases(layer, x_l, edge_index, edge_type, size)
        if term is not None:
            return terms.with_term(term).finished(x_r)
    relations = edges_by_relation(edge_index, edge_type, layer.num_relations)
    if sum(edges.size(1) for edges in relations) != edge_index.size(1):
        return None  # relations that there are not, which its own code refuses
    sent = _sent(layer, x_l) if _is_sum(layer, RGCNConv) else None
    for relation, edges in enumerate(relations):
        if sent is None:
            h = layer.propagate(edges, x=x_l, edge_type_ptr=None, size=size)
        else:
            h = _summed(*sent, plan_of(edges, size, layer.flow), layer.aggr == "mean")
        terms.add_relation(h, relation)
    return terms.finished(x_r)


def fast_rgcn(layer: Any, x: Any, edge_index: Any, edge_type: Any = None) -> Tensor | None:
    r"""FastRGCNConv: the same sum, where PyG multiplies every edge by a weight of its own.

    Sums of a relation's packed sources are multiplied, so that there is one product per node and relation; its message
    multiplies in floats, and so does this: results agree to float32 rounding.
    """
    x_l, x_r = x if isinstance(x, tuple) else (x, x)
    tensors = (x_l, x_r, edge_index, edge_type)
    if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors):
        return None
    if not (x_l.is_floating_point() and x_r.is_floating_point()):
        return None
    if not _is_sum(layer, FastRGCNConv):
        return None
    relations = edges_by_relation(edge_index, edge_type, layer.num_relations)
    if sum(edges.size(1) for edges in relations) != edge_index.size(1):
        return None  # relations that there are not, which its own code refuses
    terms = _Terms(layer, in_floats=True)
    sent = layer.quantized_arguments({"x": x_l})["x"] if terms.are_packed else None
    if not isinstance(sent, PackedNodes) or layer.node_dim not in (0, -x_l.dim()):
        return None
    packed, size = sent.packed, (x_l.size(0), x_r.size(0))
    for relation, edges in enumerate(relations):
        plan = plan_of(edges, size, layer.flow)
        share = plan.degree.clamp(min=1).reciprocal() if layer.aggr == "mean" else None
        terms.add_relation(_aggregated(packed, plan, share), relation)
    return terms.finished(x_r)


def _aggregated(sent: PackedTensor, plan: GraphPlan, share: Tensor | None) -> Producer:
    """Sums of packed sources, by a factor ``[N]`` per row."""

    def run(start: int, stop: int, **out: Any) -> Any:
        return aggregate(
            sent.words, plan.rows(start, stop), sent.scale, sent.lower, sent.num_features, sent.bits,
            dst_scale=None if share is None else share[start:stop], multiplier=sent.multiplier, **out,
        )  # fmt: skip

    return Producer(plan.num_dst, sent.num_features, plan.device, run)


def _by_bases(layer: Any, x: Tensor, edge_index: Tensor, edge_type: Tensor, size: tuple[int, int]) -> Producer | None:
    r"""The sum over relations with weights of few bases, :math:`W_r = \sum_b a_{rb} V_b`, by bases:

    .. math:: \sum_b \left( \sum_{r, j \in N_r(i)} \frac{a_{rb}}{|N_r(i)|} x_j \right) V_b

    One kernel for the sums of all relations and bases, and a product for each basis in the place of one for each
    relation; floats are added in another order.  :obj:`None` where no kernel does it.
    """
    sent = _sent(layer, x) if _is_sum(layer, RGCNConv) else None
    if sent is None or edge_type.numel() == 0:
        return None
    operand, held = sent
    comp, count, width = layer.comp.detach(), layer.num_bases, operand.width
    weighted = found_by_contents(
        (edge_index, edge_type, comp), ("bases", size, layer.flow, layer.aggr),
        lambda: _weighted_by_bases(layer, edge_index, edge_type, comp, size),
    )  # fmt: skip
    if weighted is None:
        return None
    plan, weights = weighted
    nodes = [Node("load", (), width, 0)]
    for basis in range(count):
        weight = Node("load", (), 1, basis + 1)
        product = Node("mul", (Use(0), Use(len(nodes), "repeat")), width)
        nodes += [weight, product, Node("sum", (Use(len(nodes) + 1),), width, is_row=True)]
    program = Program((operand, *(Operand("edge", 1),) * count), tuple(nodes), tuple(range(3, 3 * count + 1, 3)))
    bases = layer._dequantized("weight") if "weight" in layer._shapes else layer.weight.detach()

    def run(start: int, stop: int, addend: Tensor | None = None, **out: Any) -> Any:
        edges = plan.edges(start, stop)
        given = [held, *((weight[edges],) for weight in weights)]
        sums = row_program(program, plan.rows(start, stop).in_order, given)
        y = sums[0].new_zeros((stop - start, layer.out_channels)) if addend is None else addend
        for h, basis in zip(sums, bases, strict=True):
            y.addmm_(h, basis)
        return with_epilogue(y, **out)

    return Producer(size[1], layer.out_channels, x.device, run, is_fused=False, adds=True)


def _weighted_by_bases(
    layer: Any, edge_index: Tensor, edge_type: Tensor, comp: Tensor, size: tuple[int, int]
) -> tuple[GraphPlan, list[Tensor]] | None:
    """The edges in the order of targets, and what each weighs in each basis, ``[E, 1]``; :obj:`None` of relations that
    there are not.
    """
    if int(edge_type.min()) < 0 or int(edge_type.max()) >= len(comp):
        return None
    given = plan_of(edge_index, size, layer.flow)
    kinds = given.sort(edge_type)
    weights = comp[kinds]
    if layer.aggr == "mean":
        pair = given.dst * len(comp) + kinds
        weights = weights / torch.bincount(pair, minlength=len(comp) * given.num_dst)[pair].view(-1, 1)
    return GraphPlan(given.rowptr, given.col, given.num_src), [w.contiguous().view(-1, 1) for w in weights.t()]


def _is_sum(layer: Any, cls: Any) -> bool:
    """Whether what reaches a node is the sum, or the mean, of what ``cls`` sends; not where a user's class, or a
    correction of the change that propagation makes, comes in between.
    """
    own: Any = type(layer).float_class
    plain = all(getattr(own, name) is getattr(cls, name) for name in ("message", "aggregate", "update"))
    return plain and layer.aggr in ("mean", "add", "sum") and not (layer._smp is not None and layer._is_smoothing)


def _sent(layer: Any, x: Tensor) -> tuple[Operand, tuple[Tensor, ...]] | None:
    """Packed features as a kernel on the CPU reads them, and its arrays; :obj:`None` where they are not packed so."""
    if x.dim() != 2 or backend_for(x.device) != "cpu" or layer.node_dim not in (0, -2):
        return None
    sent = layer.quantized_arguments({"x": x})["x"]
    if not isinstance(sent, PackedNodes) or sent.packed.num_features > MAX_WIDTH:
        return None
    packed = sent.packed
    scale, lower, ranges = packed.scale, packed.lower, "row"
    if packed.multiplier is not None:
        if scale.numel() != 1:
            return None
        scale, lower = multiplied(scale, lower, packed.multiplier)
    elif scale.numel() == 1:
        ranges = "tensor"
    elif scale.dim() == 1:
        ranges = "column"
    elif scale.size(1) != 1:
        return None
    operand = Operand("source", packed.num_features, packed.bits, ranges)
    return operand, (packed.words, scale.reshape(-1), lower.reshape(-1))


def _summed(operand: Operand, held: tuple[Tensor, ...], plan: GraphPlan, is_mean: bool) -> Producer:
    """Sums, or means, of what sources send, bit for bit those of the traced message: in the order of the edges."""
    width, program = operand.width, _sum_of(operand)
    share = plan.degree.clamp(min=1).view(-1, 1) if is_mean else None

    def run(start: int, stop: int, **out: Any) -> Any:
        (y,) = row_program(program, plan.rows(start, stop), [held])
        return with_epilogue(y if share is None else y.div_(share[start:stop]), **out)

    return Producer(plan.num_dst, width, plan.device, run, is_fused=False)


@functools.lru_cache(maxsize=64)
def _sum_of(operand: Operand) -> Program:
    width = operand.width
    return Program((operand,), (Node("load", (), width), Node("sum", (Use(0),), width, is_row=True)), (1,))


class _Terms:
    """The sum over relations, each term made by blocks of rows when the sum is.

    ``in_floats`` the features are as they are sent, not quantized before they are mapped.
    """

    def __init__(self, layer: Any, in_floats: bool = False) -> None:
        self.layer = layer
        self.terms: list[Producer] = []
        self.held_bits = 0  # per node and feature, of codes that terms hold
        self.weight = layer._quantized_weight("weight") if "weight" in layer._shapes else None
        self.root = layer._equal_parts("root", 1)[0] if "root" in layer._shapes else None
        self.composed: Tensor | None = None
        if layer.num_bases is not None:
            weight = self._values().view(layer.num_bases, -1)
            self.composed = (layer.comp @ weight).view(layer.num_relations, layer.in_channels_l, layer.out_channels)
        elif layer.num_blocks is not None or in_floats:
            self.composed = self._values()

    def _values(self) -> Tensor:
        return self.layer.weight.detach() if self.weight is None else self.layer._dequantized("weight")

    def with_term(self, term: Producer) -> _Terms:
        self.terms.append(term)
        return self

    def finished(self, x: Tensor) -> Tensor | None:
        """With the targets' own term and the bias."""
        if self.root is not None:
            self.add(x, "root", self.root)
        if not self.terms:
            return None
        total, bias = functools.reduce(Producer.plus, self.terms), self.layer.bias
        return self.layer.deferred(total if bias is None else total.then(lambda y: y.add_(bias)))

    @property
    def are_packed(self) -> bool:
        return all(matrix is None or isinstance(matrix, PackedMatrix) for matrix in (self.weight, self.root))

    def add_relation(self, h: Tensor | Producer, relation: int) -> None:
        if self.composed is None:
            return self.add(h, "weight", self.layer._equal_parts("weight", self.layer.num_relations)[relation])
        width = self.layer.out_channels
        return self._put(_mapped(_producer(h), self.composed[relation], width, self.layer.num_blocks is not None))

    def add(self, x: Tensor | Producer, name: str, matrix: PackedMatrix) -> None:
        """``x W^T``, of integers."""
        site = f"{name}_input_quantizer"
        taken = self.layer._modules[site].of(x) if isinstance(x, Producer) else self.layer._taken(x, site)
        product = matrix.product(taken, None)
        self._put(Producer.of(matrix.times(taken)) if product is None else product)
        self.held_bits += FLOAT_BITS if product is None else getattr(taken, "bits", FLOAT_BITS)

    def _put(self, term: Producer) -> None:
        self.terms.append(term)
        if self.held_bits > FLOAT_BITS:  # codes of many relations take more than their sum does
            self.terms, self.held_bits = [Producer.of(functools.reduce(Producer.plus, self.terms)())], 0


def _producer(h: Tensor | Producer) -> Producer:
    if isinstance(h, Producer):
        return h
    if isinstance(h, DeferredTensor) and h.pending.value is None:
        return h.pending.composed()
    return Producer.of(materialized(h))


def _mapped(h: Producer, weight: Tensor, width: int, is_blocks: bool) -> Producer:
    """``h W`` in floats, with ``W`` [in, out], or of diagonal blocks [B, in / B, out / B]."""

    def run(start: int, stop: int, addend: Tensor | None = None, **out: Any) -> Any:
        rows = h.run(start, stop)
        if is_blocks:
            y = rows.new_zeros((rows.size(0), width)) if addend is None else addend
            _by_block(y, weight).baddbmm_(_by_block(rows, weight), weight)
            return with_epilogue(y, **out)
        return with_epilogue(rows @ weight if addend is None else addend.add_(rows @ weight), **out)

    return Producer(h.num_rows, width, h.device, run, is_fused=False, adds=True)


def _by_block(rows: Tensor, weight: Tensor) -> Tensor:
    """The features of ``[N, F]`` by diagonal block, ``[B, N, F / B]``, in the same memory."""
    return rows.view(rows.size(0), weight.size(0), -1).transpose(0, 1)


_FORMS: dict[Callable[..., Any], Form] = {
    RGCNConv.forward: rgcn, FastRGCNConv.forward: fast_rgcn, HANConv.forward: han, RGATConv.forward: rgat,
}  # fmt: skip
