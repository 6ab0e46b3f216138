"""Post-training: ranges from data, without labels or training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .config import check_one_of
from .conversion.converted import expect_converted, expect_values, quantizers
from .conversion.coverage import counting_rows
from .conversion.passed_by import Reached
from .inputs import Forward, is_data, run_model, tensors_in
from .kernels.plan import GraphPlan
from .layers.read_past import noting_reads
from .matching import LARGEST, match_outputs
from .quantizers import QLRQuantizer, RangeKind

__all__ = ["calibrate"]

Method = Literal["auto", "ranges", "outputs"]
METHODS: tuple[Method, ...] = ("auto", "ranges", "outputs")
FEW = 4  # bits below which "auto" matches outputs: with more, the nearest codes are as good within tenths of a point
MOST_KEPT = 1 << 26  # values of batches that are kept to be read again: a quarter of a GiB


@torch.no_grad()
def calibrate(
    qmodel: nn.Module,
    data_or_loader: Any,
    *,
    method: Method = "auto",
    steps: int = 200,
    forward: Forward | None = None,
) -> nn.Module:
    """Set every range from data, without labels.

    ``"ranges"``: the model runs once over the data in eval mode with every site passing its values through; then each
    site searches the range of least mean-squared error on what it saw.  Ranges that were set before are replaced;
    nothing changes if a batch fails.

    ``"outputs"`` goes on from there for ``steps`` forward and backward passes: ranges, and the codes of weights, move
    towards the outputs of the float model (see :mod:`qgnn_plugin.matching`), where that brings them closer.  At 2 bits
    that is worth many points.  The weights stay bitwise what they are; how far their codes are from the nearest ones is
    saved with the ranges.  Of a loader, the first ``steps`` batches are read again, or fewer where they are large.

    ``"auto"``, the default, is ``"outputs"`` where a site has fewer than 4 bits, and ``"ranges"`` where none has: there
    the nearest codes are as good.  A warning tells where outputs cannot be matched (they are no floats, or have no
    gradient), or where the data are so many that it would take minutes, and the ranges of ``"ranges"`` are kept.  Ask
    for ``"ranges"`` before training: weights that move find their own codes.

    Inputs of the model that are 0/1 throughout are kept in one bit, and must stay so.  A site that saw nothing but
    zeros gets a default range, about [-1, 1], with a warning.

    Args:
        qmodel: A converted model.
        data_or_loader: A ``Data``, a tuple of arguments, a dict of keywords, or an iterable of these or of tensors.
        method: ``"auto"``, ``"ranges"`` or ``"outputs"``.
        steps: Of matching outputs; each takes one batch.
        forward: ``forward(model, batch)`` runs the model, such as ``lambda model, batch: model.encode(batch.x,
            batch.edge_index)``; by default it is called with what :func:`qgnn_plugin.inputs.model_inputs` finds.

    Returns:
        ``qmodel``.

    Raises:
        ValueError: If ``qmodel`` is plain, no batch came or none came to a converted layer, a layer is passed by that
            the float model calls, or a site saw a NaN or an infinity (named); with ``"outputs"`` also if there are no
            outputs to match.
        TypeError: If a batch does not fit ``qmodel``.
    """
    expect_converted(qmodel)
    expect_values(qmodel)
    if forward is not None and not callable(forward):
        raise TypeError(f"Expected a function of model and batch as 'forward' (got {type(forward).__name__})")
    check_one_of("method", method, METHODS)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"Expected 'steps' to be an integer >= 1 (got {steps!r})")
    sites = quantizers(qmodel)
    modes = {module: module.training for module in qmodel.modules()}
    batches = _batches(data_or_loader)
    matching = method == "outputs" or (method == "auto" and any(site.bits < FEW for site in sites.values()))
    kept = _Kept(steps if matching else 0)
    inputs, before, reached = _Inputs(), [_state(site) for site in sites.values()], Reached(qmodel)
    try:
        qmodel.eval()
        for site in sites.values():
            site.observe(inputs.holds)
        count, first = 0, None
        with noting_reads(qmodel):
            for batch in batches:
                inputs.tensors = list(tensors_in(batch))
                with ExitStack() as stack:
                    if not count:
                        first = batch
                        stack.enter_context(counting_rows(qmodel))
                        stack.enter_context(reached.watching())
                    run_model(qmodel, batch, forward)
                kept.add(batch, inputs.tensors)
                count += 1
        if not count:
            raise ValueError("Expected at least one batch to calibrate on (got none)")
        reached.expect_all(first, forward)
        work = sum(site.values_seen for site in sites.values()) // count
        seen = [site for site in sites.values() if site.finish()]
        if method == "outputs":
            match_outputs(qmodel, kept.batches, forward, steps)
        elif matching:
            _match_if_possible(qmodel, kept.batches, forward, steps, work)
    except BaseException:
        for site, state in zip(sites.values(), before, strict=True):
            _take_back(site, state)
        raise
    finally:
        for site in sites.values():
            site.abort()
        for module, training in modes.items():
            module.training = training
    _warn_of_zeros([site.site for site in seen if site.range_kind == RangeKind.ZEROS and site.is_activation])
    return qmodel


def _match_if_possible(qmodel: nn.Module, batches: list[Any], forward: Forward | None, steps: int, work: int) -> None:
    """Match outputs, or warn why the ranges stay those of single sites.

    Args:
        work: Values that pass the sites in one step.
    """
    if work > LARGEST:
        reason = f"{steps} steps over {work:,} values each would take minutes; ask for them by method='outputs'"
    elif isinstance(qmodel, nn.parallel.DistributedDataParallel):
        reason = "the model is wrapped for training on several ranks, which would each choose their own"
    else:
        try:
            match_outputs(qmodel, batches, forward, steps)
            return
        except Exception as error:  # of any code of the model, which ran without gradients just before
            reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"Codes below {FEW} bits are the nearest ones, not chosen for the outputs of the model, which cost accuracy: "
        f"{reason}. method='ranges' is this without the warning",
        stacklevel=4,
    )


class _Kept:
    """The first batches, to be read again: so many, or fewer where they are large."""

    def __init__(self, most: int) -> None:
        self.batches: list[Any] = []
        self._most, self._values = most, 0

    def add(self, batch: Any, tensors: list[Tensor]) -> None:
        self._values += sum(t.numel() if t.layout == torch.strided else t._nnz() for t in tensors)
        if len(self.batches) < self._most and (not self.batches or self._values <= MOST_KEPT):
            self.batches.append(batch)


def _state(site: QLRQuantizer) -> dict[str, Tensor]:
    """A copy of its numbers."""
    return {name: value.detach().clone() for name, value in (*site.named_parameters(), *site.named_buffers())}


def _take_back(site: QLRQuantizer, state: dict[str, Tensor]) -> None:
    """Give it these numbers."""
    site.shift = state.get("shift")
    for name, value in (*site.named_parameters(), *site.named_buffers()):
        value.copy_(state[name])


def _warn_of_zeros(sites: list[str]) -> None:
    if sites:
        listed = ", ".join(repr(site) for site in sites[:5]) + (", ..." if len(sites) > 5 else "")
        warnings.warn(
            f"Only zeros reached {listed} while calibrating: the range there is a default of about [-1, 1]; calibrate "
            f"on data that bring other values there",
            stacklevel=4,
        )


class _Inputs:
    """The tensors of the batch that runs through the model."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def holds(self, x: Tensor, pattern: GraphPlan | None) -> bool:
        """Whether a site's values are an input of the model: a view of one, or zero exactly where one is, as after a
        scaling of its rows, by zero for some.

        Args:
            x: The values, of a sparse matrix the stored ones.
            pattern: Their positions in a sparse matrix.
        """
        return any(_is_input(given, x, pattern) for given in self.tensors)


