r"""Calibration by outputs: ranges and codes for which the converted model returns what the float model does.

Rounding each value to the nearest code is best for that value, not for what a layer makes of all of them: errors of
weights that act together should cancel.  Second-order rounding (Frantar et al., 2023) sees one layer at a time; here,
as in block reconstruction (Li et al., 2021) with the model as its one block, a few steps of gradient descent see all
layers, their ranges, and the graph that messages are summed over.  For outputs :math:`\hat y` and those of the float
model, :math:`y`, of mean :math:`\bar y`, they minimize

.. math::
    \mathrm{mean}_i\, \mathrm{KL}\big(\mathrm{softmax}(y_i) \,\|\, \mathrm{softmax}(\hat y_i)\big)
    + 0.1 \sum \|\hat y - y\|^2 \big/ \sum \|y - \bar y\|^2

whose first term weighs what decides on classes and, as the second one, is zero where the outputs agree; single outputs
take the second alone.  No label is read; the arithmetic is that of eval mode: no dropout, no statistics of batches.
The weights of the model are not changed: what is found is kept beside them, as how far each code is from the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import OFF
from .conversion import quantized_layers, quantizers, range_parameters
from .inputs import Forward, run_model, tensors_in
from .layers.linear import QuantizedLinear
from .quantizers import QLRQuantizer

__all__ = ["match_outputs"]

LR = 0.003  # peak, of weights while codes are looked for; it falls along a half cosine
RANGE_LR = 0.005
SHARE_OF_SQUARES = 0.1  # of rows of several outputs, which may be logits


class _Site:
    """A weight that a site quantizes as it is."""

    def __init__(self, quantizer: QLRQuantizer, weight: nn.Parameter) -> None:
        self.quantizer, self.weight = quantizer, weight
        self.original = weight.detach().clone()

    @torch.no_grad()
    def keep_codes(self) -> None:
        """Give the weight its original values back, and the site the codes of today's."""
        chosen = self.quantizer(self.weight).codes
        self.weight.copy_(self.original)
        shift = (chosen - self.quantizer(self.weight).codes).to(torch.int16)
        self.quantizer.shift = shift if bool(shift.any()) else None


def _sites(qmodel: nn.Module) -> list[_Site]:
    """Every weight that is a parameter by itself; not one that is computed, or that two sites quantize."""
    found: dict[int, list[_Site]] = {}
    for layer in quantized_layers(qmodel).values():
        own = dict(layer.own_quantizers())
        for name, weight in layer._weight_sites().items():
            quantizer = own.get(name)
            if isinstance(weight, nn.Parameter) and quantizer is not None and quantizer.bits != OFF:
                found.setdefault(id(weight), []).append(_Site(quantizer, weight))
    return [sites[0] for sites in found.values() if len({id(site.quantizer) for site in sites}) == 1]


@contextmanager
def _unquantized(qmodel: nn.Module) -> Iterator[None]:
    """Let values pass, attention coefficients too."""
    attending = [layer for layer in quantized_layers(qmodel).values() if hasattr(layer, "attention_bits")]
    widths = [layer.attention_bits for layer in attending]
    sites = quantizers(qmodel).values()
    try:
        for site in sites:
            site.observe()
        for layer in attending:
            layer.attention_bits = OFF
        yield
    finally:
        for site in sites:
            site.abort()
        for layer, width in zip(attending, widths, strict=True):
            layer.attention_bits = width


@contextmanager
def _learning_only(qmodel: nn.Module, learned: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for ``learned`` and nothing else; those that parameters have, and whether they want any, come back."""
    before = [(p, p.requires_grad, p.grad) for p in qmodel.parameters()]
    chosen = {id(p) for p in learned}
    try:
        for p, _, _ in before:
            p.requires_grad_(id(p) in chosen)
            p.grad = None
        yield
    finally:
        for p, wanted, grad in before:
            p.grad = None
            p.requires_grad_(wanted)
            p.grad = grad


@contextmanager
def _short_sums(qmodel: nn.Module) -> Iterator[None]:
    """Let products be added in float32, as in training: exact sums of wide codes take many times as long."""
    layers: list[Any] = list(quantized_layers(qmodel).values())
    maps: list[Any] = [m for m in layers if isinstance(m, QuantizedLinear) and not m.training]
    maps = [m for m in maps if "weight" in m._parameters]  # not one whose computed weight moves in training
    try:
        for m in maps:
            m.training = True
        yield
    finally:
        for m in maps:
            m.training = False


def _outputs(value: Any) -> list[Tensor]:
    return [t for t in tensors_in(value) if t.is_floating_point() and t.numel()]


def match_outputs(qmodel: nn.Module, batches: Sequence[Any], forward: Forward | None, steps: int) -> None:
    """Choose ranges and the codes of weights for the outputs of the float model (see the module).

    Args:
        qmodel: A converted model in eval mode whose ranges are set.  It stays as it is where that is no improvement.
        batches: What it runs on, one per step in turn.
        forward: As in :func:`qgnn_plugin.calibrate`.
        steps: How many.

    Raises:
        ValueError: If the model returns no floats that depend on a weight or a range.
    """
    with torch.no_grad(), _unquantized(qmodel):
        targets = [[t.detach().clone() for t in _outputs(run_model(qmodel, batch, forward))] for batch in batches]
    sites = _sites(qmodel)
    ranges = [p for p in range_parameters(qmodel) if p.requires_grad]
    before = [p.detach().clone() for p in ranges]

    def error(at: int) -> Tensor:
        found = _outputs(run_model(qmodel, batches[at], forward))
        return _difference(found, targets[at])

    def total() -> float:
        with torch.no_grad():
            return sum(float(error(at)) for at in range(len(batches)))

    start = total()
    learned = [*(site.weight for site in sites), *ranges]
    try:
        with torch.enable_grad(), _learning_only(qmodel, learned), _short_sums(qmodel):
            _descend([site.weight for site in sites], ranges, error, len(batches), steps)
        for site in sites:
            site.keep_codes()
        improved = total() < start
    except BaseException:
        _take_back(sites, ranges, before)
        raise
    if not improved:
        _take_back(sites, ranges, before)


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """What is minimized."""
    if not found:
        raise ValueError("Expected a model that returns a tensor of floats, to match the float model's (got none)")
    terms = []
    for y, target in zip(found, wanted, strict=True):
        spread = float(((target - target.mean(0)) ** 2).sum())
        squared = ((y - target) ** 2).sum() / (spread or 1.0)
        if y.dim() < 2 or y.size(-1) < 2:
            terms.append(squared)
            continue
        log_p, log_q = target.log_softmax(-1), y.log_softmax(-1)
        terms.append((log_p.exp() * (log_p - log_q)).sum(-1).mean() + SHARE_OF_SQUARES * squared)
    return torch.stack(terms).sum()


def _descend(weights: list[nn.Parameter], ranges: list[nn.Parameter], error: Any, batches: int, steps: int) -> None:
    groups = [{"params": weights, "peak": LR}, {"params": ranges, "peak": RANGE_LR}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=LR)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss = error(step % batches)
        if not loss.requires_grad:
            raise ValueError(
                "Expected outputs that depend on a quantized weight or a learnable range (got none that do); calibrate "
                "with method='ranges'"
            )
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _take_back(sites: list[_Site], ranges: list[nn.Parameter], before: list[Tensor]) -> None:
    for site in sites:
        site.weight.copy_(site.original)
        site.quantizer.shift = None
    for p, value in zip(ranges, before, strict=True):
        p.copy_(value)
