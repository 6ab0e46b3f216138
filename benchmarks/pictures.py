"""Pictures of the README from result files: ``python -m benchmarks.pictures``, or ``make pictures``.

``accuracy-size.png`` has test accuracy against the bytes of the packed model, ``speed.png`` speed over the fastest
float path of all peers.  Each is drawn on a light and (``-dark``) on a dark ground, told apart by shape as well as by
colour.
The float models are those that were distilled from themselves, as the low-bit ones are from them, where there are such.
Nothing is measured here: accuracy and time are those of ``accuracy.json`` and ``cpu.json``; bytes are those of
a converted model of the same shape, which do not depend on what was learned.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgnn_plugin import quantize_model
from qgnn_plugin.analysis.figures import Drawing, png
from qgnn_plugin.atomic import atomic_file
from qgnn_plugin.summaries import model_bytes

from .models import build_model
from .peers import OVER_PEERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_against_size", "main", "speed_over_peers"]

RESULTS = Path(__file__).parent / "results"
SHAPES = {"Cora": (1433, 7), "PubMed": (500, 3), "Photo": (745, 8), "CS": (6805, 15)}  # features, classes
SHOWN = ("GCN-64", "GAT-8x8", "GraphSAGE")
WIDTHS = {"INT2": 2, "INT4": 4, "INT8": 8, "FP32": None}
DISTILLED = "FP32 self-distilled"
KIB = 1024
MARKERS = ("o", "s", "^")
HATCHES = ("", "////", "....")
Rows = Sequence[Mapping[str, Any]]


def accuracy_against_size(runs: Rows) -> Drawing:
    """A panel per data set; of every model its widths, joined, means and standard deviations over seeds."""
    datasets = [name for name in SHAPES if any(run["dataset"] == name for run in runs)]

    def draw(figure: Figure) -> None:
        figure.set_size_inches(9.0, 3.1)
        panels = figure.subplots(1, len(datasets), squeeze=False)[0]
        for panel, dataset in zip(panels, datasets, strict=True):
            for marker, model in zip(MARKERS, SHOWN, strict=True):
                points = _points(runs, dataset, model)
                if points:
                    sizes, means, spreads, _ = zip(*points, strict=True)
                    style = {"marker": marker, "markersize": 5, "capsize": 2, "elinewidth": 0.7}
                    panel.errorbar(sizes, means, spreads, label=model, **style)
                for size, mean, _, name in points if model == SHOWN[0] else ():
                    ground = {"facecolor": panel.get_facecolor(), "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
                    above = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 7, "bbox": ground}
                    panel.annotate(name, (size, mean), **above)
            panel.set_xscale("log", base=4)
            panel.xaxis.set_major_formatter(lambda size, _: f"{size / KIB:g}")
            panel.set(title=dataset, xlabel="model, KiB")
            panel.margins(x=0.15)
        panels[0].set_ylabel("test accuracy, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN))

    return draw


def _points(runs: Rows, dataset: str, model: str) -> list[tuple[int, float, float, str]]:
    """Bytes, mean and standard deviation of accuracy in percent, and name of every width that was measured."""
    found = [run["results"] for run in runs if (run["dataset"], run["model"]) == (dataset, model)]
    points = []
    for name, bits in WIDTHS.items():
        measured = DISTILLED if bits is None and all(DISTILLED in results for results in found) else name
        scores = [100 * results[measured]["test"] for results in found if measured in results]
        if scores:
            plain = build_model(model, *SHAPES[dataset], fast=False)
            size = model_bytes(plain if bits is None else quantize_model(plain, bits=bits))
            points.append((size, statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0, name))
    return points


def speed_over_peers(rows: Rows, threads: int = 1) -> Drawing:
    """Bars of speed over the fastest float path of all peers, by model and width."""
    shown = [row for row in rows if row["threads"] == threads]
    models = list(dict.fromkeys(row["model"] for row in shown))
    widths = [name for name in WIDTHS if name != "FP32"]

    def draw(figure: Figure) -> None:
        figure.set_size_inches(5.5, 2.9)
        axes = figure.subplots()
        edge = figure.get_edgecolor()
        for place, (width, hatch) in enumerate(zip(widths, HATCHES, strict=True)):
            times = {row["model"]: row[OVER_PEERS] for row in shown if row["side"] == width}
            at = [i + (place - 1) * 0.27 for i, model in enumerate(models) if model in times]
            bars = axes.bar(at, list(times.values()), 0.25, hatch=hatch, edgecolor=edge, label=width)
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.axhline(1, linestyle="--", color=axes.xaxis.label.get_color(), linewidth=1)
        axes.set_xticks(range(len(models)), models)
        axes.set_title(f"one forward pass, {threads} thread{'s' * (threads > 1)} of a CPU")
        axes.set_ylabel("speed, fastest float = 1")
        axes.legend()

    return draw


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what there are results for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of accuracy.json and cpu.json")
    parser.add_argument("--out", type=Path, default=None, help="folder of the pictures (default: that of the results)")
    options = parser.parse_args(argv)
    out = options.out or options.results
    out.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Drawing] = {}
    if (found := _read(options.results / "accuracy.json")) and found.get("runs"):
        drawings["accuracy-size"] = accuracy_against_size(found["runs"])
    if (found := _read(options.results / "cpu.json")) and "inference" in found:
        drawings["speed"] = speed_over_peers(found["inference"]["data"]["rows"])
    for name, draw in drawings.items():
        for suffix, dark in (("", False), ("-dark", True)):
            with atomic_file(out / f"{name}{suffix}.png") as file:
                file.write(png(draw, dark=dark))
    print(f"{out}: {', '.join(drawings) or 'no results to draw'}")


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


if __name__ == "__main__":
    main()
