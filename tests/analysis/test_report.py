"""The page: whole, self-contained, and with the numbers of the model."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from graphs import power_law
from matplotlib import image
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import GAT, GCN

import qgnn_plugin as qgnn
from qgnn_plugin.analysis import findings
from qgnn_plugin.analysis.comparison import compare, peak_bytes, score
from qgnn_plugin.analysis.history import History, quantization_series
from qgnn_plugin.analysis.page import Page
from qgnn_plugin.analysis.report import STEPS, report

VOID = {"meta", "img", "source", "link", "br"}


def _data() -> Data:
    edges = power_law(60, 300).edge_index
    y = torch.arange(60) % 3
    return Data(x=torch.randn(60, 5), edge_index=edges, y=y, test_mask=torch.arange(60) < 30)


def _converted(bits: int = 4, **options: object) -> tuple[torch.nn.Module, Data]:
    data = _data()
    config = qgnn.QuantConfig(bits=bits, **options)
    return qgnn.calibrate(qgnn.quantize_model(GCN(5, 8, 2, 3), config=config), data).eval(), data


class _Reader(HTMLParser):
    """Every tag is closed; remembers what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_one_page_without_the_network(tmp_path: Path) -> None:
    qmodel, data = _converted()
    history = History()
    for step in (1, 2, 3):
        history.add(step, quantization_series(qmodel))
    begun = []
    state = {key: value.clone() for key, value in qmodel.state_dict().items() if isinstance(value, Tensor)}
    path = tmp_path / "r.html"
    assert report(qmodel, data, path, history=history, progress=lambda: begun.append(1)) == path
    assert len(begun) == len(STEPS)
    assert all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items() if key in state)

    text = (tmp_path / "r.html").read_text()
    reader = _Reader()
    reader.feed(text)
    assert reader.open == []
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)  # no address of anything, scripts and fonts included
    assert "<script" not in text
    pictures = {path.stem for path in (tmp_path / "r_pictures").iterdir()}
    assert pictures == {"accuracy", "values", "training", "layers", "degrees", "costs"}
    assert len(reader.links) == 2 * len(pictures)
    for link in reader.links:
        drawn = image.imread(io.BytesIO(base64.b64decode(link.partition(",")[2])), format="png")
        assert drawn[..., :3].std() > 0.05  # not an empty canvas
    assert f"{qgnn.packed_bytes(qgnn.pack_model(qmodel)).packed:,}" in text


def test_dark_pictures_are_dark(tmp_path: Path) -> None:
    """Every picture comes in both forms; in neither is ink near the ground, so that grey print stays legible."""
    from qgnn_plugin.analysis import figures

    for theme in (figures.LIGHT, figures.DARK):
        ground, *inks = (_luminance(c) for c in (theme["ground"], theme["ink"], *theme["colours"]))  # type: ignore[misc]
        for ink in inks:
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5  # WCAG 2.1, 1.4.3


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_what_stays_float_is_named(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gcn = GCN(5, 8, 2, 3)
            self.cell = torch.nn.ConvTranspose1d(3, 3, 1)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            h = self.gcn(x, edge_index)
            return self.cell(h.t()).t()

    data = _data()
    qmodel = qgnn.calibrate(qgnn.quantize_model(Net(), bits=4), data).eval()
    text = report(qmodel, data, tmp_path / "r.html").read_text()
    assert "<td>cell</td><td>ConvTranspose1d</td>" in text
    assert "No history was given" in text


def test_packed_and_plain_models_are_refused(tmp_path: Path) -> None:
    qmodel, data = _converted()
    for model in (GCN(5, 8, 2, 3), qgnn.pack_model(qmodel)):
        with pytest.raises(ValueError, match="quantize_model"):
            report(model, data, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_levels_of_sites_are_what_values_become() -> None:
    node = {"granularity": "node", "message_levels": "half"}
    for options in ({}, node, {"granularity": "channel"}, {"granularity": "row"}):
        qmodel, data = _converted(2, **options)
        sites = findings.site_values(qmodel, data)
        assert {site.name for site in sites} == {
            f"convs.{i}.{site}" for i in (0, 1) for site in ("lin.input", "lin.weight", "message")
        }
        for site in sites:
            assert len(site.levels) == 2**site.bits
            # Rounded to the nearest level, and clamped to the outermost, the error is the site's own, to the weight of
            # the values: in their own units exactly, and within the half step that two units may differ by elsewhere.
            nearest = (site.values[:, None] - site.levels).abs().amin(1)
            if not site.unit:
                assert float(nearest.norm() / site.values.norm()) == pytest.approx(site.error, rel=1e-4)
            inside = (site.values >= site.levels[0]) & (site.values <= site.levels[-1])
            assert float(nearest[inside].max()) <= float(site.levels.diff().max()) / 2 * 1.0001


def test_degree_errors_count_every_node() -> None:
    qmodel, data = _converted(2)
    found = findings.degree_errors(qgnn.restore_model(qmodel), qmodel, data)
    assert found is not None
    assert sum(found.counts) == 60
    degrees = torch.bincount(data.edge_index[1], minlength=60)
    assert found.degrees[0] == 0
    assert found.counts[0] == int((degrees == 0).sum())
    same = findings.degree_errors(qmodel, qmodel, data)
    assert same is not None
    assert max(same.high) == 0


def test_costs_add_up_to_the_model() -> None:
    data = _data()
    qmodel = qgnn.calibrate(qgnn.quantize_model(GAT(5, 8, 2, 3, heads=2), bits=4), data).eval()
    plain, packed, table = qgnn.restore_model(qmodel), qgnn.pack_model(qmodel), qgnn.summary(qmodel)
    total = compare(plain, packed, data, qmodel=qmodel, seconds=0.01)
    costs = findings.layer_costs(plain, qmodel, packed, data, table, total)
    assert [cost.name for cost in costs] == ["convs.0", "convs.1", "(rest)"]
    assert sum(cost.float_bytes for cost in costs) == table.float_bytes
    assert sum(cost.packed_bytes for cost in costs) == table.packed_bytes
    assert all(cost.float_seconds > 0 and cost.packed_seconds > 0 for cost in costs[:-1])
    assert total.exact is not None
    assert total.exact < 1e-5
    # Of parallel edges a matrix would keep the sum, and PyG adds self-loops to a matrix in another way.
    edges = data.edge_index.unique(dim=1)
    data.edge_index = edges[:, edges[0] != edges[1]]
    gcn = qgnn.calibrate(qgnn.quantize_model(GCN(5, 8, 2, 3), bits=4), data).eval()
    found = compare(qgnn.restore_model(gcn), qgnn.pack_model(gcn), data, seconds=0.01)
    assert [run.name for run in found.runs] == ["float", "float, CSR", "packed"]


def test_comparison_measures_allocations() -> None:
    def run() -> Tensor:
        first = torch.ones(1000, 100)
        second = first + 1
        del first
        return second.sum()

    assert 800_000 <= peak_bytes(run) < 900_000
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert score(logits, labels) == 0.75
    assert score(logits, labels, torch.tensor([True, True, False, False])) == 1
    assert score(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0])) == -2


def test_pages_escape_what_they_show() -> None:
    page = Page("<b>", "&")
    page.section("<i>")
    page.text("<script>")
    page.table(("<u>",), [("<p>",)])
    page.preformatted("</pre>")
    page.figures([("<a>", "<s>")])
    assert not re.search(r"<(b|i|script|u|a|s)>", page.html())
