"""Sizes of what ``make bench-smp`` runs, and its cells.

Settings were chosen on validation accuracy, on the first seed of Cora.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qgnn_plugin.config import OFF
from qgnn_plugin.recipe import Recipe, Stage

__all__ = ["BASELINES", "FLOAT_PARTS", "PARTS", "PLAIN_WIDTHS", "SYNTHETIC", "TELEPORT", "WIDTHS", "Settings", "cells"]

PARTS = ("constraint", "depth", "propagation", "baseline", "plain", "shallow", "cost")
FLOAT_PARTS = ("baseline",)  # without a quantized model: no configuration changes them
WIDTHS = {"FP32": OFF, "INT4": 4, "INT2": 2}
PLAIN_WIDTHS = ("FP32", "INT2")  # the ends: a corrected step takes as many products as it has sweeps
BASELINES = ("GCNII", "GCN", "SGC")
TELEPORT = 0.1
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Settings:
    """Sizes of everything.

    Args:
        seeds: Of every accuracy.
        datasets: Of the constraint; the first one is that of all other parts.
        depth: Layers of the deep GCN.
        steps: Propagation depths ``K``.
        alpha: A bound that binds, relative to the energy of a layer's input.
        plain_datasets: Of propagation without a teleport.
        plain_steps: Its depths ``K``.
        plain_terms: Sweeps of its correction.
        float_epochs: Full-batch steps of a float model, ended early after ``patience`` evaluations.
        quantized_epochs: Those of a quantized model.
        deep_epochs: Those of a deep float model.
        evaluate_every: Epochs between evaluations.
        patience: Evaluations without improvement before a float model stops.
        constraint_steps: Training steps over which multipliers are watched.
        settling_steps: Further ones with the weights held: at few bits a weight on the edge between two codes keeps
            jumping, and the constraint with it.
        rounds: Of the timings.
    """

    seeds: int = 10
    datasets: tuple[str, ...] = ("Cora", "PubMed")
    depth: int = 32
    steps: tuple[int, ...] = (8, 16, 32, 64)
    alpha: float = 0.1
    plain_datasets: tuple[str, ...] = ("Cora", "PubMed", "Photo", "CS")
    plain_steps: tuple[int, ...] = (16,)
    plain_terms: int = 16
    float_epochs: int = 120
    quantized_epochs: int = 60
    deep_epochs: int = 150
    evaluate_every: int = 3
    patience: int = 15
    constraint_steps: int = 300
    settling_steps: int = 100
    rounds: int = 15

    @classmethod
    def tiny(cls) -> Settings:
        """Seconds, on a made-up graph: to see that everything runs."""
        return cls(
            seeds=2, datasets=(SYNTHETIC,), depth=5, steps=(2, 3), plain_datasets=(SYNTHETIC,), plain_steps=(3,),
            plain_terms=2, float_epochs=4, quantized_epochs=4, deep_epochs=4, constraint_steps=6, settling_steps=3,
            rounds=2,
        )  # fmt: skip

    @property
    def recipe(self) -> Recipe:
        base = Recipe()
        return replace(
            base,
            float_stage=Stage(self.float_epochs, evaluate_every=self.evaluate_every, patience=self.patience),
            quantized_stage=replace(
                base.quantized_stage, epochs=self.quantized_epochs, evaluate_every=self.evaluate_every
            ),
            matching_steps=0,
        )

    @property
    def deep_recipe(self) -> Recipe:
        """As GCNII is trained: more weight decay, and longer."""
        stage = Stage(self.deep_epochs, 0.01, 1e-2, evaluate_every=self.evaluate_every, patience=2 * self.patience)
        return replace(self.recipe, float_stage=stage)


def cells(settings: Settings, parts: tuple[str, ...] = PARTS) -> Iterator[tuple[Any, ...]]:
    """``(part, *what, seed)`` of every run, seed by seed."""
    for seed in range(settings.seeds):
        if seed == 0 and "constraint" in parts:
            yield from (("constraint", dataset, seed) for dataset in settings.datasets)
        if seed == 0 and "cost" in parts:
            yield "cost", seed
        if "depth" in parts:
            yield "depth", seed
        if "shallow" in parts:
            yield "shallow", seed
        for part in ("propagation", "baseline"):
            if part in parts:
                yield from ((part, steps, seed) for steps in settings.steps)
        if "plain" in parts:
            for dataset in settings.plain_datasets:
                yield from (("plain", dataset, steps, seed) for steps in settings.plain_steps)
