"""Pictures of reports: each drawn on a light and on a dark ground, told apart by shape as well as by colour."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .error_report import ErrorReport
from .findings import DegreeError, LayerCost, Point, SiteValues
from .history import HIGH, LOW, MULTIPLIER, History, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawing", "accuracy", "costs", "degrees", "energies", "frontier", "histograms", "png", "training"]

Drawing = Callable[["Figure"], None]

DPI = 120
WIDTH = 8.0
BINS = 60
MOST_LEVELS = 16  # that are drawn as lines
MOST_PANELS = 30  # of one picture
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "////")
LIGHT = {
    "ground": "#ffffff",
    "ink": "#1b1f24",
    "grid": "#d5d9de",
    "colours": ("#0b57a4", "#c2410c", "#157347", "#7a2e9e"),
}
DARK = {
    "ground": "#15181d",
    "ink": "#e7eaee",
    "grid": "#3b424c",
    "colours": ("#79b8ff", "#ffb073", "#6fd8a0", "#d9a8ff"),
}


def png(draw: Drawing, *, dark: bool = False) -> bytes:
    """A drawing as PNG.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        from cycler import cycler
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'qgnn_plugin[report]'") from error
    theme: Mapping[str, Any] = DARK if dark else LIGHT
    style: Any = {
        "figure.facecolor": theme["ground"],
        "axes.facecolor": theme["ground"],
        "axes.edgecolor": theme["ink"],
        "axes.labelcolor": theme["ink"],
        "text.color": theme["ink"],
        "xtick.color": theme["ink"],
        "ytick.color": theme["ink"],
        "grid.color": theme["grid"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=theme["colours"]),
        "hatch.color": theme["ground"],
        "legend.frameon": False,
        "font.size": 9.0,
        "axes.titlesize": 8.5,
        "axes.labelsize": 9.0,
        "xtick.labelsize": 8.0,
        "ytick.labelsize": 8.0,
        "legend.fontsize": 8.0,
        "figure.constrained_layout.use": True,
    }
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, 4.0))
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def accuracy(points: Sequence[Point], what: str) -> Drawing:
    """Quality against bytes; what each point is stands beside the picture, where nothing can overlap."""

    def draw(figure: Figure) -> None:
        figure.set_size_inches(WIDTH, 3.4)
        axes = figure.subplots()
        uniform = [p for p in points if p.kind == "uniform"]
        axes.plot([p.bytes for p in uniform], [p.value for p in uniform], ":", color="C2", linewidth=1.2)
        shapes = iter(("o", "^", "v", "D", "P"))
        for point in points:
            colour = {"float": "C0", "this": "C1", "uniform": "C2"}[point.kind]
            shape = {"float": "s", "this": "*"}.get(point.kind) or next(shapes)
            size = 200 if point.kind == "this" else 55
            label = f"{point.name}\n{point.bytes:,} bytes, {point.value:.3f}"
            axes.scatter([point.bytes], [point.value], marker=shape, s=size, color=colour, zorder=3, label=label)
        low, high = min(p.value for p in points), max(p.value for p in points)
        pad = max(0.01, 0.2 * (high - low))
        axes.set_ylim(low - pad, high + pad)
        _log_ticks(axes, [p.bytes for p in points])
        axes.set_xlabel("bytes of the model's tensors")
        axes.set_ylabel(what)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), labelspacing=0.9)

    return draw


def _log_ticks(axes: Axes, values: Sequence[float], factor: float = 1.5) -> None:
    """A logarithmic axis that says 20k and not 2 x 10^4."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlim(min(values) / factor, max(values) * factor)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def histograms(sites: Sequence[SiteValues]) -> Drawing:
    """What passes each site, with its levels; of more than :data:`MOST_PANELS` those with the largest error."""
    if len(sites) > MOST_PANELS:
        worst = {site.name for site in sorted(sites, key=lambda site: -site.error)[:MOST_PANELS]}
        sites = [site for site in sites if site.name in worst]

    def draw(figure: Figure) -> None:
        columns = min(3, max(1, len(sites)))
        rows = max(1, -(-len(sites) // columns))
        figure.set_size_inches(WIDTH, 2.3 * rows + 0.2)
        grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        for axes, site in zip(grid, sites, strict=False):
            _histogram(axes, site)
        for axes in grid[len(sites) :]:
            axes.set_visible(False)

    return draw


def _histogram(axes: Axes, site: SiteValues) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.hist(site.values.numpy(), bins=BINS, color="C0", log=True)
    levels = site.levels.tolist()
    if len(levels) > MOST_LEVELS:
        axes.axvspan(levels[0], levels[-1], color="C1", alpha=0.18)
        levels = [levels[0], levels[-1]]
    for level in levels:
        axes.axvline(level, color="C1", linestyle="--", linewidth=1.0)
    width = f"{site.bits} bit" + "s" * (site.bits != 1)
    axes.set_title(f"{site.name}\n{width}, error {site.error:.1%}")
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False)
    axes.set_xlabel(site.unit)


def training(history: History) -> Drawing:
    """Ranges, and multipliers, over training."""
    lows, highs = history.with_prefix(LOW), history.with_prefix(HIGH)
    names = [name for name in lows if name in highs][: MOST_PANELS - 1]
    multipliers = history.with_prefix(MULTIPLIER)

    def draw(figure: Figure) -> None:
        panels = len(names) + bool(multipliers)
        columns = min(3, max(1, panels))
        rows = max(1, -(-panels // columns))
        figure.set_size_inches(WIDTH, 2.1 * rows + 0.2)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).reshape(-1)
        for axes, name in zip(grid, names, strict=False):
            for series, line in ((lows[name], "--"), (highs[name], "-")):
                axes.plot(series.steps, series.values, line, color="C0", linewidth=1.4)
            axes.fill_between(lows[name].steps, lows[name].values, highs[name].values, color="C0", alpha=0.12)
            axes.set_title(name)
        if multipliers:
            _multipliers(grid[len(names)], multipliers)
        for axes in grid[panels:]:
            axes.set_visible(False)
        figure.supxlabel("step", fontsize=9.0)

    return draw


def _multipliers(axes: Axes, multipliers: Mapping[str, Series]) -> None:
    for i, (name, series) in enumerate(multipliers.items()):
        axes.plot(series.steps, series.values, LINES[i % len(LINES)], color=f"C{i % 4}", label=name, linewidth=1.4)
    axes.set_title("multipliers")
    axes.legend()


def energies(report: ErrorReport) -> Drawing:
    """Dirichlet energy and quantization error per layer."""
    layers = report.layers

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        figure.set_size_inches(WIDTH, max(2.6, 0.55 * len(layers) + 1.5))
        names = [layer.name or "(model)" for layer in layers]
        pairs = [("float", [_or_zero(layer.float_energy) for layer in layers])]
        pairs.append(("quantized", [_or_zero(layer.energy) for layer in layers]))
        _bars(left, names, pairs)
        left.set_xlabel("Dirichlet energy of the result")
        _bars(right, names, [("error", [layer.relative for layer in layers])])
        right.set_xlabel("error from quantized messages, relative")
        right.get_legend().remove()

    return draw


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value


def _bars(axes: Axes, names: Sequence[str], groups: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Horizontal bars, one per name and group, the first name on top."""
    from matplotlib.ticker import FuncFormatter

    height = 0.8 / len(groups)
    top = max((value for _, values in groups for value in values), default=0.0) or 1.0
    for i, (label, values) in enumerate(groups):
        places = [place + (i - (len(groups) - 1) / 2) * height for place in range(len(names))]
        axes.barh(places, values, height * 0.92, label=label, color=f"C{i}", hatch=HATCHES[i % len(HATCHES)])
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.015 * top, place, _short(value), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * top)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(groups))


