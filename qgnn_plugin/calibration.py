"""Post-training: ranges from data, without labels or training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .conversion import expect_converted, quantizers
from .inputs import model_inputs

__all__ = ["calibrate"]

Forward = Callable[[nn.Module, Any], Any]


@torch.no_grad()
def calibrate(qmodel: nn.Module, data_or_loader: Any, *, forward: Forward | None = None) -> nn.Module:
    """Set every range by least mean-squared error on the activations of the unquantized model.

    The model runs once over the data in eval mode with every site passing its values through; then each site searches
    its range on what it saw.  Ranges that were set before are replaced; nothing changes if a batch fails.

    Args:
        qmodel: A converted model.
        data_or_loader: A ``Data``, a tuple of arguments, a dict of keywords, or an iterable of these.
        forward: ``forward(model, batch)`` runs the model; default :func:`qgnn_plugin.inputs.model_inputs`.

    Returns:
        ``qmodel``.

    Raises:
        ValueError: If ``qmodel`` is plain, no batch came, or a site saw a NaN or an infinity (named).
    """
    expect_converted(qmodel)
    sites = quantizers(qmodel)
    modes = {module: module.training for module in qmodel.modules()}
    batches = _batches(data_or_loader)
    try:
        qmodel.eval()
        for site in sites.values():
            site.observe()
        count = 0
        for batch in batches:
            _run(qmodel, batch, forward)
            count += 1
        if not count:
            raise ValueError("Expected at least one batch to calibrate on (got none)")
        for site in sites.values():
            site.finish()
    finally:
        for site in sites.values():
            site.abort()
        for module, training in modes.items():
            module.training = training
    return qmodel


def _run(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    if forward is not None:
        forward(model, batch)
        return
    args, kwargs = model_inputs(model, batch)
    model(*args, **kwargs)


def _batches(data: Any) -> Iterable[Any]:
    if _is_data(data) or isinstance(data, Mapping):
        return [data]
    if isinstance(data, tuple) and not all(_is_data(item) or isinstance(item, tuple) for item in data):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, torch.Tensor):
        raise TypeError(
            f"Expected a PyG Data object, a tuple of arguments, a dict of keywords, or an iterable of these "
            f"(got {type(data).__name__})"
        )
    return data


def _is_data(value: Any) -> bool:
    return any(hasattr(value, name) for name in ("edge_index", "adj_t", "edge_index_dict"))
