"""The benchmark of smoothness-aware propagation, on a made-up graph."""

import json
from pathlib import Path

import pytest

from benchmarks.smp import main
from benchmarks.smp_report import paired
from benchmarks.smp_settings import Settings, cells


def test_runs_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["constraint", "depth", "propagation", "plain"]
    arguments = ["--tiny", "--seeds", "1", "--parts", *parts, "--out", str(tmp_path)]
    main(arguments)
    assert "[5/5]" in capsys.readouterr().out
    first = json.loads((tmp_path / "smp.json").read_text())["runs"]
    assert {run["part"] for run in first} == set(parts)
    for name in ("smp.md", "smp-constraint.png", "smp-depth.png", "smp-propagation.png"):
        assert (tmp_path / name).stat().st_size > 500, name
    for path in (tmp_path / "smp-runs").iterdir():
        path.unlink()
    main(arguments)  # from the report alone
    assert "[1/" not in capsys.readouterr().out
    assert json.loads((tmp_path / "smp.json").read_text())["runs"] == first


@pytest.mark.slow
def test_every_part(tmp_path: Path) -> None:
    main(["--tiny", "--out", str(tmp_path)])
    text = (tmp_path / "smp.md").read_text()
    assert "one seed" not in text
    assert text.count("\n## ") == 6


def test_cells_are_distinct_and_complete() -> None:
    found = list(cells(Settings()))
    assert len(set(found)) == len(found) == 2 + 1 + 10 * (1 + 1 + 4 + 4 + 4)


def test_a_difference_counts_where_it_exceeds_its_spread() -> None:
    assert paired([80.0, 81.0, 82.0], [82.0, 83.0, 84.5]) == ("+2.17 ± 0.29", "better")
    assert paired([80.0, 81.0, 82.0], [82.0, 80.0, 82.0])[1] == "no difference"
    assert paired([80.0, 81.0], [79.0, 80.1])[1] == "worse"
