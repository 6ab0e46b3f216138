"""The stages of the recipe: how long they train, and what each starts from."""

import copy
from dataclasses import replace

import pytest
import torch
from core.support import assert_same_state
from torch_geometric.data import Data
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.recipe import (
    Criterion,
    Recipe,
    Stage,
    StageResult,
    born_again,
    fit_float,
    fit_quantized,
    run_recipe,
)


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


SHORT = Recipe(Stage(4), Stage(4, lr=0.003), matching_steps=10)


@pytest.mark.parametrize("generations", [0, 1, 2])
def test_a_float_model_is_distilled_from_itself_so_many_times(generations: int) -> None:
    torch.manual_seed(0)
    trained = fit_float(GCN(3, 8, 2, 3), _data(), SHORT)
    before = copy.deepcopy(trained.model.state_dict())
    recipe, epochs = Recipe(SHORT.float_stage, SHORT.quantized_stage, generations), []
    distilled = born_again(trained, _data(), recipe, on_epoch=lambda model, epoch, _: epochs.append(epoch))
    assert epochs == generations * [1, 2, 3, 4]
    assert (distilled is trained) == (generations == 0)
    assert_same_state(trained.model, before)


def test_the_quantized_model_follows_the_distilled_one() -> None:
    """By run_recipe as by its parts, one after another."""
    torch.manual_seed(0)
    model, data = GCN(3, 8, 2, 3), _data()
    torch.manual_seed(1)
    result = run_recipe(copy.deepcopy(model), data, bits=2, recipe=SHORT)
    torch.manual_seed(1)
    trained = fit_float(copy.deepcopy(model), data, SHORT)
    distilled = born_again(trained, data, SHORT)
    quantized = fit_quantized(distilled.model, data, 2, recipe=SHORT)
    for found, expected in (
        (result.float_result, trained),
        (result.distilled_result, distilled),
        (result.quantized_result, quantized),
    ):
        assert_same_state(found.model, expected.model.state_dict())


@pytest.mark.parametrize("choose_by", ["accuracy", "loss"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_best_epoch_is_that_of_the_validation_nodes(bits: int, choose_by: Criterion) -> None:
    """Of two bits by what the recipe says, of more by accuracy; accuracies that are equal are told apart by losses."""
    torch.manual_seed(0)
    model, data = GCN(3, 8, 2, 3).eval(), _data()
    stage = Stage(40, lr=0.1, evaluate_every=2)
    recipe, seen = replace(SHORT, quantized_stage=stage, retry=0, choose_by=choose_by, distillation=0.0), {}

    def watch(trained: torch.nn.Module, epoch: int, total: int) -> None:
        with torch.no_grad():
            logits = trained.eval()(data.x, data.edge_index)[data.val_mask]
        labels = data.y[data.val_mask]
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        seen[epoch] = (float((logits.argmax(-1) == labels).float().mean()), loss)

    result = fit_quantized(model, data, bits, recipe=recipe, on_epoch=watch)
    evaluated = range(2, 41, 2)
    by_accuracy = max(evaluated, key=lambda epoch: (seen[epoch][0], -seen[epoch][1]))
    by_loss = min(evaluated, key=lambda epoch: seen[epoch][1])
    assert by_accuracy != by_loss
    assert result.epoch == (by_loss if bits == 2 and choose_by == "loss" else by_accuracy)
    assert (result.val_accuracy, result.val_loss) == seen[result.epoch]


@pytest.mark.parametrize("choose_by", ["accuracy", "loss"])
@pytest.mark.parametrize(("bits", "retry", "epochs"), [(2, 3, 16), (2, 0, 4), (4, 3, 4)])
def test_two_bits_are_trained_again_without_dropout(bits: int, retry: int, epochs: int, choose_by: Criterion) -> None:
    """From the same start; of both tries the better one is returned, and the first where they are as good."""
    torch.manual_seed(0)
    model, data = GCN(3, 8, 2, 3, dropout=0.5).eval(), _data()
    recipe, seen, modes = replace(SHORT, retry=retry, choose_by=choose_by), [], []

    def watch(model: torch.nn.Module, epoch: int, total: int) -> None:
        seen.append((epoch, total))
        modes.append(model.training)

    torch.manual_seed(1)
    result = fit_quantized(model, data, bits, recipe=recipe, on_epoch=watch)
    assert seen == [(epoch, epochs) for epoch in range(1, epochs + 1)]
    assert modes == [True] * 4 + [False] * (epochs - 4)
    if epochs > 4:
        torch.manual_seed(1)
        once = fit_quantized(model, data, bits, recipe=replace(recipe, retry=0))
        longer = Stage(12, lr=0.003, dropout=False)
        quiet = fit_quantized(model, data, bits, recipe=replace(recipe, retry=0, quantized_stage=longer))
        if choose_by == "loss":
            again = quiet.val_loss < once.val_loss
        else:
            again = quiet.val_accuracy > once.val_accuracy
        assert_same_state(result.model, (quiet if again else once).model.state_dict())


@pytest.mark.parametrize("bits", [2, 4])
def test_two_bits_are_trained_from_matched_outputs(bits: int) -> None:
    """Without a step of training that moves anything, what differs from the float weights is what matching moved."""
    torch.manual_seed(0)
    model, data = GCN(3, 8, 2, 3).eval(), _data()
    with torch.no_grad():
        wanted = model(data.x, data.edge_index)
    still = Stage(1, lr=0.0)

    def start(steps: int) -> StageResult:
        recipe = Recipe(SHORT.float_stage, still, matching_steps=steps, range_lr=0.0)
        return fit_quantized(model, data, bits, recipe=recipe)

    def error(result: StageResult) -> float:
        with torch.no_grad():
            return float((result.model.eval()(data.x, data.edge_index) - wanted).norm())

    plain, matched = start(0).model, start(60)
    assert_same_state(qgnn.restore_model(plain), model.state_dict())
    weights = qgnn.restore_model(matched.model).state_dict()
    moved = any(not torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert moved == (bits == 2)
    if moved:
        assert error(matched) < error(start(0))
