"""How long a stage of the recipe trains."""

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.nn import GCN

from qgnn_plugin.recipe import Recipe, Stage, fit_float


def _data() -> Data:
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    x = torch.nn.functional.one_hot(labels, 3).float() + torch.randn(60, 3)
    part = torch.arange(60) // 20
    return Data(
        x=x, edge_index=torch.randint(60, (2, 200)), y=labels,
        train_mask=part == 0, val_mask=part == 1, test_mask=part == 2,
    )  # fmt: skip


@pytest.mark.parametrize("lr", [0.0003, 0.3])
def test_a_stage_goes_on_until_its_best_epoch_is_in_the_earlier_half(lr: float) -> None:
    stage, seen = Stage(epochs=8, most_epochs=200, evaluate_every=4, lr=lr), []
    torch.manual_seed(0)
    result = fit_float(GCN(3, 8, 2, 3), _data(), Recipe(stage), on_epoch=lambda model, epoch, _: seen.append(epoch))
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) >= 8
    assert len(seen) == 200 or 2 * result.epoch <= len(seen)
    if len(seen) > 8:  # four epochs earlier it had not
        assert 2 * result.epoch > len(seen) - 4


def test_a_stage_ends_at_its_epochs_without() -> None:
    seen: list[int] = []
    fit_float(GCN(3, 8, 2, 3), _data(), Recipe(Stage(epochs=9)), on_epoch=lambda m, epoch, epochs: seen.append(epoch))
    assert len(seen) == 9