def _short(value: float) -> str:
    if value == 0:
        return "0"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def degrees(errors: DegreeError) -> Drawing:
    """Error of nodes against their in-degree."""

    def draw(figure: Figure) -> None:
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        places = range(len(errors.degrees))
        axes.fill_between(places, errors.low, errors.high, color="C0", alpha=0.2, label="half of the nodes")
        axes.plot(places, errors.median, "o-", color="C0", label="median")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("error of a node's output,\nrelative to the mean norm")
        axes.legend()
        counts.bar(places, errors.counts, color="C1", hatch=HATCHES[1])
        counts.set_yscale("log")
        counts.set_ylabel("nodes")
        ends = [*errors.degrees[1:], None]
        labels = [_span(first, end) for first, end in zip(errors.degrees, ends, strict=True)]
        counts.set_xticks(places, labels)
        counts.set_xlabel("in-degree")

    return draw


def _span(first: int, end: int | None) -> str:
    if end is None:
        return f"{first}+"
    return str(first) if end == first + 1 else f"{first}-{end - 1}"


def costs(layers: Sequence[LayerCost]) -> Drawing:
    """Where time and bytes go, before and after."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        figure.set_size_inches(WIDTH, max(2.8, 0.6 * len(layers) + 1.5))
        names = [layer.name for layer in layers]
        times = [("float", [1e3 * layer.float_seconds for layer in layers])]
        times.append(("packed", [1e3 * layer.packed_seconds for layer in layers]))
        _bars(left, names, times)
        left.set_xlabel("milliseconds of a forward pass")
        sizes = [("float", [float(layer.float_bytes) for layer in layers])]
        sizes.append(("packed", [float(layer.packed_bytes) for layer in layers]))
        _bars(right, names, sizes)
        right.set_xlabel("bytes")

    return draw


def frontier(
    mixed: Sequence[tuple[float, float, float]],
    uniform: Mapping[str, tuple[float, float, float]],
    chosen: tuple[float, float, float],
    float_quality: float,
) -> Drawing:
    """What mixed widths lose for what they save: every point is (bytes, loss, validation accuracy)."""
    ordered = sorted(mixed)
    best = [p for i, p in enumerate(ordered) if all(p[1] < other[1] for other in ordered[:i])]

    def draw(figure: Figure) -> None:
        figure.set_size_inches(WIDTH, 3.6)
        panels = figure.subplots(1, 2)
        for axes, place in zip(panels, (1, 2), strict=True):
            axes.scatter([p[0] for p in mixed], [p[place] for p in mixed], s=22, color="C0", label="mixed widths")
            for (name, point), shape in zip(uniform.items(), "sDv", strict=False):
                axes.scatter([point[0]], [point[place]], marker=shape, s=50, color="C2", zorder=3, label=name)
            axes.scatter([chosen[0]], [chosen[place]], marker="*", s=220, color="C1", zorder=4, label="suggested")
            _log_ticks(axes, [p[0] for p in (*mixed, *uniform.values())], 1.15)
            axes.set_xlabel("bytes of all codes")
        panels[0].plot([p[0] for p in best], [p[1] for p in best], "-", color="C0", linewidth=1.2, label="least loss")
        panels[0].set_yscale("log")
        panels[0].set_ylabel("loss on validation nodes")
        panels[1].axhline(float_quality, color="C3", linestyle="--", linewidth=1.2, label="float")
        panels[1].set_ylabel("validation accuracy, without training")
        shown: dict[str, Any] = {}
        for axes in panels:
            handles, labels = axes.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
        figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=len(shown))

    return draw
