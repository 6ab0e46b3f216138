"""What the examples of tasks share: their arguments, a training loop, and the table at the end."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import qgnn_plugin as qgnn
from qgnn_plugin.summaries import model_bytes
from qgnn_plugin.tables import table


def parser(
    description: str | None, *, epochs: int, dataset: str | None = None, bits: int = 4
) -> argparse.ArgumentParser:
    """The arguments of every example; ``dataset`` names what ``--dataset`` takes besides generated data."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    if dataset is not None:
        made.add_argument("--dataset", default="generated", help=f"generated, or {dataset} of PyG, fetched to --root")
        made.add_argument("--root", default="data", help="folder of the data sets")
    made.add_argument("--bits", type=int, default=bits, choices=(1, 2, 4, 8))
    made.add_argument("--epochs", type=int, default=epochs, help="in float; half in low bits")
    made.add_argument("--seed", type=int, default=0)
    return made


def train(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    epochs: int,
    lr: float,
) -> nn.Module:
    """Trains ``model`` in place, in float or converted; returns it in eval mode. The rate falls along a half cosine."""
    optimizer = torch.optim.Adam(qgnn.training.parameter_groups(model, lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
    model.train()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            qgnn.differential_multiplier_step(model)
        schedule.step()
    return model.eval()


def report(models: dict[str, nn.Module], score: Callable[[nn.Module], dict[str, float]]) -> str:
    """The summary of the last, a packed model, and a row for each: its scores, and its bytes against the first's."""
    rows, header, whole = [], (), None
    for name, model in models.items():
        scores, size = score(model), model_bytes(model)
        whole = size if whole is None else whole
        header = ("model", *scores, "bytes", "smaller")
        rows.append((name, *map(_cell, scores.values()), f"{size:,}", f"{whole / size:.1f}x"))
    return f"{qgnn.summary(model)}\n{table(header, rows, right=True)}"


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
