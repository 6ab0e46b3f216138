"""``qgnn_plugin.report``: one page of pictures about a converted model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .. import __version__
from ..atomic import atomic_file
from ..conversion.convert import unquantized
from ..conversion.converted import expect_converted
from ..conversion.copying import copy_model
from ..conversion.coverage import Coverage, coverage
from ..packing import pack_model
from ..summaries import Summary, summary
from . import figures
from .comparison import Comparison, compare
from .error_report import error_report
from .findings import accuracy_points, degree_errors, layer_costs, site_values
from .history import History
from .page import Page, Picture

__all__ = ["STEPS", "report"]

STEPS = ("pack and compare", "accuracy", "values of sites", "errors of layers", "errors of nodes", "draw")
SECONDS = 1.0  # of timing


def report(
    qmodel: nn.Module,
    data: Any,
    path: str | os.PathLike[str],
    *,
    float_model: nn.Module | None = None,
    history: History | str | os.PathLike[str] | None = None,
    progress: Callable[[], Any] | None = None,
) -> Path:
    """Write one self-contained HTML page about a converted model, and its pictures as PNG.

    It shows accuracy against bytes; what passes every site, with its levels; ranges and multipliers over training;
    Dirichlet energy and quantization error per layer; errors of nodes against their degree; where time and bytes go in
    float and packed; and what stays float.  The page needs no network, and is legible in black and white, on a dark
    ground and on paper.

    Args:
        qmodel: A converted model whose ranges are set; it is left untouched.
        data: One graph, a ``Data``; with ``y`` and ``test_mask`` accuracy is that on test nodes.
        path: The page; pictures go to a folder of its name with ``_pictures`` beside it.
        float_model: What it is compared with: the trained float model; by default the weights of ``qmodel`` in float.
        history: What was logged while it trained: a :class:`~qgnn_plugin.analysis.history.History`, or the
            ``metrics.csv`` of a run with ``QuantizationMonitor``.
        progress: Called as each of :data:`STEPS` begins.

    Returns:
        ``path``.

    Raises:
        ValueError: If ``qmodel`` is plain or packed, or ``history`` has no series of ranges.
        TypeError: If ``data`` do not fit ``qmodel``.
        ImportError: Without matplotlib.
        OSError: If the page cannot be written.
    """
    expect_converted(qmodel)
    begin = progress or (lambda: None)
    past = history if isinstance(history, History) or history is None else History.load(history)
    plain = unquantized(qmodel) if float_model is None else float_model
    training = qmodel.training
    qmodel = copy_model(qmodel).eval()
    plain = copy_model(plain).eval()
    table = summary(qmodel)
    assert isinstance(table, Summary)

    begin()
    packed = pack_model(qmodel)
    compared = compare(plain, packed, data, qmodel=qmodel, seconds=SECONDS)
    page = Page(f"{type(qmodel).__name__} in low bits", _subtitle(qmodel, data, training))
    drawings = _drawings(page, qmodel, plain, packed, data, table, compared, past, begin)
    for picture in drawings:
        page.picture(picture)
    _float_parts(page, coverage(qmodel))
    page.section("Layers")
    page.preformatted(str(table))
    return _write(page, Path(path))


def _subtitle(qmodel: nn.Module, data: Any, training: bool) -> str:
    nodes, edges = getattr(data, "num_nodes", None), getattr(data, "num_edges", None)
    graph = "" if nodes is None or edges is None else f"on a graph of {nodes:,} nodes and {edges:,} edges; "
    weights = sum(p.numel() for p in qmodel.parameters())
    state = "training" if training else "eval"
    return f"{graph}{weights:,} parameters; the model was in {state} mode; qgnn_plugin {__version__}"


def _drawings(
    page: Page,
    qmodel: nn.Module,
    plain: nn.Module,
    packed: nn.Module,
    data: Any,
    table: Summary,
    compared: Comparison,
    history: History | None,
    begin: Callable[[], Any],
) -> Iterator[Picture]:
    """The pictures in order; their sections and texts go to ``page`` as they come."""
    begin()
    points, what = accuracy_points(plain, qmodel, packed, data)
    _headline(page, compared, points[0].value, points[-1].value, what)
    page.section("Accuracy against bytes")
    yield _picture(
        "accuracy",
        f"{what} against bytes of the model",
        "Left is smaller, up is better. The dotted line joins the float weights converted to one width everywhere, "
        "without training.",
        figures.accuracy(points, what),
    )
    begin()
    sites = site_values(qmodel, data)
    page.section("What passes every site")
    yield _picture(
        "values",
        "Histograms of the values at every site, with the levels that they are rounded to",
        "Counts on a logarithmic scale. Dashed lines are the levels (of 8 bits the ends of the range). A site is where "
        "something is quantized: an input, a weight, or what neighbours send.",
        figures.histograms(sites),
    )
    page.section("Ranges and multipliers over training")
    if history is None:
        page.text(
            "No history was given: train with QuantizationMonitor and Lightning's CSVLogger (or `qgnn train`), and "
            "pass its metrics.csv as history."
        )
    else:
        yield _picture(
            "training",
            "Ends of every range, and multipliers of the smoothness constraint, by training step",
            "Shaded from the lower end (dashed) to the upper end of each range; of several ranges the outermost.",
            figures.training(history),
        )
    begin()
    errors = error_report(qmodel, data, float_model=plain)
    page.section("Smoothness and error per layer")
    if errors.layers:
        yield _picture(
            "layers",
            "Dirichlet energy and relative quantization error of every message-passing layer",
            "Dirichlet energy says how much neighbours differ. The error is that of a layer's result from its own "
            "quantized messages, on the input that it has here.",
            figures.energies(errors),
        )
    else:
        page.text("No layer passes messages.")
    begin()
    nodes = degree_errors(plain, qmodel, data)
    page.section("Error against degree")
    if nodes is None:
        page.text("Outputs are not one row per node, or edges are no edge_index.")
    else:
        yield _picture(
            "degrees",
            "Error of node outputs against in-degree",
            "Distance of a node's output from that of the float model, over the mean norm of float outputs.",
            figures.degrees(nodes),
        )
    begin()
    page.section("Where time and bytes go")
    yield _picture(
        "costs",
        "Milliseconds and bytes of every layer in float and packed",
        "Packed layers hand each other work to be done later, which counts where it is done. Times are medians of "
        "forward passes on this machine.",
        figures.costs(layer_costs(plain, qmodel, packed, data, table, compared)),
    )
    page.preformatted(str(compared))


def _headline(page: Page, compared: Comparison, before: float, after: float, what: str) -> None:
    first, last = compared.runs[0], compared.runs[-1]
    pairs = [
        (f"{what}, float", f"{before:.3f}"),
        (f"{what}, here", f"{after:.3f}"),
        ("bytes, float", f"{first.size:,}"),
        ("bytes, packed", f"{last.size:,} ({first.size / max(1, last.size):.1f}x)"),
        ("speed, of the fastest float run", f"{compared.speedup:.2f}x"),
    ]
    if compared.agreement is not None:
        pairs.append(("same prediction as float", f"{compared.agreement:.1%}"))
    page.figures(pairs)


def _float_parts(page: Page, found: Coverage) -> None:
    page.section("What stays float")
    page.text(str(found).splitlines()[0])
    rows = [(part.name or "(model)", part.type, f"{part.weights:,}", part.reason) for part in found.parts]
    rows += [(f"{a.layer or '(model)'}: {a.name}", "message", "", a.reason) for a in found.arguments]
    if rows:
        page.table(("part", "type", "weights", "why"), rows, numbers=(2,))
    else:
        page.text("No weight matrix and no message; vectors such as biases, and sums, are float or wider integers.")


def _picture(name: str, alt: str, caption: str, draw: figures.Drawing) -> Picture:
    return Picture(name, alt, caption, figures.png(draw), figures.png(draw, dark=True))


def _write(page: Page, path: Path) -> Path:
    with atomic_file(path) as file:
        file.write(page.html().encode())
    folder = path.with_name(f"{path.stem}_pictures")
    folder.mkdir(exist_ok=True)
    for picture in page.pictures:
        with atomic_file(folder / f"{picture.name}.png") as file:
            file.write(picture.light)
    return path
