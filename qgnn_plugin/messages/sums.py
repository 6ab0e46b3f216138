"""Messages that are what sources send, as it is: their sum or mean is made by blocks of rows, and only when needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.generated.program import Program
from ..kernels.generated.run import row_program
from ..kernels.plan import GraphPlan
from ..packing.lazy.producers import Producer, with_epilogue
from .build import Built
from .evaluate import Values
from .spaces import ROW, Spaces
from .trace import Trace

__all__ = ["PlainSum"]

aten = torch.ops.aten
Arrays = list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class PlainSum:
    r""":math:`\sum_j x_j`, over a number per target: rows depend on sources alone.

    Floats are added in the order of the layer's own sum, and divided as it does, so that results are bit for bit those
    of the converted layer.

    Args:
        divisor: Of the record, ``[N, 1]`` or that spread over the features; :obj:`None` for a sum.
    """

    divisor: fx.Node | None

    @classmethod
    def of(cls, record: Trace, spaces: Spaces, built: Built) -> PlainSum | None:
        """The sum that a record is; :obj:`None` where it is something else."""
        program, output = built.program, spaces.output
        if len(program.outputs) != 1 or program.edge_outputs or program.products or len(built.results) != 1:
            return None
        if any(operand.side not in ("source", "constant") for operand in program.operands):
            return None
        total, result = program.nodes[program.outputs[0]], built.results[0][0]
        if total.op != "sum" or total.args[0].mode != "full" or len(record.shapes[result]) != 2:
            return None
        term = program.nodes[total.args[0].node]
        if term.op != "load" or not built.leaves[int(term.value)].is_packed:
            return None
        if output is result:
            return cls(None)
        divisor: Any = output.args[1] if len(output.args) == 2 and not output.kwargs else None
        if output.target is not aten.div.Tensor or output.args[0] is not result or not isinstance(divisor, fx.Node):
            return None
        return cls(divisor) if spaces.of[divisor] == ROW else None

    def producer(self, program: Program, arrays: Arrays, call: Any, values: Values) -> Producer | None:
        """The sum in a call; :obj:`None` where it is divided by several numbers per target."""
        plan: GraphPlan = call.plan
        divisor = None if self.divisor is None else values[self.divisor]
        if divisor is not None and (divisor.dim() != 2 or (divisor.size(1) != 1 and divisor.stride(1) != 0)):
            return None
        divisor = None if divisor is None else divisor[:, :1]

        def run(start: int, stop: int, **out: Any) -> Any:
            (y,) = row_program(program, plan.rows(start, stop), arrays)
            return with_epilogue(y if divisor is None else y.div_(divisor[start:stop]), **out)

        width = program.nodes[program.outputs[0]].width
        return Producer(plan.num_dst, width, plan.device, run, is_fused=False)
