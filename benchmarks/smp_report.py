"""Tables and plots of ``make bench-smp``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .smp_settings import BASELINES, PLAIN_WIDTHS, WIDTHS

__all__ = ["markdown", "plot"]

Cells = list[dict[str, Any]]
INTRODUCTION = """\
INT4 training with a bound that binds, without dropout.  In the last steps, right of the line in the plot, only the
multipliers move: a weight on the edge between two codes keeps jumping, and the constraint of its layer with it."""
AIMS = {"deep FP32": 80.0, "deep INT4": 79.0}
LARGEST_RATIO = 1.02

PLAIN = """\
The same with plain steps `H <- A~ H` (teleport 0), which average everything away in the end.  *On* is
`SMPConfig.for_steps(K)`: a bound of `2 / K^2` on each step, so that all of them together change about what is there.
Of 1, 2 and 4 `/ K^2` and of 8 and 16 sweeps it had the best validation accuracy on the first two seeds of Photo;
nothing was chosen on the others.  A corrected step takes 17 products with `A~` instead of one."""

NOTES = """\
Test accuracy in percent at the best validation epoch, mean and standard deviation over seeds; all settings were chosen
on validation accuracy.  *Energy* is `tr(H' (I - A~) H) / ||H||^2` of a layer's result: 0 where neighbours no longer
differ.  *Error* is the norm of what quantized messages change in the propagation's result, over the norm of the result.
"""


def markdown(cells: Cells) -> str:
    """Every part that has finished runs."""
    sections: dict[str, Callable[[Cells], list[str]]] = {
        "constraint": _constraint,
        "depth": _depth,
        "propagation": _propagation,
        "plain": _plain,
        "shallow": _shallow,
        "cost": _cost,
    }
    lines = [NOTES]
    for part, section in sections.items():
        if _of(cells, part):
            lines += [*section(cells), ""]
    return "\n".join(lines)


def _of(cells: Cells, part: str, *what: Any) -> Cells:
    return [c for c in cells if c["part"] == part and (not what or tuple(c["what"]) == what)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def _values(cells: Cells, name: str, field: str = "test", scale: float = 1.0) -> list[float]:
    found = [cell["results"][name].get(field) for cell in cells if name in cell["results"]]
    return [scale * value for value in found if value is not None]


def _constraint(cells: Cells) -> list[str]:
    lines = ["## The constraint is met", "", INTRODUCTION, ""]
    rows, missed = [], 0
    for cell in _of(cells, "constraint"):
        for model, result in cell["results"].items():
            for layer, state in result["final"].items():
                met = 0 <= state["constraint"] <= LARGEST_RATIO
                missed += not met
                rows.append((cell["what"][0], model, layer, f"{state['constraint']:.4f}", f"{state['multiplier']:.3f}"))
    lines += _table(("data set", "model", "layer", "g / bound", "multiplier"), rows)
    verdict = "All of them lie" if not missed else f"{missed} of {len(rows)} do not lie"
    return [
        *lines,
        "",
        f"{verdict} in [0, {LARGEST_RATIO}].  Over the steps: [smp-constraint.png](smp-constraint.png).",
    ]


def _depth(cells: Cells) -> list[str]:
    runs = _of(cells, "depth")
    lines = ["## Depth: PyG's GCN", ""]
    rows, missed = [], []
    for name in runs[0]["results"]:
        scores = _values(runs, name, scale=100)
        energies = [cell["results"][name]["energies"] for cell in runs]
        ends = [f"{statistics.mean(e[i] for e in energies):.2g}" for i in (0, len(energies[0]) // 2, -2)]
        rows.append((name, str(len(energies[0])), str(len(runs)), _spread(scores), *ends))
        if name in AIMS and statistics.mean(scores) < AIMS[name]:
            missed.append(f"{name} misses its aim of {AIMS[name]:.0f} %.")
    header = ("model", "layers", "seeds", "accuracy", "energy, first layer", "middle", "last hidden")
    verdict = " ".join(missed) or f"Aims ({', '.join(f'{k} {v:.0f} %' for k, v in AIMS.items())}) are met."
    return [*lines, *_table(header, rows), "", f"{verdict}  Energy of every layer: [smp-depth.png](smp-depth.png)."]


def paired(off: Sequence[float], on: Sequence[float]) -> tuple[str, str]:
    """Mean and spread of the difference by seed, and what it says: better or worse where it exceeds its spread."""
    differences = [b - a for a, b in zip(off, on, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}", "one seed"
    spread = statistics.stdev(differences)
    verdict = "no difference" if abs(mean) <= spread else "better" if mean > 0 else "worse"
    return f"{mean:+.2f} ± {spread:.2f}", verdict


def _propagation(cells: Cells) -> list[str]:
    depths = sorted({cell["what"][0] for cell in _of(cells, "propagation")})
    lines = [
        "## Propagation depth",
        "",
        "An MLP and K steps.  *Off* is APPNP; *on* bounds the change of every step.  The difference is paired over",
        "seeds; *better* and *worse* mean that it exceeds its standard deviation.",
        "",
    ]
    lines += _sweep(("K",), {(str(depth),): _of(cells, "propagation", depth) for depth in depths})
    baselines = _of(cells, "baseline")
    if baselines:
        rows = []
        for depth in depths:
            runs = _of(cells, "baseline", depth)
            scores = [_spread(_values(runs, name, scale=100)) for name in BASELINES]
            energies = [_spread(_values(runs, name, "energy"), 3) for name in BASELINES]
            appnp = _spread(_values(_of(cells, "propagation", depth), "FP32 off", scale=100))
            rows.append((str(depth), str(len(runs)), appnp, *scores, *energies))
        header = ("K", "seeds", "APPNP", *BASELINES, *(f"energy {name}" for name in BASELINES))
        lines += ["", "Other FP32 models of the same depth:", "", *_table(header, rows)]
    return [*lines, "", "Accuracy over K: [smp-propagation.png](smp-propagation.png)."]


def _plain(cells: Cells) -> list[str]:
    whats = sorted({tuple(cell["what"]) for cell in _of(cells, "plain")})
    groups = {(dataset, str(steps)): _of(cells, "plain", dataset, steps) for dataset, steps in whats}
    lines = ["## Propagation without a teleport", "", PLAIN, "", *_sweep(("data set", "K"), groups, PLAIN_WIDTHS), ""]
    rows = []
    for where, runs in groups.items():
        states = [_values(runs, f"FP32 {state}", scale=100) for state in ("off", "on", "teleport")]
        rows.append((*where, *map(_spread, states), *paired(states[2], states[1])))
    header = ("data set", "K", "off", "on", "teleport 0.1 instead", "on - teleport", "")
    return [*lines, "What a teleport, known before training, does instead, in FP32:", "", *_table(header, rows)]


def _sweep(
    names: Sequence[str], groups: Mapping[tuple[str, ...], Cells], widths: Iterable[str] = tuple(WIDTHS)
) -> list[str]:
    """A row per group of runs and width, SMP off and on; then where it is better, and where it is not."""
    rows = []
    regimes: dict[str, list[str]] = {"better": [], "worse": [], "no difference": [], "one seed": []}
    for where, runs in groups.items():
        for width in widths:
            off, on = (_values(runs, f"{width} {state}", scale=100) for state in ("off", "on"))
            difference, verdict = paired(off, on)
            regimes[verdict].append(f"{', '.join(where[:-1])} K = {where[-1]} at {width} ({difference})".lstrip())
            more = []
            for field in ("energy", "error"):
                more += [_spread(_values(runs, f"{width} {state}", field), 3) for state in ("off", "on")]
            rows.append((*where, width, str(len(off)), _spread(off), _spread(on), difference, verdict, *more))
    header = (*names, "width", "seeds", "off", "on", "on - off", "", "energy off", "on", "error off", "on")
    found = [f"- {verdict}: {', '.join(where)}" for verdict, where in regimes.items() if where]
    return [*_table(header, rows), "", *found]


def _shallow(cells: Cells) -> list[str]:
    runs = _of(cells, "shallow")
    lines = ["## Two layers lose nothing", "", "GCN, hidden 64; differences to *off*, paired over seeds.", ""]
    rows = []
    for width in WIDTHS:
        off = _values(runs, f"{width} off", scale=100)
        row = [width, str(len(off)), _spread(off)]
        for state in ("on", "binding"):
            on = _values(runs, f"{width} {state}", scale=100)
            row += [_spread(on), " ".join(f"{part}," for part in paired(off, on)).rstrip(",")]
        rows.append(row)
    header = ("width", "seeds", "off", "default bound", "difference", "binding bound", "difference")
    return [*lines, *_table(header, rows)]


def _cost(cells: Cells) -> list[str]:
    lines = ["## Cost", "", "INT4; median of interleaved rounds on one thread, and how many times *off*.", ""]
    rows = []
    for model, kinds in _of(cells, "cost")[0]["results"].items():
        for kind, states in kinds.items():
            text = [f"{1e3 * t['seconds']:.1f} ms ({t['over off']:.2f}x)" for t in states.values()]
            rows.append((model, kind, *text))
        header = ("model", "", *states)
    return [*lines, *_table(header, rows)]


# Plots ################################################################################################################


def plot(cells: Cells, out: Path) -> None:
    """PNG files beside the tables, of every part that has finished runs."""
    import matplotlib

    matplotlib.use("Agg")
    if runs := _of(cells, "constraint"):
        _plot_constraint(runs, out / "smp-constraint.png")
    if runs := _of(cells, "depth"):
        _plot_depth(runs, out / "smp-depth.png")
    if _of(cells, "propagation"):
        _plot_propagation(cells, out / "smp-propagation.png")


def _axes(rows: int, columns: int, width: float = 5.0) -> Any:
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width * columns, 3.2 * rows), squeeze=False, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_constraint(runs: Cells, path: Path) -> None:
    figure, axes = _axes(2, len(runs))
    for column, cell in enumerate(runs):
        for model, result in cell["results"].items():
            for layer, paths in result["paths"].items():
                for row, field in enumerate(("constraint", "multiplier")):
                    axes[row][column].plot(paths[field], label=f"{model} {layer}", linewidth=1)
            for axis in axes[:, column]:
                axis.axvline(result["trained"], color="black", linewidth=0.5)
        axes[0][column].axhline(1, color="black", linewidth=0.5)
        axes[0][column].set(title=cell["what"][0], ylabel="g / bound", yscale="log")
        axes[1][column].set(xlabel="step", ylabel="multiplier")
        axes[1][column].legend(fontsize=8)
    _save(figure, path)


def _plot_depth(runs: Cells, path: Path) -> None:
    figure, axes = _axes(1, 1, 6.0)
    for name in runs[0]["results"]:
        layers = zip(*(cell["results"][name]["energies"] for cell in runs), strict=True)
        axes[0][0].plot([max(statistics.mean(layer), 1e-12) for layer in layers], label=name)
    axes[0][0].set(xlabel="layer", ylabel="tr(H'LH) / ||H||²", yscale="log", title="Dirichlet energy")
    axes[0][0].legend(fontsize=8)
    _save(figure, path)


def _plot_propagation(cells: Cells, path: Path) -> None:
    depths = sorted({cell["what"][0] for cell in _of(cells, "propagation")})
    figure, axes = _axes(1, len(WIDTHS), 4.0)
    for axis, width in zip(axes[0], WIDTHS, strict=True):
        for state in ("off", "on"):
            scores = [_values(_of(cells, "propagation", depth), f"{width} {state}", scale=100) for depth in depths]
            spread = [statistics.stdev(s) if len(s) > 1 else 0.0 for s in scores]
            axis.errorbar(depths, [statistics.mean(s) for s in scores], spread, label=f"SMP {state}", capsize=3)
        if width == "FP32" and _of(cells, "baseline"):
            for name in BASELINES:
                means = [statistics.mean(_values(_of(cells, "baseline", d), name, scale=100) or [0]) for d in depths]
                axis.plot(depths, means, linewidth=1, linestyle="--", label=name)
        axis.set(title=width, xlabel="K", ylabel="test accuracy, %", xscale="log", xticks=depths, xticklabels=depths)
        axis.minorticks_off()
        axis.legend(fontsize=8)
    _save(figure, path)
