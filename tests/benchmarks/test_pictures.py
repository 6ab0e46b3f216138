"""The README's pictures say what the result files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pictures

pytest.importorskip("matplotlib")


def _runs() -> list[dict[str, Any]]:
    scores = [{"FP32": 0.8, "INT4": 0.79, "INT2": 0.7}, {"FP32": 0.82, "INT4": 0.81, "INT2": 0.76}]
    results = [{name: {"test": value} for name, value in one.items()} for one in scores]
    return [{"dataset": "PubMed", "model": "GCN-64", "results": one} for one in results]


def test_points_are_means_over_seeds_against_packed_bytes() -> None:
    points = pictures._points(_runs(), "PubMed", "GCN-64")
    assert [name for *_, name in points] == ["INT2", "INT4", "FP32"]
    assert [mean for _, mean, *_ in points] == pytest.approx([73, 80, 81])
    assert points[0][2] == pytest.approx(3 * 2**0.5)
    weights = 64 * (500 + 3)
    assert points[-1][0] == 4 * (weights + 64 + 3)
    assert weights // 4 < points[0][0] < weights // 2 < points[1][0] < weights


def test_float_models_are_distilled_as_the_others_are() -> None:
    runs = _runs()
    for run, score in zip(runs, (0.83, 0.85), strict=True):
        run["results"]["FP32 self-distilled"] = {"test": score}
    assert pictures._points(runs, "PubMed", "GCN-64")[-1][1] == pytest.approx(84)


def test_pictures_are_of_what_is_there(tmp_path: Path) -> None:
    pictures.main(["--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    rows = [{"model": "GCN", "threads": 1, "side": side, "over best peer": 2.0} for side in ("INT2", "INT8", "PyG")]
    (tmp_path / "cpu.json").write_text(json.dumps({"inference": {"data": {"rows": rows}}}))
    (tmp_path / "accuracy.json").write_text(json.dumps({"runs": _runs()}))
    pictures.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")])
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(found) == {"accuracy-size.png", "accuracy-size-dark.png", "speed.png", "speed-dark.png"}
    assert all(content.startswith(b"\x89PNG") for content in found.values())
    assert found["speed.png"] != found["speed-dark.png"]
