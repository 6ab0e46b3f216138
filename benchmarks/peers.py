"""Everything that packed models are compared with: PyG's paths, the same under ``torch.compile``, and DGL.

Optional peers take part where they are; a result says which did, and why others did not.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo

from .cpu_paths import FloatPath, pyg_paths
from .dgl_paths import dgl_absence, dgl_paths, dgl_version
from .stacks import WIDTHS

__all__ = [
    "OVER_PEERS",
    "OVER_PYG",
    "Peers",
    "family",
    "is_compiled",
    "is_pyg",
    "peer_line",
    "peer_settings",
    "peers_of",
]

COMPILED = ", compiled"
OVER_PYG, OVER_PEERS = "over best PyG", "over best peer"
# Dynamo takes no sparse tensors: a model on CSR breaks into pieces around every product, and is slower than before.  An
# ``EdgeIndex`` is a list of edges to it, as the sorted one is.
NOT_COMPILED = ("CSR", "EdgeIndex")
RECOMPILE_LIMIT = 256  # every architecture, number of threads and convolution compiles the same functions


@dataclass(frozen=True)
class Peers:
    """The float models of one architecture.

    Args:
        paths: By label; all compute one function.
        absent: Peers that do not take part, and why.
    """

    paths: Mapping[str, FloatPath]
    absent: Mapping[str, str] = field(default_factory=dict)


def is_pyg(label: str) -> bool:
    """Whether a side is a path of PyG, compiled or not."""
    return label.startswith("PyG")


def is_compiled(label: str) -> bool:
    """Whether a side compiles at its first call with another shape or number of threads."""
    return label.endswith(COMPILED)


def family(label: str) -> str:
    """Of which peer a side is: ``PyG``, ``PyG, compiled`` or ``DGL``."""
    return label.partition(" ")[0].rstrip(",") + (COMPILED if is_compiled(label) else "")


@functools.cache
def _compiler_absence() -> str | None:
    """Why ``torch.compile`` takes no part."""
    if all(shutil.which(name) is None for name in ("g++", "clang++")):
        return "no C++ compiler"
    return None


def compiled_paths(paths: Mapping[str, FloatPath]) -> dict[str, FloatPath]:
    """Those of ``paths`` that Dynamo takes, compiled for each shape and number of threads at the first call.

    Its limit of recompilations, after which it would go on without compiling, becomes a high one that raises.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return {
        label + COMPILED: FloatPath(torch.compile(path.model, dynamic=False), path.convert)
        for label, path in paths.items()
        if not any(kind in label for kind in NOT_COMPILED)
    }


def peers_of(name: str, widths: Sequence[int] = WIDTHS, is_new: bool = False) -> Peers:
    """All peers of a :func:`~benchmarks.stacks.build_stack`, with the same weights.

    Args:
        name: Of the stack.
        widths: Of the stack.
        is_new: Whether every call gets another graph.  Then ``torch.compile`` takes no part.
    """
    paths, absent = pyg_paths(name, widths), {}
    compiler = "every call has a graph of another size, for which it compiles again" if is_new else _compiler_absence()
    if compiler is None:
        paths |= compiled_paths(paths)
    else:
        absent["torch.compile"] = compiler
    if (reason := dgl_absence()) is None:
        paths |= dgl_paths(name, widths)
    else:
        absent["DGL"] = reason
    return Peers(paths, absent)


def peer_settings() -> dict[str, Any]:
    """What decides which peers take part: figures with others are measured again."""
    return {"DGL": dgl_version(), "torch.compile": _compiler_absence() is None}


def peer_line(
    used: Mapping[str, Any], absent: Mapping[str, str], always: Sequence[str] = ("PyG", "PyG under `torch.compile`")
) -> list[str]:
    """A line of a report on who took part.

    Args:
        used: :func:`peer_settings`.
        absent: Peers that did not, and why.
        always: Those that do unless they are in ``absent``.
    """
    there = [name for name in always if not any(missing in name for missing in absent)]
    there += [f"DGL {used['DGL']}"] if used.get("DGL") else []
    missing = "; ".join(f"{name} ({reason})" for name, reason in absent.items())
    return [f"Peers that took part: {', '.join(there)}." + (f"  Absent: {missing}." if missing else ""), ""]
