"""``warmup``: the kernels that a model needs, compiled before it serves."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from .inputs import parameters_of
from .kernels.backend import backend_for
from .packing import is_packed
from .packing.model import packed_layers

__all__ = ["warmup"]

NODES = 8  # of the graph that is run where none is given


def warmup(packed: nn.Module, *inputs: Any, progress: bool = True) -> int:
    """Compile what a packed model needs on this machine, and load what an earlier process compiled.

    Kernels of the CPU are compiled on first use and kept on disk, which takes seconds on a new machine; afterwards a
    call costs what it costs.  On an accelerator the same holds for Triton.

    Args:
        packed: A model made by ``pack_model`` or ``load_packed``.
        inputs: What it is called with; a small graph will do, of the kind that is served (with edge weights where
            there are any).  By default, for a model of ``(x, edge_index)``, a ring of a few nodes whose features are
            zero.
        progress: Whether to show what is being compiled, on the error stream.

    Returns:
        How many kernels were compiled: 0 where all were there.

    Raises:
        ValueError: If ``packed`` is no packed model, or its inputs are not known.
    """
    if not is_packed(packed):
        raise ValueError(f"Expected a packed model (got a {type(packed).__name__}); pack it: qgnn_plugin.pack_model")
    device = next((t.device for t in (*packed.parameters(), *packed.buffers())), torch.device("cpu"))
    args = inputs or _ring(packed, device)
    count = 0
    with tqdm(desc="Compiling kernels", unit=" kernels", disable=not progress, leave=False, delay=0.5) as bar:

        def watch(name: str) -> None:
            nonlocal count
            count += 1
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        with torch.no_grad():
            if backend_for(device) == "cpu":
                compiling: Any = importlib.import_module(f"{__package__}.kernels.cpu.compiling")
                with compiling.compilations(watch):
                    packed(*args)
                    with _Watched():  # few rows go a shorter way, which whoever looks at operations does not see
                        packed(*args)
            else:
                packed(*args)
    return count


class _Watched(TorchDispatchMode):
    """Runs every operation as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _ring(packed: nn.Module, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and edges for a model that takes these two."""
    required = [p.name for p in parameters_of(packed) if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]
    first: Any = next(iter(packed_layers(packed).values()))
    width = getattr(packed, "in_channels", None) or getattr(first, "in_channels", None)
    width = width or getattr(first, "in_features", None)
    if len(required) != 2 or not isinstance(width, int):
        raise ValueError(
            f"Expected inputs of {type(packed).__name__}, which takes something else than (x, edge_index) (got none); "
            f"give a small graph: warmup(packed, x, edge_index, ...)"
        )
    nodes = torch.arange(NODES, device=device)
    return torch.zeros(NODES, width, device=device), torch.stack([nodes, nodes.roll(1)])
