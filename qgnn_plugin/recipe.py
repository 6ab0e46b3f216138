"""The recipe for accurate low-bit models on full-batch graphs, as a plain PyTorch loop.

Train the float model; distil it from itself (born-again networks, Furlanello et al., 2018); set ranges on what came out
by least mean-squared error and, of the fewest levels, move weights until the outputs match; then train the converted
model from there with a cosine rate, on the float model's soft predictions for all nodes (and, with ``distillation``
below 1, on the training labels).  Of the fewest levels a second try trains without dropout, for longer: a model that
can hardly follow its teacher needs every unit, one that can does better with some noise.  Weights of the fewest levels
whose codes go to and fro are frozen (:mod:`qgnn_plugin.freezing`).  The best validation epoch is kept in every stage,
and of both tries; test labels are never read.  Best is the highest accuracy, but of the fewest
levels the lowest loss: their accuracy goes up and down by points from one epoch to the next, and the highest of a
hundred on a few hundred nodes is a lucky one.  Where labels are floats, they are numbers to predict: losses are mean
squared errors, and what is called accuracy is minus that error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibration import calibrate
from .config import OFF, QuantConfig
from .conversion.convert import quantize_model, restore_model
from .conversion.converted import is_quantized
from .freezing import OscillationFreezing
from .inputs import model_inputs
from .matching import match_weights
from .smp import differential_multiplier_step
from .training import distillation_loss, parameter_groups

__all__ = [
    "Criterion",
    "Recipe",
    "RecipeResult",
    "Stage",
    "StageResult",
    "born_again",
    "distil",
    "fit_float",
    "fit_quantized",
    "float_form",
    "run_recipe",
]

Criterion = Literal["accuracy", "loss"]
FEWEST = 2  # bits of models whose weights are moved to matched outputs before they are trained


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Args:
        epochs: Full-batch steps.
        lr: Peak learning rate of Adam.
        weight_decay: L2 penalty on weights.
        cosine: Whether the rate falls to zero along a half cosine.
        patience: Stop after this many evaluations without improvement (0: never).
        evaluate_every: Epochs between evaluations on the validation nodes.
        dropout: Whether to train in training mode.  Distillation on every node needs no dropout: it only blurs what
            few levels can say, and off, the student is trained as it will be used.
        choose_by: What of the validation nodes decides on the best epoch: ``"accuracy"``, or ``"loss"``, the cross
            entropy (of numbers to predict, the mean squared error).
        most_epochs: Go on after ``epochs`` while the best evaluation lies in the later half of what was trained, up to
            so many: a model that has not converged trains until it has.  0: stop at ``epochs``.
        freeze: Whether weights of a converted model whose codes go to and fro are held at one
            (:mod:`qgnn_plugin.freezing`).
    """

    epochs: int = 200
    lr: float = 0.01
    weight_decay: float = 5e-4
    cosine: bool = False
    patience: int = 0
    evaluate_every: int = 1
    dropout: bool = True
    most_epochs: int = 0
    choose_by: Criterion = "accuracy"
    freeze: bool = False


@dataclass(frozen=True)
class Recipe:
    """Settings of the whole recipe; one default serves every data set.

    Args:
        float_stage: Training of the float model, until it has converged.
        quantized_stage: Training of the converted model from the float weights, and of the float model from itself.
        generations: How often the float model is distilled from itself before it is converted.
        matching_steps: By which a model of at most two bits comes close to the outputs of the float model before it is
            trained (:func:`qgnn_plugin.matching.match_weights`); 0: none.
        retry: Such a model is trained a second time from the same start, without dropout and for so many times the
            epochs of ``quantized_stage``; the better of both on the validation nodes is kept.  0: no second time.
        choose_by: The :class:`Stage`'s, of such a model; it decides on the better try as well.
        freeze: The :class:`Stage`'s, of such a model.
        range_lr: Rate of the learnable ranges.
        distillation: Weight of the float model's soft labels against the training labels, in [0, 1].
        temperature: Softening of both predictions.
    """

    float_stage: Stage = field(default_factory=lambda: Stage(evaluate_every=4, most_epochs=2000))
    quantized_stage: Stage = field(default_factory=lambda: Stage(epochs=100, lr=0.003, cosine=True, evaluate_every=4))
    generations: int = 1
    matching_steps: int = 400
    retry: int = 4
    choose_by: Criterion = "loss"
    freeze: bool = True
    range_lr: float = 0.005
    distillation: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class StageResult:
    """A trained model at its best validation epoch; of numbers to predict, accuracy is minus the mean squared error."""

    model: nn.Module
    val_accuracy: float
    test_accuracy: float
    epoch: int
    val_loss: float = math.nan


def _accuracy(logits: Tensor, labels: Tensor, mask: Tensor) -> float:
    if labels.is_floating_point():
        return -float(_loss(logits, labels, mask))
    return float((logits[mask].argmax(-1) == labels[mask]).float().mean())


