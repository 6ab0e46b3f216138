"""What a run consists of, the most worth knowing first: the limit of the whole cuts from the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["MODELS", "SECTIONS", "Section"]

MODELS = ("GCN", "GraphSAGE", "GAT")


@dataclass(frozen=True)
class Section:
    """Units of measurement that share a process.

    Attributes:
        name: In rows and in ``--only``.
        units: ``module:function`` in this package; called with the :class:`.worker.Run` and ``options``.
        limit: Seconds after which the section is cut, on its own.
        options: Further arguments.
        package: Whether it needs the whole package (PyG), or the kernels alone.
        interpreted: Whether a dry run interprets kernels; otherwise it compiles them.
    """

    name: str
    units: str
    limit: float
    options: dict[str, Any] = field(default_factory=dict)
    package: bool = True
    interpreted: bool = True


def _inference(size: str, limit: float) -> list[Section]:
    """Ours and PyG's ways apart: a failed capture of theirs takes none of ours along."""
    return [
        Section(f"inference {size}: {model}, {side}", f"models:{side}_units", limit, {"model": model, "size": size})
        for model in MODELS
        for side in ("packed", "float")
    ]


_COMPILED = {"size": "170k/2M", "compiled": True}

SECTIONS: tuple[Section, ...] = (
    Section("device", "kernels:device_units", 30, package=False),
    Section("precompile", "precompile:units", 110, package=False, interpreted=False),
    Section("checks: ops", "checks:op_units", 60, package=False),
    Section("checks: models", "checks:model_units", 45),
    Section("aggregate 170k/2M", "kernels:aggregate_units", 45, {"size": "170k/2M"}, package=False),
    Section("linear 170k", "kernels:linear_units", 30, {"size": "170k/2M"}, package=False),
    *_inference("170k/2M", 30),
    Section("checks: large graph", "large:units", 40, package=False),
    Section("aggregate 2M/100M", "kernels:aggregate_units", 45, {"size": "2M/100M"}, package=False),
    Section("small graphs", "models:small_units", 40),
    Section("training step", "models:training_units", 30),
    *_inference("2M/100M", 30),
    Section("profiles", "profiles:units", 30),
    *(Section(f"compiled: {model}", "models:float_units", 45, _COMPILED | {"model": model}) for model in MODELS),
    Section("counters", "profiles:counter_units", 60, package=False),
    Section("tuning", "tuning:units", 40, package=False),
)
