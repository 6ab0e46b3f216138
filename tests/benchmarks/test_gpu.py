"""The GPU run without a GPU: its order and limits, what it survives, its table, and a dry run in one piece."""

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import layout, models, precompile, profiles, record, report, sections, tuning, worker
from benchmarks.gpu.graphs import edge_index_of
from benchmarks.gpu.worker import LOST, Unit, run_units
from benchmarks.stacks import build_stack
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.triton import launch
from qgnn_plugin.kernels.triton.autotune import power_law_plan

ROOT = Path(__file__).parents[2]


def conduct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, limits: dict[str, float], limit: float = 60):
    """Run sections whose process is ``script``; it sees the section's name, its rows and the message."""
    head = (
        "import argparse, json, os, sys, time\n"
        "p = argparse.ArgumentParser(); p.add_argument('section'); p.add_argument('--rows')\n"
        "o, _ = p.parse_known_args(sys.argv[3:])\n"
        "m = sys.stdin.readline(); m = json.loads(m) if m.strip() else sys.exit()\n"
        "def row(**kw): open(o.rows, 'a').write(json.dumps({'section': o.section, **kw}) + '\\n')\n"
    )
    file = tmp_path / "process.py"
    file.write_text(head + script)
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda cmd, **kw: real([sys.executable, str(file), "-m", *cmd[4:]], **kw))
    out = tmp_path / "out"
    out.mkdir()
    options = command._parse(["--out", str(out), "--limit", str(limit)])
    monkeypatch.setattr(command, "LEAST", 0.5)
    todo = [sections.Section(name, "none:none", seconds, package=False) for name, seconds in limits.items()]
    command.Conductor(options, [tmp_path], [], tmp_path).run(todo)
    rows = record.read(out / "rows.jsonl")
    return rows, {row["section"]: row["status"] for row in rows if row.get("kind") == "section"}


def test_sections_run_in_order_and_the_next_one_is_loaded_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, status = conduct(tmp_path, monkeypatch, "row(kind='start', unit='u')\n", {"a": 20, "b": 20, "c": 20})
    assert status == dict.fromkeys("abc", "done")
    assert [row["section"] for row in rows if row["kind"] == "start"] == ["a", "b", "c"]


def test_a_section_is_cut_at_its_limit_and_what_it_had_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "row(kind='start', unit='u'); row(kind='aggregate', ms=1.0)\nif o.section == 'slow': time.sleep(60)\n"
    started = time.monotonic()
    rows, status = conduct(tmp_path, monkeypatch, script, {"slow": 3, "b": 20})
    assert status == {"slow": "cut at its limit", "b": "done"}
    assert time.monotonic() - started < 40
    assert [row["section"] for row in rows if row["kind"] == "aggregate"] == ["slow", "b"]


def test_the_limit_of_the_whole_cuts_the_last_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, status = conduct(tmp_path, monkeypatch, "time.sleep(60)\n", {"a": 50, "b": 50}, limit=2)
    assert status == {"a": "cut at its limit", "b": "out of time"}


@pytest.mark.parametrize(("death", "told"), [(f"os._exit({LOST})", []), ("os.abort()", ["u1"])])
def test_units_after_a_lost_device_or_a_crash_run_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str, told: list[str]
) -> None:
    script = (
        "for u in ('u0', 'u1', 'u2'):\n"
        "    if u in m['done']: continue\n"
        "    row(kind='start', unit=u)\n"
        f"    if u == 'u1': {death}\n"
        "    row(kind='aggregate', unit=u, pid=os.getpid())\n"
    )
    rows, status = conduct(tmp_path, monkeypatch, script, {"a": 30})
    assert status == {"a": "done"}
    measured = [row for row in rows if row["kind"] == "aggregate"]
    assert [row["unit"] for row in measured] == ["u0", "u2"]
    assert measured[0]["pid"] != measured[1]["pid"]
    assert [row["unit"] for row in rows if row["kind"] == "failure"] == told


def test_a_process_that_dies_before_its_first_unit_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, status = conduct(tmp_path, monkeypatch, "open(o.rows, 'a').close(); sys.exit(3)\n", {"a": 30, "b": 30})
    assert status == dict.fromkeys("ab", "ended with status 3, before any unit")
    assert len(rows) == 2


def test_failed_checks_reach_the_sections_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "row(kind='start', unit='u')\n"
        "row(kind='check', key='linear int2', error='differs'); row(kind='check', key='aggregate int2', error=None)\n"
        "row(kind='seen', failed=m['failed'])\n"
    )
    rows, _ = conduct(tmp_path, monkeypatch, script, {"a": 30, "b": 30})
    assert [row["failed"] for row in rows if row["kind"] == "seen"] == [[], ["linear int2"]]


