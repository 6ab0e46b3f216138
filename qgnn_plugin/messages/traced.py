"""Message kernels that are found by tracing: what a packed layer asks for each new form of call."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.arithmetic import multiplied
from ..kernels.backend import backend_for
from ..kernels.cpu.memory import empty
from ..kernels.generated.program import Unsupported
from ..kernels.generated.run import NotFinite, can_run, row_program
from ..kernels.plan import GraphPlan
from ..packing.layers.ranges import NOT_FINITE
from ..packing.lazy import sizes
from ..packing.lazy.columns import Late, waits
from ..packing.lazy.deferred import materialized
from ..packing.lazy.producers import Producer, with_epilogue
from ..packing.message_passing.call import NotByRows
from .build import Built, build
from .check import expect_agreement
from .edge_maps import product_arrays
from .evaluate import Values
from .leaves import Leaf, PackedForm
from .shadow import NotTraceable, Snapshot, fingerprint
from .spaces import KERNEL, ROW, Spaces
from .sums import PlainSum
from .trace import Input, Trace, trace

__all__ = ["TracedCalls", "TracedMessage"]

Arrays = tuple[Any, ...]  # of an operand: tensors, or rows of results that are not computed yet

MOST_TRACES = 8  # of one form of call: what changes from call to call is not traced again and again


@dataclass
class TracedMessage:
    """A layer's messages as one kernel.

    Args:
        record: What was recorded.
        spaces: Where its operations are computed.
        built: The kernel.
        inputs: The record's inputs, by its placeholders.
        plain_sum: What it is, if it adds what sources send.
        agrees_late: Whether it was compared with the layer where rows of its operands are computed with the result:
            tracing computes them before.
    """

    record: Trace
    spaces: Spaces
    built: Built
    inputs: dict[fx.Node, Input]
    plain_sum: PlainSum | None = None
    agrees_late: bool = False

    @classmethod
    def of(cls, call: Any) -> TracedMessage:
        """Trace a call.

        Raises:
            NotTraceable, Unsupported: If there is no kernel for it.
        """
        record = trace(call)
        spaces = Spaces(record)
        placeholders = [node for node in record.graph.nodes if node.op == "placeholder"]
        inputs = dict(zip(placeholders, record.inputs, strict=True))
        packed = {node: form for node, i in inputs.items() if (form := _packed_form(call, i)) is not None}
        # Codes of several widths in one sum have no kernel: then sources are read as floats.
        reason: Exception | None = None
        for forms in (packed, {}) if packed else (packed,):
            try:
                built = build(record, spaces, forms)
                why = can_run(built.program, call.plan.device)
                if why is None:
                    return cls(record, spaces, built, inputs, PlainSum.of(record, spaces, built))
                reason = Unsupported(why)
            except Unsupported as error:
                reason = error
        assert reason is not None
        raise reason

    def run(self, call: Any) -> Tensor | Producer:
        """What ``aggregate`` returns; attributes that ``message`` writes are set on the layer.

        Raises:
            NotTraceable: If operands are not computed yet, for the first time, and the result is not the layer's own.
        """
        plan, layer = call.plan, call.layer
        counts = {"source": plan.num_src, "target": plan.num_dst, "edge": plan.num_edges}
        given = {node: _given(call, i) for node, i in self.inputs.items()}
        values = Values(self.record, self.spaces, given, counts, plan.degree)
        arrays = [self._arrays(call, values, leaf) for leaf in self.built.leaves]
        arrays += [product_arrays(lin) for lin in self.built.maps]
        program = self.built.program
        if self.plain_sum is not None:
            producer = self.plain_sum.producer(program, arrays, call, values)
            if producer is not None:
                return producer
        is_late = _are_late(arrays)
        if self.is_by_rows:
            producer = self._by_rows(plan, arrays, values)
            # What the layer has given belongs to it: it may write over that before somebody asks for the result.
            is_given = _are_given(call, self.inputs.values(), arrays)
            return self._agreed(call, producer.whole() if is_given else producer, is_late)
        outs = self._reduced(plan, arrays, values)
        of_edges = outs[len(program.outputs) :]
        for name, node, value in zip(self.record.written, self.spaces.written, of_edges, strict=True):
            setattr(layer, name, value.view(-1, *self.record.shapes[node][1:]))
        del arrays, outs, of_edges
        return self._agreed(call, values.last(self.spaces.output), is_late)

    def _agreed(self, call: Any, result: Tensor | Producer, is_late: bool) -> Tensor | Producer:
        """``result``; compared with the layer's own where its operands are late for the first time."""
        if is_late and not self.agrees_late:
            result = result.whole() if isinstance(result, Producer) else result
            expect_agreement(call, result)
            self.agrees_late = True
        return result

    @cached_property
    def is_by_rows(self) -> bool:
        """Whether the result, of sources and targets, may be made by blocks of rows."""
        program, output = self.built.program, self.spaces.output
        if any(operand.side == "edge" for operand in program.operands) or program.edge_outputs:
            return False
        reduced = {node for node, _ in self.built.results}
        order, stack = set[fx.Node](), [output]
        while stack:
            node = stack.pop()
            if node not in order and node not in reduced and self.spaces.of[node] in (ROW, KERNEL):
                order.add(node)
                stack += node.all_input_nodes
        return len(self.record.shapes[output]) > 1 and all(map(self.spaces.is_row_wise, order))

    def _by_rows(self, plan: GraphPlan, arrays: list[Arrays], values: Values) -> Producer:
        """The result by blocks of rows, for which what targets have may still have to be computed."""
        output, operands = self.spaces.output, self.built.program.operands
        shape = self.record.shapes[output][1:]

        def run(start: int, stop: int, **out: Any) -> Any:
            rows, made = slice(start, stop), dict[int, Tensor]()
            part = values.rows(output, rows)
            given = [
                tuple(t.rows(rows, made) if isinstance(t, Late) else t[rows] for t in held)
                if operand.side == "target" else held
                for operand, held in zip(operands, arrays, strict=False)
            ]  # fmt: skip
            self._reduced(plan.rows(start, stop), [*given, *arrays[len(operands) :]], part)
            return with_epilogue(part.last(output).flatten(1), **out)

        dims = shape if len(shape) > 1 else ()
        return Producer(plan.num_dst, math.prod(shape), plan.device, run, is_fused=False, dims=dims)

    def _reduced(self, plan: GraphPlan, arrays: list[Arrays], values: Values) -> list[Tensor]:
        """Run the kernel, and put its reductions to ``values``; what it gives, these and numbers of edges."""
        try:
            outs = self._by_blocks(plan, arrays) if _are_late(arrays) else row_program(self.built.program, plan, arrays)
        except NotFinite as error:
            where = self.built.maps[error.product].input_quantizer.site
            raise ValueError(NOT_FINITE.format(where=where, found="NaN or infinity")) from None
        by_index = dict(zip(self.built.program.outputs, outs, strict=False))
        for (node, after), index in zip(self.built.results, self.built.indices, strict=True):
            values.put(node, after(by_index[index]), is_own=self.built.indices.count(index) == 1)
        return outs

    def _takes_late(self, rows: Tensor, leaf: Leaf) -> bool:
        """Whether ``rows`` are computed by blocks: of targets where the result is, of edges nobody asks for later."""
        program = self.built.program
        side = program.operands[self.built.leaves.index(leaf)].side
        if side == "target":
            return self.is_by_rows
        alone = side == "edge" and not program.edge_outputs
        many = rows.device.type == "cpu" and rows.numel() > sizes.BLOCK_FLOATS
        return alone and many and Late.of(rows).producer.taken is not None

    def _by_blocks(self, plan: GraphPlan, arrays: list[Arrays]) -> list[Tensor]:
        """What the kernel gives, by blocks of rows for which what their edges have is computed in turn."""
        program = self.built.program
        operands, maps = program.operands, arrays[len(program.operands) :]
        width = max(operand.width for operand in operands if operand.side == "edge")
        goals = torch.arange(0, plan.num_edges, max(1, sizes.BLOCK_FLOATS // width), device=plan.device)
        bounds = [0, *torch.unique(torch.searchsorted(plan.rowptr[1:], goals[1:]) + 1).tolist(), plan.num_dst]
        outs: list[Tensor] = []
        for start, stop in pairwise(dict.fromkeys(bounds)):
            part = plan.rows(start, stop)
            given = [
                tuple(t.take(part.edge_ids) if isinstance(t, Late) else t[part.edge_ids] for t in held)
                if operand.side == "edge" else tuple(t[start:stop] for t in held) if operand.side == "target" else held
                for operand, held in zip(operands, arrays, strict=False)
            ]  # fmt: skip
            found = row_program(program, part.in_order, [*given, *maps])
            outs = outs or [empty((plan.num_dst, out.size(1)), out.dtype) for out in found]
            for out, rows in zip(outs, found, strict=True):
                out[start:stop] = rows
        return outs

    def _arrays(self, call: Any, values: Values, leaf: Leaf) -> Arrays:
        if leaf.is_packed:
            packed = call.end(self.inputs[leaf.node].name).packed
            scale, lower = packed.scale, packed.lower
            if getattr(packed, "multiplier", None) is not None:
                scale, lower = multiplied(scale, lower, packed.multiplier)
            return packed.words, scale.reshape(-1), lower.reshape(-1)
        rows = leaf.rows(values)
        if waits(rows) and rows.dim() == 2 and self._takes_late(rows, leaf):
            return (Late.of(rows),)
        rows = materialized(rows).to(torch.float32)
        return (rows.reshape(rows.size(0), math.prod(rows.shape[1:])).contiguous(),)  # once for all blocks


def _are_given(call: Any, inputs: Iterable[Input], arrays: list[Arrays]) -> bool:
    """Whether a kernel reads memory that the layer has given it, packed features and the layer's own weights aside."""
    if any(described.kind == "other" for described in inputs):
        return True
    sides = [s for value in call.arguments.values() for s in (value if isinstance(value, (tuple, list)) else (value,))]
    given = {_memory(t) for t in sides if isinstance(t, Tensor) and t.layout == torch.strided and not waits(t)}
    return any(_memory(t) in given for held in arrays for t in held if not isinstance(t, Late))


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _are_late(arrays: list[Arrays]) -> bool:
    """Whether rows of an operand are still to be computed."""
    return any(isinstance(t, Late) for held in arrays for t in held)


def _given(call: Any, described: Input) -> Any:
    """What an input of a record holds in a call; packed features as a function that unpacks them."""
    if described.kind in ("source", "target"):
        value = call.end(described.name)
        return value if isinstance(value, Tensor) else value.values
    if described.kind in ("edge", "other"):
        return call.argument(described.name)
    if described.kind == "parameter":
        path, _, name = described.name.rpartition(".")
        module = call.layer.get_submodule(path)
        return module._parameters[name] if name in module._parameters else module._buffers[name]
    if described.kind == "source index":
        return call.edge_index[call.ends[1]]
    return None


def _packed_form(call: Any, described: Input) -> PackedForm | None:
    if described.kind != "source":
        return None
    value = call.end(described.name)
    if isinstance(value, Tensor):
        return None
    packed = value.packed
    scale = packed.scale
    if getattr(packed, "multiplier", None) is not None:
        return PackedForm(packed.bits, "row") if scale.numel() == 1 else None
    if scale.numel() == 1:
        return PackedForm(packed.bits, "tensor")
    if scale.dim() == 1:
        return PackedForm(packed.bits, "column")
    return PackedForm(packed.bits, "row") if scale.size(1) == 1 else None


class TracedCalls:
    """The traces of one form of call of one layer.

    What a trace depends on beside its inputs' values, such as the layer's attributes and the widths of its arguments,
    is compared in every call; where it has changed, the call is traced anew.
    """

    def __init__(self) -> None:
        self.traces: dict[Any, TracedMessage | None] = {}
        self.lock = Lock()
        self.last: tuple[Snapshot, tuple[Any, ...]] | None = None

    def _fingerprint(self, layer: Any) -> tuple[Any, ...]:
        last = self.last
        if last is None or not last[0].holds(layer):
            self.last = last = (Snapshot(layer), fingerprint(layer))
        return last[1]

    def find(self, call: Any) -> TracedMessage:
        """The trace for a call, checked against the layer's own functions where it is new.

        Raises:
            NotTraceable, Unsupported: If there is none.
        """
        with self.lock:
            key = (self._fingerprint(call.layer), _widths(call))
            if key not in self.traces:
                if len(self.traces) >= MOST_TRACES:
                    raise NotTraceable("its attributes change from call to call")
                self.traces[key] = None
                self.traces[key] = _traced(call)
            found = self.traces[key]
        if found is None:
            raise NotTraceable("it could not be traced before")
        return found


def _traced(call: Any) -> TracedMessage:
    """A trace that gives the layer's own results.

    Raises:
        NotTraceable, Unsupported: If there is none.
    """
    if call.plan.num_edges == 0 or backend_for(call.plan.device) == "torch":
        raise NotTraceable("no edges, or no kernels")
    before = dict(call.layer.__dict__)
    try:
        found = TracedMessage.of(call)
        out = found.run(call)
        expect_agreement(call, out.whole() if isinstance(out, Producer) else out)
    except (NotTraceable, Unsupported, NotByRows, ImportError):
        raise
    except Exception as error:  # of a record unlike those that are known here: the layer runs as it is
        raise NotTraceable(f"its record is not understood ({type(error).__name__}: {error})") from error
    finally:
        for name in _written_since(before, call.layer):
            call.layer.__dict__[name] = before[name]
    return found


def _written_since(before: dict[str, Any], layer: Any) -> list[str]:
    """Attributes of ``layer`` that were written to since."""
    return [name for name, value in before.items() if layer.__dict__.get(name) is not value]


def _widths(call: Any) -> tuple[Any, ...]:
    found: list[Any] = []
    for name in call.parameters:
        if name[-2:] in ("_i", "_j"):
            value = call.end(name)
            if hasattr(value, "packed"):
                packed = value.packed
                by_step = getattr(packed, "multiplier", None) is None
                ranges = (tuple(packed.scale.shape[1:]), packed.scale.dim(), by_step)
                found.append((tuple(value.shape[1:]), packed.bits, ranges))
            elif isinstance(value, Tensor):
                found.append((tuple(value.shape[1:]), value.dtype))
            else:
                found.append(None)
        else:
            value = call.arguments.get(name)
            if isinstance(value, Tensor):
                per_edge = call.is_per_edge(value)
                found.append((per_edge, tuple(value.shape[1:] if per_edge else value.shape), value.dtype))
            elif isinstance(value, (bool, int, float, str)):
                found.append(value)
            else:
                found.append(None)
    return tuple(found)
