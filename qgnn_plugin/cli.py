"""Command line: ``qgnn train`` runs the whole recipe on one of PyG's data sets."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .atomic import atomic_file
from .data import load_dataset
from .recipe import Recipe, Stage, StageResult, fit_float, fit_quantized
from .summaries import model_bytes, summary

__all__ = ["main"]

MODELS = ("GCN", "GAT", "GraphSAGE", "GIN")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qgnn", description="Low-bit graph neural networks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a float model, then its low-bit versions from it")
    train.add_argument("--dataset", default="demo", help="a data set of PyG, such as Photo; default the demo graph")
    train.add_argument("--root", help="folder of the data sets")
    train.add_argument("--model", choices=MODELS, default="GCN")
    train.add_argument("--hidden", type=int, default=64, help="hidden channels")
    train.add_argument("--layers", type=int, default=2)
    train.add_argument("--dropout", type=float, default=0.5)
    train.add_argument("--bits", type=int, nargs="+", choices=(2, 4, 8), default=[8, 4, 2])
    train.add_argument("--epochs", type=int, help="epochs of either stage; default 200 float and 150 quantized")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", type=Path, help="folder for the state dicts, made if missing")
    return parser


def _build(name: str, args: argparse.Namespace, in_channels: int, out_channels: int) -> torch.nn.Module:
    import torch_geometric.nn as pyg

    options: dict[str, Any] = {"dropout": args.dropout}
    if name == "GAT":
        options["heads"] = 8
    return getattr(pyg, name)(in_channels, args.hidden, args.layers, out_channels, **options)


def _recipe(epochs: int | None) -> Recipe:
    if epochs is None:
        return Recipe()
    return Recipe(
        float_stage=Stage(epochs=epochs, evaluate_every=2),
        quantized_stage=Stage(epochs=epochs, cosine=True, evaluate_every=2),
    )


def _save(model: torch.nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(model.state_dict(), file)


def _train(args: argparse.Namespace) -> None:
    # Weight decay drives unused weights into denormal numbers, which a CPU computes with a hundred times slower.
    torch.set_flush_denormal(True)
    data = load_dataset(args.dataset, args.root, seed=args.seed)
    recipe = _recipe(args.epochs)
    torch.manual_seed(args.seed)
    model = _build(args.model, args, data.x.size(1), int(data.y.max()) + 1)
    print(f"{'bits':>4}  {'val %':>6}  {'test %':>6}  {'bytes':>10}  {'seconds':>7}")

    def show(bits: int, result: StageResult, start: float) -> None:
        seconds = time.perf_counter() - start
        scores = f"{100 * result.val_accuracy:6.1f}  {100 * result.test_accuracy:6.1f}"
        print(f"{bits:>4}  {scores}  {model_bytes(result.model):>10,}  {seconds:7.1f}", flush=True)
        if args.out is not None:
            _save(result.model, args.out / f"{args.model}-{bits}bit.pt")

    start = time.perf_counter()
    show(32, fit_float(model, data, recipe), start)
    for bits in args.bits:
        start = time.perf_counter()
        result = fit_quantized(model, data, bits, recipe=recipe)
        show(bits, result, start)
    print(f"\n{summary(result.model)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        _train(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"qgnn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