def test_a_unit_that_fails_is_a_row_and_the_others_go_on() -> None:
    rows: list[dict[str, Any]] = []

    def fails() -> Iterator[dict[str, Any]]:
        yield {"kind": "aggregate", "ms": 1.0}
        raise RuntimeError("no such kernel")

    def works() -> Iterator[dict[str, Any]]:
        yield {"kind": "aggregate", "ms": 2.0}

    units = [Unit("a", works), Unit("b", fails), Unit("c", works, ("linear int2",)), Unit("d", works)]
    assert run_units(units, {"a"}, {"linear int2"}, rows.append, lambda: True)
    assert [(row["unit"], row["ms"]) for row in rows if row["kind"] == "aggregate"] == [("b", 1.0), ("d", 2.0)]
    failures = {row["unit"]: row["error"] for row in rows if row["kind"] == "failure"}
    assert failures["b"] == "RuntimeError: no such kernel"
    assert "linear int2" in failures["c"]


@pytest.mark.parametrize("trouble", ["capture_error", "error"])
def test_after_trouble_the_device_is_tried_and_its_loss_ends_the_process(trouble: str) -> None:
    rows: list[dict[str, Any]] = []
    units = [Unit("a", lambda: [{"kind": "inference", "ms": 1.0, trouble: "not permitted"}]), Unit("b", list)]
    assert not run_units(units, set(), set(), rows.append, lambda: False)
    assert [row["unit"] for row in rows if row["kind"] == "start"] == ["a"]
    assert rows[-1] == {"kind": "lost", "unit": "a"}


def test_the_conductor_knows_the_worker_s_status() -> None:
    assert command.LOST == worker.LOST


