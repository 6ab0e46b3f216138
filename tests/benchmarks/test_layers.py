"""The table of every layer: that it has every exported name, that models run, and what its page says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import layers
from benchmarks.convolution_cases import CASES, Graph
from benchmarks.layers import SECTIONS, errors, markdown, names_of, variants
from benchmarks.model_cases import MODELS

FOUND = {
    "name": "GCNConv", "path": "kernel", "speed": 2.0, "float_ms": 4.0, "packed_ms": 2.0, "float_bytes": 8_000_000,
    "packed_bytes": 2_000_000, "error": 0.1, "kept_speed": 1.5, "errors": {"8": 0.01, "4": 0.1, "2": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_every_exported_name_has_a_row_or_a_reason(section: str) -> None:
    _, cases, left_out = SECTIONS[section]
    for name in names_of(section):
        assert bool(variants(section, name)) != (name in left_out), name
    assert set(left_out) <= set(names_of(section))
    assert set(cases) == {case for name in names_of(section) for case in variants(section, name)}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_in_floats(name: str) -> None:
    case, graph, width = MODELS[name], Graph(400, 2_000), 16
    with torch.no_grad():
        out = case.model(width, graph)(*case.arguments(graph, width))
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else (out,)
    assert all(part.isfinite().all() for part in parts if part is not None)


def test_errors_grow_as_bits_go() -> None:
    found = errors(CASES["GCNConv"], Graph(300, 1_500), 16)
    assert 0 < found["8"] < found["4"] < found["2"] < 1


def test_the_page_says_what_was_measured_and_what_was_not() -> None:
    cases = {"GCNConv": FOUND, "CGConv": {"failed": "ValueError: a | b"}}
    page = markdown(cases, {"nodes": 20_000, "edges": 200_000, "rounds": 5})
    assert "| GCNConv | kernel | 0.010 / 0.100 / 0.500 | 2.00 / 1.50 | 2 / 8 |" in page
    assert "| CGConv | failed: ValueError: a \\| b |" in page
    assert "| GINEConv | not measured yet |" in page
    assert "| XConv | not measured: a k-NN graph, which needs torch-cluster |" in page
    assert "Of 1 convolutions and variants of them, by the first path of each: 1 kernel, 0 generated" in page
    assert "Slower than float: none." in page
    assert "smaller graph" not in page
    assert "earlier state" not in page
    assert "smaller graph" in markdown(cases, {"nodes": 5_000, "edges": 50_000, "rounds": 3})


def test_the_page_tells_rows_of_other_code_and_what_kinds_of_layers_reach() -> None:
    cases = {"GCNConv": {**FOUND, "code": "now"}, "HANConv": {**FOUND, "code": "before"}, "HGTConv": {"failed": "x"}}
    page = markdown(cases, {"nodes": 20_000, "edges": 200_000, "rounds": 5}, "now")
    assert "Measured on an earlier state of the code: HANConv, HGTConv." in page
    assert "Layers of relations, which are to be 3 times as fast as float: HANConv 1.5." in page
    assert "Layers of attention" not in page


def test_rows_of_this_code_are_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def work(
        names: list[str], options: dict[str, int], variables: Mapping[str, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        measured.extend(() if variables else names)
        yield from ((name, dict(FOUND)) for name in names)

    def run(*arguments: str) -> list[str]:
        measured.clear()
        monkeypatch.setattr(
            "sys.argv",
            ["layers", "GCNConv", "GATConv", *arguments, "--out", f"{tmp_path}/a.json", "--page", f"{tmp_path}/a.md"],
        )
        layers.main()
        return list(measured)

    monkeypatch.setattr(layers, "_work", work)
    monkeypatch.setattr(layers, "code_digest", lambda: "one")
    assert run() == ["GCNConv", "GATConv"]
    assert run() == []
    monkeypatch.setattr(layers, "code_digest", lambda: "two")
    assert run("--missing") == []
    assert run() == ["GCNConv", "GATConv"]
    assert run("--fresh") == ["GCNConv", "GATConv"]
    assert "GCNConv | kernel" in capsys.readouterr().out