def _is_input(given: Tensor, x: Tensor, pattern: GraphPlan | None) -> bool:
    if pattern is not None:
        shape = (pattern.num_dst, pattern.num_src)
        return given.layout != torch.strided and tuple(given.shape) == shape and given._nnz() == x.numel()
    if given.layout != torch.strided or given.device != x.device:
        return False
    if given.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return True
    if given.shape != x.shape or x.dim() < 2:
        return False
    # Sums and maps of dense features have no zeros either: only what was 0 or one value per row can have stayed so.
    if not bool(((given == 0) | (given == given.amax(-1, keepdim=True))).all()):
        return False
    stored = x != 0
    if torch.equal(given != 0, stored):
        return True
    # A factor of zero takes a row away, such as that of an isolated node.
    return x.size(-1) > 1 and bool((((given != 0) == stored) | ~stored.any(-1, keepdim=True)).all())


def _batches(data: Any) -> Iterable[Any]:
    if is_data(data) or isinstance(data, Mapping):
        return [data]
    if isinstance(data, tuple) and not all(is_data(item) or isinstance(item, tuple) for item in data):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, (torch.Tensor, str, bytes)):
        raise TypeError(
            f"Expected a PyG Data object, a tuple of arguments, a dict of keywords, or an iterable of these "
            f"(got {type(data).__name__})"
        )
    return data
