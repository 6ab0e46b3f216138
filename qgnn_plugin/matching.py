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
:func:`match_outputs` leaves the weights of the model as they are: what is found is kept beside them, as how far each
code is from the nearest.  :func:`match_weights` moves them: the place to train few levels from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import OFF
from .conversion.converted import quantized_layers, quantizers, range_parameters
from .inputs import Forward, run_model, tensors_in
from .layers.linear import QuantizedLinear
from .quantizers import QLRQuantizer

__all__ = ["LARGEST", "match_outputs", "match_weights"]

LR = 0.001  # peak, of weights while codes are looked for; it falls along a half cosine
RANGE_LR = 0.005  # of log scales, and of offsets in steps
SHARE_OF_SQUARES = 0.1  # of rows of several outputs, which may be logits
NOTHING_TO_MOVE = (
    "Expected outputs that depend on a quantized weight or a learnable range (got none that do); calibrate with "
    "method='ranges'"
)
LARGEST = 1 << 25  # values that pass the sites of a model in one step: a minute or so of one thread for 200 steps


class WeightSite:
    """A weight that a site quantizes, as the layer arranges it."""

    def __init__(self, layer: Any, name: str, quantizer: QLRQuantizer, weight: nn.Parameter) -> None:
        self.layer, self.name, self.quantizer, self.weight = layer, name, quantizer, weight
        self.original = weight.detach().clone()

    @torch.no_grad()
    def keep_codes(self) -> None:
        """Give the weight its original values back, and the site the codes of today's."""
        chosen = self.codes()
        self.weight.copy_(self.original)
        shift = (chosen - self.codes()).to(torch.int16)
        self.quantizer.shift = shift if bool(shift.any()) else None

    def matrix(self) -> Tensor:
        """What the site is given."""
        matrix: Tensor = self.layer._weight_matrices()[self.name]
        return matrix

    def codes(self) -> Tensor:
        """Of the matrix."""
        return self.quantizer(self.matrix()).codes

    @torch.no_grad()
    def hold(self, codes: Tensor, where: Tensor) -> None:
        """Put the weights ``where`` in the middle of the levels of ``codes``."""
        matrix = self.matrix()
        scale, lower, _ = self.quantizer._range_of(matrix, None)
        matrix.copy_(torch.where(where, codes * scale + lower, matrix))


def weight_sites(qmodel: nn.Module) -> list[WeightSite]:
    """Every weight that is a parameter by itself; not one that is computed, or that two sites quantize."""
    found: dict[int, list[WeightSite]] = {}
    for layer in quantized_layers(qmodel).values():
        own = dict(layer.own_quantizers())
        for name, weight in layer._weight_sites().items():
            quantizer = own.get(name)
            if isinstance(weight, nn.Parameter) and quantizer is not None and _has_choice(quantizer):
                found.setdefault(id(weight), []).append(WeightSite(layer, name, quantizer, weight))
    return [sites[0] for sites in found.values() if len({id(site.quantizer) for site in sites}) == 1]


def _has_choice(quantizer: QLRQuantizer) -> bool:
    """Whether there are codes to choose: not of tables, whose rows are quantized as they are taken, nor of weights of
    one value, or that no batch has reached (now, or ever)."""
    if quantizer.bits == OFF or quantizer.is_activation or quantizer.is_zero_one:
        return False
    return quantizer.is_set and quantizer.shift is None


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