def test_a_row_that_was_cut_off_does_not_cost_the_others(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    record.append(file, {"kind": "device", "name": "Card 7"})
    with open(file, "a") as handle:
        handle.write('{"kind": "aggr')
    assert record.read(file) == [{"kind": "device", "name": "Card 7"}]


def test_the_tree_is_laid_out_as_the_installed_package(tmp_path: Path) -> None:
    """(That it is imported from there, the other tests show.)"""
    whole, kernels = layout.lay_out(tmp_path), layout.lay_out_kernels(tmp_path)
    for file in ("kernels/plan.py", "lightning_modules/__init__.py", "packing/model.py", "__init__.py"):
        assert (whole / "qgnn_plugin" / file).stat().st_size
    assert (kernels / "qgnn_plugin/kernels/plan.py").exists()
    assert (kernels / "qgnn_plugin/__init__.py").read_text() == ""
    assert set(layout.MAPPED) == set(setup_folders())
    assert layout.lay_out(tmp_path) == whole  # again is no error


def setup_folders() -> list[str]:
    (line,) = (line for line in (ROOT / "setup.py").read_text().splitlines() if line.startswith("MAPPED"))
    return list(ast.literal_eval(line.split("=")[1].strip()))


def test_kernels_alone_import_neither_pyg_nor_what_it_needs(tmp_path: Path) -> None:
    """What a machine without PyG runs."""
    modules = {s.units.split(":")[0] for s in sections.SECTIONS if not s.package}
    script = (
        f"import importlib, sys\nfor name in {sorted(modules)}: importlib.import_module('benchmarks.gpu.' + name)\n"
        "import benchmarks.gpu.worker; assert 'kernels-only' in sys.modules['qgnn_plugin'].__file__\n"
        "heavy = {'torch_geometric', 'numba', 'safetensors', 'torchmetrics', 'pytorch_lightning'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(layout.lay_out_kernels(tmp_path))}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_where_pyg_is_missing_its_sections_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "NEEDED", ("no_such_package",))
    assert layout.missing([]) == ["no_such_package"]
    (tmp_path / "no_such_package").mkdir()
    assert layout.missing([tmp_path]) == []  # carried as a wheel
    options = command._parse(["--out", str(tmp_path)])
    command.Conductor(options, [tmp_path], ["torch_geometric"], tmp_path).run([sections.Section("a", "none:none", 9)])
    (row,) = record.read(tmp_path / "rows.jsonl")
    assert "torch_geometric missing" in row["status"]


def test_every_task_of_the_compilation_has_a_maker_and_a_name_of_its_own() -> None:
    found = precompile.tasks(package=True)
    assert len({name for name, _ in found}) == len(found)
    assert {options["make"] for _, options in found} == set(precompile.MAKERS)


def test_what_is_tuned_is_what_the_default_configuration_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels whose settings a packed model of the default configuration looks up, and no others."""
    plan = power_law_plan(24, 60, "cpu")
    x, edge_index = torch.randn(24, 16), edge_index_of(plan)
    packed = models.packed_model(build_stack("GCN", (16, 16, 8)).eval(), x, edge_index, 2)
    seen, look_up = list[str](), launch._lookup
    monkeypatch.setattr(launch, "_lookup", lambda kernel, *rest: seen.append(kernel) or look_up(kernel, *rest))
    with use_backend("interpret"), torch.no_grad():
        packed(x, edge_index)
        assert set(tuning.SETTINGS) <= set(seen)
        for kernel in tuning.SETTINGS:
            seen.clear()
            tuning.calls(kernel, plan, 2, 16)[0]()
            assert seen == [kernel]
            assert len(tuning.candidates(kernel, plan.device, 2, 256)) > 2


@pytest.mark.parametrize("broken", [False, True])
def test_launchers_are_built_along_with_kernels_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    from triton.backends.nvidia import driver

    from tools.rehearsal import _Driver

    def launcher(source: Any, metadata: Any) -> None:
        if broken:
            raise AssertionError("no libcuda")

    monkeypatch.setattr(driver, "CudaLauncher", launcher)
    before, made = _Driver.launcher_cls, list[str]()
    source = SimpleNamespace(fn=SimpleNamespace(arg_names=["x"]))
    with precompile.launchers(made):
        assert callable(_Driver("sm_90").launcher_cls(source, SimpleNamespace(name="linear_kernel")))
    assert made == ([] if broken else ["linear_kernel"])
    assert _Driver.launcher_cls is before


COUNTERS = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","linear_kernel","gpu__time_duration.sum","us","1,234.5"
"0","7","linear_kernel","sm__inst_executed.sum","inst","17"
"1","7","linear_kernel","gpu__time_duration.sum","us","n/a"
"""


def test_counters_are_read_launch_by_launch() -> None:
    first, second = profiles.read_counters(COUNTERS.splitlines())
    assert first == {
        "kernel": "linear_kernel", "gpu__time_duration.sum [us]": 1234.5, "sm__inst_executed.sum [inst]": 17.0,
    }  # fmt: skip
    assert second == {"kernel": "linear_kernel"}


def test_ratios_are_to_the_fastest_baseline_of_a_group() -> None:
    rows: list[dict[str, Any]] = [
        {"model": "GCN", "name": "PyG CSR fp32", "ms": 8.0},
        {"model": "GCN", "name": "PyG edge_index fp32", "ms": 4.0},
        {"model": "GCN", "name": "PyG edge_index bf16", "ms": 2.0},
        {"model": "GCN", "name": "int2", "ms": 1.0},
        {"model": "GAT", "name": "int2", "ms": 1.0},
    ]
    report.ratios(rows, ("model",), report._fp32, "vs")
    assert [row.get("vs") for row in rows] == [0.5, 1.0, 2.0, 4.0, None]


def test_the_table_of_a_run_that_was_cut_off() -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "device", "name": "NVIDIA Card-7 80GB"},
        {"kind": "check", "key": "linear int2", "check": "linear int2", "features": 256, "error": "3 of 9 differ"},
        {"kind": "failure", "section": "linear", "unit": "int2", "error": "left out"},
        {"kind": "section", "section": "linear", "status": "cut at its limit", "seconds": 30.0},
    ]
    text = report.markdown(rows)
    assert report.report_name(rows) == "gpu-nvidia-card-7-80gb"
    for expected in ("NVIDIA Card-7 80GB", "1 checks of ops", "3 of 9 differ", "cut at its limit", "left out"):
        assert expected in text


def dry_run(out: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), "--limit", "900"]
    done = subprocess.run([*command, "--patience", "10", *arguments], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "gpu-dry-run.md").read_text().startswith("# GPU run: dry run")
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def check_dry(rows: list[dict[str, Any]]) -> None:
    assert all(row.get("dry") for row in rows)
    assert {row["status"] for row in rows if row["kind"] == "section"} == {"done"}
    assert not [row for row in rows if row["kind"] == "check" and row["error"]]
    failed = {row["error"] for row in rows if row["kind"] in ("failure", "compiled") and "error" in row}
    assert all("not implemented for 'Half'" in error for error in failed), failed  # MKL has no such products


def test_dry_run_of_two_sections(tmp_path: Path) -> None:
    rows = dry_run(tmp_path / "out", "--only", "device", "--only", "aggregate 170k")
    check_dry(rows)
    assert {row["name"] for row in rows if row["kind"] == "aggregate"} >= {
        "int2", "int2 packed out", "int2 rows out", "edge_index fp32",
    }  # fmt: skip


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    rows = dry_run(tmp_path / "out")
    check_dry(rows)
    assert {row["section"] for row in rows if row["kind"] == "section"} == {s.name for s in sections.SECTIONS}
    kinds = {"device", "ceiling", "compiled", "check", "aggregate", "linear", "inference", "training", "profile"}
    assert {row["kind"] for row in rows} >= kinds | {"counters", "tuning", "cache"}
