"""Mixed widths that `suggest_bits` proposes against one width everywhere, at equal bytes of codes.

python -m benchmarks.mixed_precision --root data --seeds 3     # finished runs are kept; --report only writes the table
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch_geometric.nn import GCN

import qgnn_plugin as qgnn
from qgnn_plugin.analysis.comparison import score
from qgnn_plugin.analysis.sensitivity import Budget, suggest_bits
from qgnn_plugin.data import load_dataset, to_sparse_features
from qgnn_plugin.inputs import run_model
from qgnn_plugin.recipe import born_again, fit_float, fit_quantized

from .environment import compact_json, write_atomically

RESULTS = Path(__file__).parent / "results"
DATASETS = ("Cora", "PubMed", "Photo")
HIDDEN = 64
LABELS = {
    "4": "4 bits",
    "mixed4": "mixed, at most the bytes of 4 bits",
    "mixed3": "mixed, half way to 2 bits",
    "2": "2 bits",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder of the data sets of PyG")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only write the table")
    args = parser.parse_args(argv)
    path = args.out / "mixed-precision.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    torch.set_flush_denormal(True)
    done = {(row["dataset"], row["seed"]) for row in rows}
    for seed in range(0 if args.report else args.seeds):
        for name in args.datasets:
            if (name, seed) not in done:
                rows.append(run(name, args.root, seed))
                write_atomically(path, compact_json(rows) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    (args.out / "mixed-precision.md").write_text(report(rows))


def run(name: str, root: str | None, seed: int) -> dict[str, Any]:
    """One trained float model, and what becomes of it at each choice of widths."""
    data = to_sparse_features(load_dataset(name, root, seed=seed))
    torch.manual_seed(seed)
    classes = int(data.y.max()) + 1
    model = born_again(fit_float(GCN(data.num_features, HIDDEN, 2, classes, dropout=0.5), data), data).model
    base = qgnn.QuantConfig()
    at4 = suggest_bits(model, data, budget=Budget(drop=1.0), config=base).uniform
    budgets = {"mixed4": at4[4].bytes, "mixed3": (at4[4].bytes + at4[2].bytes) // 2}
    found: dict[str, Any] = {"dataset": name, "seed": seed, "float": test(model, data), "choices": {}}
    configs = {str(bits): (_uniform(base, bits), at4[bits].bytes, {}) for bits in (4, 2)}
    for label, limit in budgets.items():
        suggestion = suggest_bits(model, data, budget=limit, config=base)
        configs[label] = (suggestion.config, suggestion.chosen.bytes, dict(suggestion.chosen.widths))
    for label, (config, size, widths) in configs.items():
        untrained = qgnn.calibrate(qgnn.quantize_model(model, config=config), data)
        trained = fit_quantized(model, data, config.bits, config=config)
        found["choices"][label] = {
            "bytes": size,
            "widths": widths,
            "untrained": test(untrained, data),
            "trained": trained.test_accuracy,
        }
    return found


def _uniform(base: qgnn.QuantConfig, bits: int) -> qgnn.QuantConfig:
    return qgnn.QuantConfig.from_dict({**base.to_dict(), "bits": bits, "attention_bits": 8})


@torch.no_grad()
def test(model: nn.Module, data: Any) -> float:
    return score(run_model(model.eval(), data), data.y, data.test_mask)


def report(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "# Mixed widths at equal bytes",
        "",
        "`python -m benchmarks.mixed_precision --root data`: a two-layer GCN with 64 hidden channels; test accuracy in",
        "percent, mean ± standard deviation over seeds of initial weights (and splits, where there is no public one).",
        "Bytes are those of all codes, of weights and of what passes the other sites in one forward pass. *Mixed* is",
        "what `suggest_bits` proposes from validation nodes within the bytes of 4 bits everywhere, or half way between",
        "4 and 2 bits everywhere. *Float* is distilled from itself, *untrained* is calibration of it alone, *trained*",
        "the recipe (`qgnn_plugin.recipe`). All else is the default configuration. So few seeds show what to expect",
        "and tell no difference of tenths of a point. Times are no part of it: but for rounding the figures do not",
        "depend on the machine (AMD EPYC, one thread).",
        "",
        "| | widths | bytes | untrained | trained |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["dataset"] for row in rows):
        mine = [row for row in rows if row["dataset"] == name]
        seeds = f"{len(mine)} seed{'s' * (len(mine) != 1)}"
        lines.append(f"| {name}, {seeds} | float | | {_spread(row['float'] for row in mine)} | |")
        for label, text in LABELS.items():
            each = [row["choices"][label] for row in mine]
            size = round(statistics.mean(choice["bytes"] for choice in each))
            scores = (_spread(choice[key] for choice in each) for key in ("untrained", "trained"))
            lines.append(f"| | {text} | {size:,} | {' | '.join(scores)} |")
    return "\n".join([*lines, ""])


def _spread(values: Iterable[float]) -> str:
    found = [100 * value for value in values]
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}" if len(found) > 1 else f"{found[0]:.1f}"


if __name__ == "__main__":
    main()
