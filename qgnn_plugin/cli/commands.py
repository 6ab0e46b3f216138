"""What the commands do, one function each; ``False`` where the result misses what was asked for."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..analysis.comparison import score
from ..atomic import atomic_file
from ..calibration import calibrate
from ..conversion.convert import quantize_model, restore_model
from ..conversion.converted import is_quantized
from ..denormals import flushed_denormals
from ..inputs import run_model
from ..packing import pack_model, packed_bytes, save_packed
from ..recipe import Recipe, Stage, StageResult, born_again, fit_float, fit_quantized, float_form
from ..summaries import model_bytes, summary
from .building import Origin, origin_of
from .loading import (
    PACKED,
    Loaded,
    Readers,
    expect_suffix,
    expect_writable,
    load_data,
    outputs_of,
    read_model,
    save_checkpoint,
)
from .progress import EpochBar, working

__all__ = ["convert", "evaluate", "load", "pack", "quantize", "suggest", "train", "write_report"]

DEFAULT_BITS = 4
CHECKPOINT = ".pt"
SPLITS = ("train", "val", "test")


@flushed_denormals()
def train(options: Any) -> None:
    """Train a float model and its low-bit versions; print a table, and write to ``--out``."""
    out = options.out
    if options.report and out is None:
        raise ValueError("Expected a folder for the report: pass --out")
    if out is not None:
        expect_writable(out, folder=True)
    data = load_data(options)
    recipe = _recipe(options.epochs)
    torch.manual_seed(options.seed)
    origin = origin_of(options, data.x.size(1), outputs_of(data))
    kind = options.model.rpartition(".")[2]
    model = float_form(origin.build(), options.quant)
    if out is not None:
        _write_text(out / "train.yaml", options.as_yaml)
    numbers = data.y.is_floating_point()
    unit = " -MSE" if numbers else " %"
    print(f"{'model':<9}  {'val' + unit:>9}  {'test' + unit:>9}  {'bytes':>10}  {'seconds':>7}", flush=True)
    start = time.perf_counter()
    with EpochBar("float") as bar:
        trained = fit_float(model, data, recipe, on_epoch=bar)
    _show("float", trained, start, numbers)
    start = time.perf_counter()
    with EpochBar("distilled") as bar:
        result = distilled = born_again(trained, data, recipe, on_epoch=bar)
    _show("distilled", distilled, start, numbers)
    if out is not None:
        for folder in (out / "checkpoints", out / "logs"):
            folder.mkdir(exist_ok=True)
        for name, stage in (("float", trained), ("distilled", distilled)):
            save_checkpoint(stage.model, out / "checkpoints" / f"{kind}-{name}{CHECKPOINT}", origin)
    for bits in options.bits:
        start = time.perf_counter()
        with EpochBar(f"INT{bits}") as bar:
            result = fit_quantized(distilled.model, data, bits, config=options.quant, recipe=recipe, on_epoch=bar)
        _show(f"INT{bits}", result, start, numbers)
        if out is not None:
            name = f"{kind}-{bits}bit"
            save_checkpoint(result.model, out / "checkpoints" / f"{name}{CHECKPOINT}", origin)
            save_packed(pack_model(result.model), out / f"{name}{PACKED}", origin=origin.to_dict())
            bar.history.save(out / "logs" / f"{name}.csv")
        if options.report:
            _report(result.model, data, out / f"{name}.html", distilled.model, bar.history)
    print(f"\n{summary(result.model)}")


def _recipe(epochs: int | None) -> Recipe:
    if epochs is None:
        return Recipe()
    return Recipe(
        float_stage=Stage(epochs=epochs, evaluate_every=2),
        quantized_stage=Stage(epochs=epochs, cosine=True, evaluate_every=2),
        matching_steps=2 * epochs,
    )


def _show(name: str, result: StageResult, start: float, numbers: bool) -> None:
    seconds = time.perf_counter() - start
    found = (result.val_accuracy, result.test_accuracy)
    scores = "  ".join(f"{score:9.4g}" if numbers else f"{100 * score:9.1f}" for score in found)
    print(f"{name:<9}  {scores}  {model_bytes(result.model):>10,}  {seconds:7.1f}", flush=True)


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def load(options: Any, data: Any) -> Loaded:
    """The model in ``options.checkpoint``."""
    return read_model(options.checkpoint, Readers(options, data.x.size(1), outputs_of(data)))


def convert(model: nn.Module, data: Any, bits: int | None, config: Any) -> nn.Module:
    """A converted and calibrated copy of a float model."""
    if config is None:
        qmodel = quantize_model(model, bits or DEFAULT_BITS)
    else:
        qmodel = quantize_model(model, config=config if bits is None else replace(config, bits=bits))
    return calibrate(qmodel, data)


def quantize(options: Any) -> None:
    """Convert a float checkpoint without training."""
    expect_suffix(options.out, PACKED, CHECKPOINT)
    expect_writable(options.out)
    data = load_data(options)
    loaded = load(options, data).expect(
        "float", path=options.checkpoint, remedy="`qgnn pack` turns a converted one into a packed model"
    )
    with working(["convert and calibrate", "measure", "write"]) as begin:
        begin()
        qmodel = convert(loaded.model, data, options.bits, options.quant)
        begin()
        before, after = _scores(loaded.model, data), _scores(qmodel, data)
        size = model_bytes(loaded.model)
        begin()
        _write(qmodel, options.out, loaded.origin)
    for split in before:
        print(f"{split}: {before[split]:.4f} in float, {after[split]:.4f} converted")
    print(f"{options.out}: {model_bytes(qmodel):,} bytes of weights and ranges, {size:,} in float")


def _write(qmodel: nn.Module, path: Path, origin: Origin) -> None:
    if path.suffix == PACKED:
        save_packed(pack_model(qmodel), path, origin=origin.to_dict())
    else:
        save_checkpoint(qmodel, path, origin)


def pack(options: Any) -> None:
    """Turn a converted checkpoint into a packed model."""
    expect_suffix(options.out, PACKED)
    expect_writable(options.out)
    loaded = read_model(options.checkpoint, Readers(options, options.in_channels, options.out_channels))
    loaded.expect("converted", path=options.checkpoint, remedy="convert a float one first: `qgnn quantize`")
    packed = pack_model(loaded.model)
    save_packed(packed, options.out, origin=loaded.origin.to_dict())
    size = packed_bytes(packed)
    print(f"{options.out}: {size.packed:,} bytes of tensors, {size.float:,} in float ({size.ratio:.1f}x)")
    print(summary(packed))


def evaluate(options: Any) -> bool | None:
    """Print the accuracy (of a regression the negative mean squared error) on every split."""
    data = load_data(options)
    with working(["load", "run"]) as begin:
        begin()
        loaded = load(options, data)
        begin()
        found = _scores(loaded.model, data)
    for split, value in found.items():
        print(f"{split}: {value:.4f}")
    reference = found.get("test", next(iter(found.values())))
    if options.min_accuracy is not None and not reference >= options.min_accuracy:
        print(f"qgnn: {reference:.4f} is below --min_accuracy {options.min_accuracy}")
        return False
    return None


@torch.no_grad()
def _scores(model: nn.Module, data: Any) -> dict[str, float]:
    outputs = run_model(model.eval(), data)
    if outputs.size(0) != data.y.size(0):
        raise ValueError(
            f"Expected one row of outputs per label (got {list(outputs.shape)} for {list(data.y.shape)} labels)"
        )
    masks = {split: data.get(f"{split}_mask") for split in SPLITS}
    found = {split: score(outputs, data.y, mask) for split, mask in masks.items() if mask is not None}
    return found or {"all": score(outputs, data.y)}


def write_report(options: Any) -> None:
    """Write the page of pictures."""
    expect_suffix(options.out, ".html", ".htm")
    expect_writable(options.out)
    data = load_data(options)
    loaded = load(options, data).expect(
        "converted", path=options.checkpoint, remedy="a report needs the ranges of a converted model"
    )
    reference = None
    if options.reference is not None:
        readers = Readers(options, data.x.size(1), outputs_of(data))
        reference = read_model(options.reference, readers).expect(
            "float", path=options.reference, remedy="pass the float checkpoint as --reference"
        )
    float_model = None if reference is None else reference.model
    _report(loaded.model, data, options.out, float_model, options.history)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes; open it in a browser")


def _report(qmodel: nn.Module, data: Any, path: Path, float_model: nn.Module | None, history: Any) -> None:
    from ..analysis.report import STEPS, report

    if float_model is not None and is_quantized(float_model):
        float_model = restore_model(float_model)
    with working(list(STEPS)) as begin:
        report(qmodel, data, path, float_model=float_model, history=history, progress=begin)


def suggest(options: Any) -> bool | None:
    """Propose bit widths under a budget."""
    from ..analysis.sensitivity import Budget, suggest_bits

    if options.out is not None:
        expect_suffix(options.out, ".yaml", ".yml")
        expect_writable(options.out)
    budget = Budget(options.max_bytes, options.max_seconds, options.max_drop)
    data = load_data(options)
    loaded = load(options, data).expect("float", path=options.checkpoint, remedy="pass the float checkpoint")
    suggestion = suggest_bits(loaded.model, data, budget=budget, config=options.quant, progress=True)
    print(suggestion)
    if options.out is not None:
        suggestion.save(options.out)
        picture = options.out.with_suffix(".png")
        suggestion.plot(picture)
        print(f"{options.out}: pass it on with --quant; the frontier: {picture}")
    return suggestion.meets_budget