def _loss(outputs: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Of the labelled nodes: cross entropy of classes, mean squared error of numbers."""
    if labels.is_floating_point():
        if outputs.numel() != labels.numel():
            raise ValueError(
                f"Expected as many outputs as numbers to predict, {list(labels.shape)} (got {list(outputs.shape)}); "
                f"give the model one output per column of 'y', or make classes integers: data.y = data.y.long()"
            )
        return F.mse_loss(outputs.view_as(labels)[mask], labels[mask])
    return F.cross_entropy(outputs[mask], labels[mask])


Loss = Callable[[Tensor], Tensor]
OnEpoch = Callable[[nn.Module, int, int], None]  # model, epoch from 1 on, number of epochs (so far expected)


def expect_labels(data: Any) -> None:
    """Raise unless ``data`` has classes ``y`` [N] or numbers ``y`` [N] or [N, T], and boolean masks of nodes."""
    labels = getattr(data, "y", None)
    dims = (1, 2) if isinstance(labels, Tensor) and labels.is_floating_point() else (1,)
    if not isinstance(labels, Tensor) or labels.dim() not in dims:
        found = f"{labels.dtype}, {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"Expected the classes of nodes as integers 'y' [N], or numbers to predict as floats [N] or [N, T] "
            f"(got {found})"
        )
    for name in ("train_mask", "val_mask", "test_mask"):
        mask = getattr(data, name, None)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != labels.shape[:1]:
            found = f"{mask.dtype}, {list(mask.shape)}" if isinstance(mask, Tensor) else "none"
            raise ValueError(
                f"Expected a boolean '{name}' {list(labels.shape[:1])} (got {found}); make one, for example by "
                f"torch_geometric.transforms.RandomNodeSplit()"
            )


def _fit(
    model: nn.Module,
    data: Any,
    stage: Stage,
    loss: Loss,
    groups: list[dict[str, Any]],
    on_epoch: OnEpoch | None,
) -> StageResult:
    args, kwargs = model_inputs(model, data)
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, stage.epochs))
    freezing = OscillationFreezing(model, stage.epochs) if stage.freeze else None
    best, best_key, best_state, waited = None, (-math.inf, -math.inf), {}, 0
    for epoch in range(1, max(stage.epochs, stage.most_epochs) + 1):
        if epoch > stage.epochs and best is not None and 2 * best.epoch < epoch:
            break
        model.train(stage.dropout)
        optimizer.zero_grad()
        loss(model(*args, **kwargs)).backward()
        optimizer.step()
        if freezing is not None:
            freezing.step()
        if stage.cosine:
            schedule.step()
        differential_multiplier_step(model)
        if on_epoch is not None:
            on_epoch(model, epoch, max(epoch, stage.epochs))
        if epoch % stage.evaluate_every and epoch != stage.epochs:
            continue
        model.eval()
        with torch.no_grad():
            logits = model(*args, **kwargs)
        accuracy, loss_now = _accuracy(logits, data.y, data.val_mask), float(_loss(logits, data.y, data.val_mask))
        key = (accuracy, -loss_now) if stage.choose_by == "accuracy" else (-loss_now, accuracy)
        waited += 1
        if key > best_key:
            best_key, waited, best_state = key, 0, copy.deepcopy(model.state_dict())
            best = StageResult(model, accuracy, _accuracy(logits, data.y, data.test_mask), epoch, loss_now)
        if stage.patience and waited >= stage.patience:
            break
    if best is None:
        raise ValueError(f"Expected at least one epoch (got {stage.epochs})")
    model.load_state_dict(best_state)
    model.eval()
    return best


def fit_float(
    model: nn.Module, data: Any, recipe: Recipe | None = None, *, on_epoch: OnEpoch | None = None
) -> StageResult:
    """Train ``model`` (in place) on the training labels of a full-batch ``data`` with boolean node masks.

    Integer labels ``y`` [N] are classes, floats [N] or [N, T] numbers to predict.

    ``on_epoch(model, epoch, epochs)`` is called after every epoch, to watch or to log.
    """
    stage = (recipe or Recipe()).float_stage
    groups = parameter_groups(model, stage.lr, stage.weight_decay)
    expect_labels(data)
    labels, mask = data.y, data.train_mask
    return _fit(model, data, stage, lambda logits: _loss(logits, labels, mask), groups, on_epoch)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    recipe: Recipe | None = None,
    *,
    on_epoch: OnEpoch | None = None,
) -> StageResult:
    """Train ``student`` (in place) on the training labels and on the soft predictions of ``teacher`` for all nodes.

    ``on_epoch`` is that of :func:`fit_float`.
    """
    recipe = recipe or Recipe()
    expect_labels(data)
    stage, mask = recipe.quantized_stage, data.train_mask
    teacher.eval()
    args, kwargs = model_inputs(teacher, data)
    with torch.no_grad():
        soft = teacher(*args, **kwargs)
    weight = recipe.distillation

    def loss(logits: Tensor) -> Tensor:
        hard = _loss(logits, data.y, mask)
        if weight == 0:
            return hard
        if data.y.is_floating_point():
            return (1 - weight) * hard + weight * F.mse_loss(logits, soft)
        return (1 - weight) * hard + weight * distillation_loss(logits, soft, temperature=recipe.temperature)

    groups = parameter_groups(student, stage.lr, stage.weight_decay, recipe.range_lr)
    return _fit(student, data, stage, loss, groups, on_epoch)


def born_again(
    trained: StageResult, data: Any, recipe: Recipe | None = None, *, on_epoch: OnEpoch | None = None
) -> StageResult:
    """``trained`` (untouched), a float model, distilled from itself as often as the recipe says.

    ``on_epoch`` is that of :func:`fit_float`.
    """
    for _ in range((recipe or Recipe()).generations):
        trained = distil(copy.deepcopy(trained.model), trained.model, data, recipe, on_epoch=on_epoch)
    return trained


def _best_try(
    qmodel: nn.Module, teacher: nn.Module, data: Any, recipe: Recipe, on_epoch: OnEpoch | None
) -> StageResult:
    """``qmodel`` trained as the recipe says, or else without dropout and for longer: the better one."""
    stage = recipe.quantized_stage
    longer = replace(stage, epochs=recipe.retry * stage.epochs, dropout=False)
    both = stage.epochs + longer.epochs

    def part(before: int) -> OnEpoch | None:
        return on_epoch and (lambda model, epoch, _: on_epoch(model, before + epoch, both))

    again = replace(recipe, quantized_stage=longer)
    tries = [
        distil(copy.deepcopy(qmodel), teacher, data, recipe, on_epoch=part(0)),
        distil(qmodel, teacher, data, again, on_epoch=part(stage.epochs)),
    ]
    if stage.choose_by == "loss":
        return min(tries, key=lambda result: result.val_loss)
    return max(tries, key=lambda result: result.val_accuracy)


def fit_quantized(
    float_model: nn.Module,
    data: Any,
    bits: int = 4,
    *,
    config: QuantConfig | None = None,
    recipe: Recipe | None = None,
    on_epoch: OnEpoch | None = None,
) -> StageResult:
    """Convert a trained ``float_model`` (untouched), set its ranges, and train it at low bit width, by its predictions.

    The default ``config`` is ``QuantConfig(bits)``.  A float model whose deep stacks are rewritten, a converted
    one at 32 bits, is converted anew with the weights it has.
    """
    config = QuantConfig(bits=bits) if config is None else replace(config, bits=bits)
    plain = restore_model(float_model) if is_quantized(float_model) else float_model
    qmodel = calibrate(quantize_model(plain, config=config), data, method="ranges")
    recipe = recipe or Recipe()
    if config.bits > FEWEST:
        return distil(qmodel, float_model, data, recipe, on_epoch=on_epoch)
    if recipe.matching_steps:
        match_weights(qmodel.eval(), [data], None, recipe.matching_steps)
    stage = replace(recipe.quantized_stage, choose_by=recipe.choose_by, freeze=recipe.freeze)
    recipe = replace(recipe, quantized_stage=stage)
    if recipe.retry:
        return _best_try(qmodel, float_model, data, recipe, on_epoch)
    return distil(qmodel, float_model, data, recipe, on_epoch=on_epoch)


@dataclass(frozen=True)
class RecipeResult:
    """The stages of the recipe: the float model, the quantized one, and between them the float one that it is distilled
    from."""

    float_result: StageResult
    quantized_result: StageResult
    distilled_result: StageResult


def run_recipe(
    model: nn.Module, data: Any, bits: int = 4, *, config: QuantConfig | None = None, recipe: Recipe | None = None
) -> RecipeResult:
    """The whole recipe in one call: train ``model`` (in place) in float, distil it, convert it, train it at low width.

    Args:
        model: An untrained PyG model of nodes; where ``config`` rewrites deep stacks, a copy is trained.
        data: Full-batch ``Data`` with ``x``, ``edge_index``, boolean ``train_mask``, ``val_mask`` and ``test_mask`` [N]
            and ``y``: integers [N] are classes, floats [N] or [N, T] numbers to predict.
        bits: 1, 2, 4 or 8.
        config: Everything else about the conversion.
        recipe: Settings of the training.
    """
    trained = fit_float(float_form(model, config), data, recipe)
    distilled = born_again(trained, data, recipe)
    return RecipeResult(trained, fit_quantized(distilled.model, data, bits, config=config, recipe=recipe), distilled)


def float_form(model: nn.Module, config: QuantConfig | None) -> nn.Module:
    """The float model that ``config`` stands for: ``model`` itself, or a copy with its deep stacks rewritten."""
    smp = None if config is None else config.smp
    if config is None or smp is None or not smp.deep:
        return model
    overrides = {pattern: {"smp": o["smp"]} for pattern, o in config.overrides.items() if "smp" in o}
    return quantize_model(model, config=QuantConfig(bits=OFF, smp=smp, overrides=overrides))
