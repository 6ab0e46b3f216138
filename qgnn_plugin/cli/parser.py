"""What the commands take: one parser each, with YAML configurations, on jsonargparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt

from .. import __version__
from ..config import QuantConfig
from . import commands, inspect
from .bench import bench

__all__ = ["COMMANDS", "parse"]

EPILOG = """Exit codes: 0 done; 1 data, model or file is not as expected; 2 wrong usage; 3 done, but the result misses
what was asked for; 130 interrupted. Every command takes --config FILE.yaml and --print_config. Completion of the shell:
eval "$(qgnn --print_completion shtab-bash)"."""
Width = Literal[1, 2, 4, 8]


class Command(NamedTuple):
    """One sub-command: what its help says, its parser, and what runs it (``False``: the result misses a target)."""

    help: str
    fill: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], bool | None]


def parse(argv: Sequence[str] | None = None) -> tuple[str, Namespace]:
    """The command and its options, configurations built.

    Raises:
        SystemExit: With 0 after ``--help`` and the like, with 2 for wrong usage.
    """
    set_parsing_settings(add_print_completion_argument=True)
    parser = ArgumentParser(
        prog="qgnn", description="Graph neural networks in 1, 2, 4 or 8 bits.", version=__version__, epilog=EPILOG
    )
    chosen = parser.add_subcommands(dest="command", required=True)
    parsers = {}
    for name, command in COMMANDS.items():
        sub = parsers[name] = ArgumentParser(description=command.help)
        sub.add_argument("--config", action="config", help="YAML file with any of these options")
        command.fill(sub)
        chosen.add_subcommand(name, sub, help=command.help.partition(".")[0].partition(":")[0])
    parsed = parser.parse_args(None if argv is None else list(argv))
    name = parsed.command
    text = parsers[name].dump(parsed[name], skip_none=True)
    try:
        options = parsers[name].instantiate(parsed[name])
    except (ValueError, TypeError) as error:
        parsers[name].error(str(error))
    options.as_yaml = text
    return name, options


# Groups of options ####################################################################################################


def _data(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        type=str,
        default="demo",
        help="'demo' (Cora, which comes along), a data set of PyG such as Photo or Planetoid/Cora, or a saved Data",
    )
    group.add_argument("--root", type=Path | None, default=None, help="folder of the data sets of PyG")
    group.add_argument("--split", type=int, default=0, help="which of several public splits")
    group.add_argument("--seed", type=int, default=0, help="of initial weights and of random splits")


def _model(parser: ArgumentParser, default: str | None = None) -> None:
    group = parser.add_argument_group("model")
    stored = "" if default else "; by default the one that the file names"
    group.add_argument(
        "--model",
        type=str | None,
        default=default,
        help=f"class of torch_geometric.nn, such as GAT, or an import path, such as my_package.nets.Net{stored}",
    )
    group.add_argument("--hidden", type=PositiveInt, default=64, help="hidden channels")
    group.add_argument("--layers", type=PositiveInt, default=2, help="number of layers")
    group.add_argument("--dropout", type=ClosedUnitInterval, default=0.5, help="rate of dropout")
    group.add_argument(
        "--model_args", type=dict[str, Any], default={}, help='further arguments of the class, \'{"heads": 4}\''
    )


def _widths(parser: ArgumentParser, default: list[int]) -> None:
    parser.add_argument("--bits", type=Width, nargs="+", default=default, help="bit widths")


def _quantization(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--quant",
        type=QuantConfig | None,
        default=None,
        sub_configs=True,
        help="everything else about the conversion: fields of QuantConfig, or a YAML file of them",
    )


def _checkpoint(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("checkpoint", type=Path, help=what)


def _seconds(parser: ArgumentParser) -> None:
    parser.add_argument("--seconds", type=PositiveFloat, default=5.0, help="about how long to time each model")


# Commands #############################################################################################################


def _train(parser: ArgumentParser) -> None:
    _data(parser)
    _model(parser, "GCN")
    _widths(parser, [8, 4, 2])
    _quantization(parser)
    parser.add_argument(
        "--epochs", type=PositiveInt | None, default=None, help="of either stage; those of the recipe by default"
    )
    parser.add_argument(
        "--out",
        type=Path | None,
        default=None,
        help="folder for packed models, checkpoints, reports and the configuration; made if missing",
    )
    parser.add_argument("--report", action="store_true", help="write an HTML report of every width to --out")


def _quantize(parser: ArgumentParser) -> None:
    _checkpoint(parser, "float checkpoint: of `qgnn train`, a state dict or a Lightning checkpoint")
    _data(parser)
    _model(parser)
    parser.add_argument("--bits", type=Width | None, default=None, help="bit width (default: that of --quant, else 4)")
    _quantization(parser)
    parser.add_argument(
        "--out", type=Path, required=True, help="packed model (.safetensors), or converted checkpoint (.pt)"
    )


def _pack(parser: ArgumentParser) -> None:
    _checkpoint(parser, "converted checkpoint: of `qgnn train` or `qgnn quantize`, or a state dict")
    _model(parser)
    parser.add_argument("--in_channels", type=PositiveInt | None, default=None, help="width of features, with --model")
    parser.add_argument("--out_channels", type=PositiveInt | None, default=None, help="of outputs, with --model")
    parser.add_argument("--out", type=Path, required=True, help="packed model (.safetensors)")


def _evaluate(parser: ArgumentParser) -> None:
    _checkpoint(parser, "packed model (.safetensors), or converted or float checkpoint")
    _data(parser)
    _model(parser)
    parser.add_argument(
        "--min_accuracy",
        type=ClosedUnitInterval | None,
        default=None,
        help="exit with 3 if the test accuracy is below",
    )


def _bench(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path | None, nargs="?", default=None, help="checkpoint or packed model; none: random weights"
    )
    _data(parser)
    _model(parser)
    _widths(parser, [4])
    _quantization(parser)
    _seconds(parser)
    parser.add_argument(
        "--reference", type=Path | None, default=None, help="float checkpoint that a packed model is compared with"
    )


def _inspect(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="file of a packed model or of packed embeddings")


def _report(parser: ArgumentParser) -> None:
    _checkpoint(parser, "converted checkpoint")
    _data(parser)
    _model(parser)
    parser.add_argument("--out", type=Path, required=True, help="the page (.html); pictures go to a folder beside it")
    parser.add_argument(
        "--history", type=Path | None, default=None, help="metrics.csv of a run that QuantizationMonitor has logged"
    )
    parser.add_argument("--reference", type=Path | None, default=None, help="float checkpoint to compare with")


def _suggest(parser: ArgumentParser) -> None:
    _checkpoint(parser, "float checkpoint")
    _data(parser)
    _model(parser)
    _quantization(parser)
    parser.add_argument("--max_bytes", type=PositiveInt | None, default=None, help="budget: bytes of all codes")
    parser.add_argument("--max_seconds", type=PositiveFloat | None, default=None, help="budget: time of a forward pass")
    parser.add_argument(
        "--max_drop", type=ClosedUnitInterval | None, default=None, help="budget: validation accuracy below float"
    )
    parser.add_argument("--out", type=Path | None, default=None, help="YAML file for --quant; a picture goes beside it")


COMMANDS = {
    "train": Command(
        "Train a float model, then its low-bit versions from it, and pack them: the whole recipe",
        _train,
        commands.train,
    ),
    "quantize": Command(
        "Convert a float checkpoint without training: ranges come from data, no labels are read",
        _quantize,
        commands.quantize,
    ),
    "pack": Command("Turn a converted checkpoint into a packed model file", _pack, commands.pack),
    "evaluate": Command("Measure the accuracy of a packed model or a checkpoint", _evaluate, commands.evaluate),
    "bench": Command("Compare a float model with its packed form: time, memory, size, agreement", _bench, bench),
    "inspect": Command(
        "Show what is in a packed file: layers, bits, bytes, ranges; and check it", _inspect, inspect.inspect
    ),
    "report": Command("Write a page of pictures about a converted model", _report, commands.write_report),
    "suggest": Command(
        "Propose bit widths per site under a budget: as a configuration to read, edit and pass on by --quant",
        _suggest,
        commands.suggest,
    ),
}
