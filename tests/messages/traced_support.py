"""Layers whose messages are traced beside their converted form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qgnn_plugin as qgnn
from qgnn_plugin.packing.message_passing.generic import PackedMessagePassing


def packed_pair(make: Callable[[], nn.Module], *args: Any, bits: int = 4) -> tuple[nn.Module, nn.Module]:
    """A converted layer with its ranges set, and its packed form."""
    torch.manual_seed(0)
    # Linear maps of concatenations are split for one range per tensor only; test_edge_maps has the others.
    config = qgnn.QuantConfig(bits=bits, granularity="tensor")
    qmodel = qgnn.quantize_model(make().eval(), config=config)
    qgnn.calibrate(qmodel, [args])
    return qmodel.eval(), qgnn.pack_model(qmodel)


def paths(packed: nn.Module) -> set[str]:
    return {layer._path_taken() for layer in packed.modules() if isinstance(layer, PackedMessagePassing)}


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, dict):
        out = tuple(out.values())
    return [out] if isinstance(out, Tensor) else [part for part in out if isinstance(part, Tensor)]


@torch.no_grad()
def agree(qmodel: nn.Module, packed: nn.Module, *args: Any, exact: bool = False, **kwargs: Any) -> None:
    expected, found = tensors(qmodel(*args, **kwargs)), tensors(packed(*args, **kwargs))
    assert len(expected) == len(found) > 0
    for want, got in zip(expected, found, strict=True):
        if exact:
            assert torch.equal(want, got), (want - got).abs().max()
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
