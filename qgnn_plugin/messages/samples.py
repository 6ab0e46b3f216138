"""Features of several samples on one graph, ``[*, N, F]``: their messages run sample by sample, as of one alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..packing.lazy.producers import Producer
from ..packing.message_passing.call import SPECIAL, Propagation
from ..packing.message_passing.nodes import PackedNodes, is_features
from .check import expect_agreement
from .shadow import NotTraceable
from .traced import TracedCalls, TracedMessage

__all__ = ["SampledCalls", "samples_of"]


def samples_of(call: Propagation) -> tuple[torch.Size, list[Propagation]] | None:
    """The dimensions of the samples, and a call for each of them; :obj:`None` where nodes come first as they do in one.

    Raises:
        NotTraceable: If the arguments are not all of the same samples, or of none.
    """
    node_dim: int = call.layer.node_dim
    names = {name[:-2] for name in call.parameters if name[-2:] in ("_i", "_j") and name not in SPECIAL}
    sides = [side for name in names for side in _sides(call.arguments.get(name)) if is_features(side)]
    leads = {side.shape[:node_dim] for side in sides if _has_samples(side, node_dim)}
    if not leads:
        return None
    if len(leads) > 1:
        raise NotTraceable("its arguments are of different samples")
    lead = leads.pop()
    for name, value in call.arguments.items():
        if name not in names and isinstance(value, Tensor) and value.dim() > 1 and not call.is_per_edge(value):
            raise NotTraceable(f"'{name}' may be of samples, too")
    return lead, [_sample(call, names, number) for number in range(math.prod(lead))]


def _sides(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _has_samples(value: Tensor | PackedNodes, node_dim: int) -> bool:
    return node_dim < 0 and len(value.shape) > -node_dim


def _sample(call: Propagation, names: set[str], number: int) -> Propagation:
    """The call with the features of one sample; its plan, and what is sorted by it, are those of all."""
    node_dim: int = call.layer.node_dim

    def chosen(value: Any) -> Any:
        if not is_features(value) or not _has_samples(value, node_dim):
            return value
        return value.sample(number) if isinstance(value, PackedNodes) else value.flatten(0, node_dim - 1)[number]

    def one(value: Any) -> Any:
        if not isinstance(value, (tuple, list)):
            return chosen(value)
        first, *rest = value
        kept = chosen(first)
        return (kept, *(kept if side is first else chosen(side) for side in rest))

    arguments = {name: one(value) if name in names else value for name, value in call.arguments.items()}
    part = replace(call, arguments=arguments)
    part.__dict__["plan"] = call.plan
    return part


class SampledCalls:
    """The traces of one form of call, of one or several samples."""

    def __init__(self) -> None:
        self.calls = TracedCalls()
        self.agreed: list[TracedMessage] = []  # traces of samples that give what the layer gives of all together

    def run(self, call: Propagation) -> Tensor | Producer:
        """What ``aggregate`` returns.

        Raises:
            NotTraceable, Unsupported: If there is no kernel for the call.
        """
        samples = samples_of(call)
        if samples is None:
            return self.calls.find(call).run(call)
        lead, parts = samples
        found = self.calls.find(parts[0]) if parts else None
        if found is None or found.record.written:
            raise NotTraceable("no samples, or something is written to the layer for each")
        outs = [found.run(part) for part in parts]
        values = torch.stack([out.whole() if isinstance(out, Producer) else out for out in outs])
        values = values.view(*lead, *values.shape[1:])
        if not any(found is other for other in self.agreed):
            expect_agreement(call, values, len(lead))
            self.agreed.append(found)
        return values