@contextmanager
def _undisturbed(qmodel: nn.Module) -> Iterator[None]:
    """Give back the state of random generators, and the buffers that running the model changes."""
    kept = [
        (module, name, buffer, buffer.clone(), _version(buffer))
        for module in qmodel.modules()
        if not isinstance(module, QLRQuantizer)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.random.fork_rng(devices=_cuda_devices(qmodel)), torch.inference_mode(False):
            yield
    finally:
        for module, name, buffer, before, version in kept:
            if _version(buffer) != version:
                buffer.copy_(before)
            module._buffers[name] = buffer


def _cuda_devices(qmodel: nn.Module) -> list[torch.device]:
    found = {t.device for t in (*qmodel.parameters(), *qmodel.buffers()) if t.device.type == "cuda"}
    return sorted(found, key=lambda device: device.index)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


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
        ValueError: If the model returns no finite floats, or none that depend on a weight or a range.
    """
    with torch.no_grad(), _undisturbed(qmodel):
        _match(qmodel, _Runs(qmodel, batches, forward), steps)


def match_weights(qmodel: nn.Module, batches: Sequence[Any], forward: Forward | None, steps: int) -> None:
    """Move weights and ranges until the outputs come close to those of the float model (see the module).

    Arguments and errors are those of :func:`match_outputs`; the model stays as it is where that is no improvement.
    """
    with torch.no_grad(), _undisturbed(qmodel):
        _match(qmodel, _Runs(qmodel, batches, forward), steps, keep_weights=False)


class _Target:
    """An output of the float model, and what of it every step needs."""

    def __init__(self, output: Tensor) -> None:
        self.values = output.detach().clone()
        self.spread = float(((self.values - self.values.mean(0)) ** 2).sum()) or 1.0
        # Rows of several outputs may be logits.
        is_rows = output.dim() >= 2 and output.size(-1) >= 2
        self.log_probabilities = self.values.log_softmax(-1) if is_rows else None


class _Runs:
    """What the model makes of each batch, beside what the float model does.

    A model that draws random numbers draws the same ones for a batch each time: only rounding tells its outputs apart.
    """

    def __init__(self, qmodel: nn.Module, batches: Sequence[Any], forward: Forward | None) -> None:
        self.qmodel, self.batches, self.forward = qmodel, batches, forward
        self.devices = _cuda_devices(qmodel)
        with _unquantized(qmodel):
            self.targets = [[_Target(t) for t in self.outputs(at)] for at in range(len(batches))]
        if not all(bool(t.values.isfinite().all()) for found in self.targets for t in found):
            raise ValueError("Expected finite outputs of the float model, to match them (got NaN or infinite ones)")

    def outputs(self, at: int) -> list[Tensor]:
        torch.default_generator.manual_seed(at)
        for device in self.devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(at)
        return _outputs(run_model(self.qmodel, self.batches[at], self.forward))

    def loss(self, step: int) -> Tensor:
        at = step % len(self.batches)
        return torch.stack(_difference(self.outputs(at), self.targets[at])).sum(0)[0]

    @torch.no_grad()
    def errors(self) -> tuple[float, float]:
        """Over all batches: what is minimized, and the relative squares alone."""
        pairs = zip(map(self.outputs, range(len(self.batches))), self.targets, strict=True)
        total = torch.stack([torch.stack(_difference(*pair)).sum(0) for pair in pairs]).sum(0)
        return float(total[0]), float(total[1])


def _match(qmodel: nn.Module, runs: _Runs, steps: int, *, keep_weights: bool = True) -> None:
    sites = weight_sites(qmodel)
    ranges = [p for p in range_parameters(qmodel) if p.requires_grad]
    before = [p.detach().clone() for p in ranges]
    loss, squares = runs.errors()
    learned = [*(site.weight for site in sites), *ranges]
    try:
        with torch.enable_grad(), _learning_only(qmodel, learned), _short_sums(qmodel):
            _descend([site.weight for site in sites], ranges, runs.loss, steps)
        if keep_weights:
            for site in sites:
                site.keep_codes()
        found, found_squares = runs.errors()
    except BaseException:
        _take_back(sites, ranges, before)
        raise
    # Outputs need not be logits: they must come closer as numbers, too.
    if not (found < loss and found_squares <= squares):
        _take_back(sites, ranges, before)


def _difference(found: Sequence[Tensor], wanted: Sequence[_Target]) -> list[Tensor]:
    """Of each output ``[2]``: what is minimized, and the squares in it."""
    if not found:
        raise ValueError("Expected a model that returns a tensor of floats, to match the float model's (got none)")
    terms = []
    for y, target in zip(found, wanted, strict=True):
        minimized = squared = ((y - target.values) ** 2).sum() / target.spread
        log_p = target.log_probabilities
        if log_p is not None:
            minimized = (log_p.exp() * (log_p - y.log_softmax(-1))).sum(-1).mean() + SHARE_OF_SQUARES * squared
        terms.append(torch.stack([minimized, squared]))
    return terms


def _descend(
    weights: list[nn.Parameter], ranges: list[nn.Parameter], loss_at: Callable[[int], Tensor], steps: int
) -> None:
    groups: list[dict[str, Any]] = [{"params": weights, "peak": LR}, {"params": ranges, "peak": RANGE_LR}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(NOTHING_TO_MOVE)
    optimizer = torch.optim.Adam(groups)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss = loss_at(step)
        if not loss.requires_grad:
            raise ValueError(NOTHING_TO_MOVE)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _take_back(sites: list[WeightSite], ranges: list[nn.Parameter], before: list[Tensor]) -> None:
    for site in sites:
        site.weight.copy_(site.original)
        site.quantizer.shift = None
    for p, value in zip(ranges, before, strict=True):
        p.copy_(value)
