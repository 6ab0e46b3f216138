"""Small graphs, and trainers that write nothing but checkpoints they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch_geometric.data import Data
from torch_geometric.utils import stochastic_blockmodel_graph


def _make_sbm(seed: int = 0, per_class: int = 40, classes: int = 3, features: int = 16) -> Data:
    """Communities with noisy class means as features; 5 training and 10 validation nodes each."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inside, outside = torch.eye(classes) * 0.17, torch.full((classes, classes), 0.01)
        edge_index = stochastic_blockmodel_graph([per_class] * classes, inside + outside)
    y = torch.arange(classes).repeat_interleave(per_class)
    means = torch.randn(classes, features, generator=generator)
    x = means[y] + 1.5 * torch.randn(y.numel(), features, generator=generator)
    order = torch.arange(y.numel()) % per_class
    return Data(
        x=x,
        edge_index=edge_index,
        y=y,
        train_mask=order < 5,
        val_mask=(order >= 5) & (order < 15),
        test_mask=order >= 15,
    )


@pytest.fixture(scope="session")
def make_sbm() -> Callable[..., Data]:
    return _make_sbm


@pytest.fixture
def sbm() -> Data:
    return _make_sbm()


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., pl.Trainer]:
    def make(**options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**{**defaults, **options})

    return make
