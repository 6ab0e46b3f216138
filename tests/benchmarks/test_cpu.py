"""The CPU benchmark measures what it says: rounds, memory, resuming, and paths that compute one function."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import cpu, cpu_batches, cpu_calls, cpu_inference, cpu_kernels, cpu_recall, cpu_small, dgl_paths, peers
from benchmarks.cpu_graphs import power_law
from benchmarks.cpu_growth import slope
from benchmarks.cpu_inference import WrongResult, compare
from benchmarks.cpu_paths import EDGE_INDEX, FAST_PATH, edge_list, pyg_paths, quantized_stack
from benchmarks.cpu_probe import RESET, Job, peak_bytes, probe
from benchmarks.cpu_report import Target, per_threads, target_table
from benchmarks.stacks import STACKS
from benchmarks.timing import KEPT_MEMORY, Timing, interleaved
from qgnn_plugin import pack_model
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.cpu.memory import empty

WIDTHS = (8, 16, 16, 5)
TINY = ["--nodes", "300", "--edges", "1500", "--widths", "8", "16", "16", "5", "--features", "64", "--rounds", "2",
        "--threads", "1"]  # fmt: skip


def test_rounds_interleave_and_slow_sides_sit_out() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleaved(sides, rounds=4, slow={"b": 2})
    assert "".join(calls) == "ac" + "abc" + "ac" + "abc" + "ac"
    assert sorted(timings["b"].wall) == [0, 2]
    with pytest.raises(ValueError, match="1 to 4 rounds"):
        interleaved(sides, rounds=4, slow={"b": 5})


def test_calls_in_a_row_are_compared_one_by_one() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = interleaved(sides, rounds=2, slow={"b": 1}, in_a_row=3)
    assert "".join(calls) == "a" + "aaaa" + "bbbb" + "aaaa"
    assert list(timings["a"].wall) == list(range(6))
    assert list(timings["b"].processor) == [0, 1, 2]


def test_ratios_compare_within_the_round() -> None:
    # The machine is ten times slower in round 1: medians of times would hide the ratio.
    fast, slow = Timing({0: 1.0, 1: 10.0, 2: 1.0}, {}), Timing({1: 40.0, 2: 4.0}, {})
    assert fast.over(slow) == 4.0
    assert slow.over(fast) == 0.25


@pytest.mark.skipif(not RESET.exists(), reason="the peak of the resident set is read from Linux' /proc")
@pytest.mark.parametrize("allocate", ["torch", "numpy", "pool"])
def test_peak_memory_counts_every_allocator(allocate: str) -> None:
    size = 96 << 20

    def run() -> None:
        if allocate == "torch":
            torch.zeros(size // 4)
        elif allocate == "numpy":
            np.ones(size // 8)
        else:
            empty((size // 4,), torch.float32).fill_(1)

    run()  # what it leaves idle must not hide the next call
    assert 0.95 * size <= peak_bytes(run) <= 1.2 * size
    assert peak_bytes(lambda: None) < size / 20


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` takes tens of seconds a model, and no part in what these tests are of."""
    monkeypatch.setattr(peers, "_compiler_absence", lambda: "no C++ compiler")


@pytest.mark.parametrize("name", STACKS)
def test_pyg_paths_compute_one_function(name: str) -> None:
    plan = power_law(120, 900)  # with duplicates and self-loops
    edge_index, x = edge_list(plan), torch.randn(120, WIDTHS[0])
    with torch.no_grad():
        paths = pyg_paths(name, WIDTHS) | dgl_paths.dgl_paths(name, WIDTHS)  # the latter where DGL is installed
        outs = {label: path.model(x, path.convert(edge_index, 120)) for label, path in paths.items()}
    assert FAST_PATH[name] in outs
    assert len(outs) >= 3
    for label, out in outs.items():
        torch.testing.assert_close(out, outs[EDGE_INDEX], rtol=1e-4, atol=1e-5, msg=lambda m, k=label: f"{k}: {m}")


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False)  # both are of the process
def test_compiled_paths_compute_the_same_and_say_when_they_cannot() -> None:
    plan = power_law(60, 300)
    edge_index, x = edge_list(plan), torch.randn(60, 8)
    eager = {EDGE_INDEX: pyg_paths("GraphSAGE", (8, 16, 5))[EDGE_INDEX]}
    ((label, path),) = peers.compiled_paths(eager).items()
    assert peers.is_compiled(label)
    with torch.no_grad():
        torch.testing.assert_close(path.model(x, edge_index), eager[EDGE_INDEX].model(x, edge_index))
        torch._dynamo.config.recompile_limit = 1
        with pytest.raises(Exception, match="recompile_limit"):  # never on without compiling
            path.model(x[:50], edge_index[:, :10])


def test_peers_that_are_absent_are_named(monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    monkeypatch.setattr(dgl_paths, "_imported", lambda: (None, "ModuleNotFoundError: No module named 'dgl'"))
    found = peers.peers_of("GIN", (8, 16))
    assert {peers.family(label) for label in found.paths} == {"PyG"}
    line = peers.peer_line(peers.peer_settings(), found.absent)[0]
    assert line == (
        "Peers that took part: PyG.  Absent: torch.compile (no C++ compiler); "
        "DGL (ModuleNotFoundError: No module named 'dgl')."
    )
    assert "another size" in peers.peers_of("GIN", (8, 16), is_new=True).absent["torch.compile"]
    assert peers.peer_line({"DGL": "2.1.0"}, {})[0].endswith("PyG, PyG under `torch.compile`, DGL 2.1.0.")


def test_ratios_are_over_the_best_peer_and_the_best_of_pyg() -> None:
    times = {"PyG edge_index": 8.0, "PyG CSR": 4.0, "PyG edge_index, compiled": 3.0, "DGL": 2.0, "INT4": 1.0}
    timings = {side: Timing({0: time}, {0: time}) for side, time in times.items()}
    case = cpu_calls.Case("tiny", cpu_calls.molecules(2, 12), 8, 16, 2, is_new=False, rounds=1)
    for packed in (
        cpu_calls.rows_of("GCN", case, timings)[-1],
        cpu_inference._rows("GCN", 1, timings, {"INT4": {}})[-1],
    ):
        assert (packed["over best peer"], packed["over best PyG"], packed["over PyG edge_index"]) == (2.0, 3.0, 8.0)
    assert [peers.family(side) for side in list(times)[:4]] == ["PyG", "PyG", "PyG, compiled", "DGL"]


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    sides = {EDGE_INDEX: lambda: torch.ones(3), "DGL": lambda: torch.ones(3) + 0.1, "INT4": lambda: torch.zeros(3)}
    with pytest.raises(AssertionError, match="not close"):
        cpu_calls._check(sides)


def test_a_wrong_packed_model_is_not_timed() -> None:
    plan = power_law(100, 600)
    x, edge_index = torch.randn(100, WIDTHS[0]), edge_list(plan)
    qmodel = quantized_stack("GCN", 4, WIDTHS)
    with torch.no_grad(), use_backend("torch"):
        packed: Any = pack_model(qmodel)
        assert compare("GCN", qmodel, packed, x, edge_index) == {"error": 0.0, "agree": 1.0}
        packed.convs[0].bias += 0.5
        with pytest.raises(WrongResult, match="outputs of the quantized GCN"):
            compare("GCN", qmodel, packed, x, edge_index)


def fake_section(log: list[str], name: str) -> Any:
    def measure(args: Any) -> dict[str, Any]:
        log.append(name)
        return {"figure": args.rounds}

    return SimpleNamespace(
        settings=lambda args: {"rounds": args.rounds, "threads": tuple(args.threads)},
        measure=measure,
        markdown=lambda section: [f"## {name}: {section['data']['figure']}"],
        targets=lambda data: [Target(name, 3.0, {"": data["figure"]})],
    )


def test_finished_sections_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(cpu, "SECTIONS", {name: fake_section(log, name) for name in ("one", "two")})

    def run(*argv: str) -> dict[str, Any]:
        log.clear()
        cpu.main(["--results", str(tmp_path), *argv])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu.json", "cpu.md"]
        return json.loads((tmp_path / "cpu.json").read_text())

    first = run("--sections", "one", "--rounds", "2")
    assert log == ["one"]
    both = run("--rounds", "2")
    assert log == ["two"]
    assert both["one"] == first["one"]
    assert "0 of 2 targets met" in (tmp_path / "cpu.md").read_text()
    assert run("--rounds", "2") == both
    assert log == []
    # Other settings, other code or --fresh: measured again, and only what was asked for.
    assert run("--sections", "two", "--rounds", "4")["one"] == first["one"]
    assert log == ["two"]
    assert "1 of 2 targets met" in (tmp_path / "cpu.md").read_text()
    run("--sections", "one", "--rounds", "2", "--fresh")
    assert log == ["one"]
    monkeypatch.setattr(cpu, "code_digest", lambda: "another")
    run("--sections", "one", "--rounds", "2")
    assert log == ["one"]
    assert "code another" in (tmp_path / "cpu.md").read_text()
    for name, value in KEPT_MEMORY.items():  # float layers take another time: another machine
        monkeypatch.setenv(name, value)
    run("--sections", "one", "--rounds", "2")
    assert log == ["one"]
    assert "keeps freed memory" in (tmp_path / "cpu.md").read_text()


def test_a_failing_section_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {name: fake_section([], name) for name in ("one", "two")}
    monkeypatch.setattr(cpu, "SECTIONS", sections)
    sections["one"].measure = lambda args: 1 / 0
    with pytest.raises(SystemExit, match="one"):
        cpu.main(["--results", str(tmp_path)])
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert list(document) == ["two"]


def test_sections_at_a_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    def fake_probe(job: Job, variables: Any = None) -> dict[str, dict[str, float]]:
        float_side = {label: {"bytes": 80.0 * job.nodes, "ms": 1.0 * job.nodes, "first_ms": 5.0} for label in job.pyg}
        return float_side | {
            f"INT{b}": {"bytes": 1.0 * b * job.nodes, "ms": 0.1 * job.nodes, "first_ms": 7.0} for b in job.bits
        }

    for module in (cpu_inference, cpu.cpu_memory, cpu.cpu_growth):
        monkeypatch.setattr(module, "probe", fake_probe)
    monkeypatch.setattr(cpu_kernels, "FLOAT_KERNELS", ((64, 16),))
    csr = tmp_path / "ring.npz"
    np.savez(csr, rowptr=np.arange(9), col=np.roll(np.arange(8), 1))
    with use_backend("torch"):
        sections = ["--sections", "kernels", "inference", "memory", "files", "growth"]
        cpu.main(["--results", str(tmp_path), *TINY, "--csr", f"ring={csr}", "--growth-sizes", "10", "40", *sections])
    document = json.loads((tmp_path / "cpu.json").read_text())
    text = (tmp_path / "cpu.md").read_text()
    kernels, inference = document["kernels"]["data"]["rows"], document["inference"]["data"]["rows"]
    assert {row["graph"] for row in kernels} == {"power-law 300/1.5k", "ring"}
    floats = [*cpu_kernels.BASELINES, cpu_kernels.OWN]
    floats += [cpu_kernels.DGL] if dgl_paths.dgl_absence() is None else []
    assert len(kernels) == 2 * (len(floats) + 2 * 3)
    assert {(row["model"], row["side"]) for row in inference if row["side"].startswith("INT")} == {
        (name, f"INT{bits}") for name in STACKS for bits in (2, 4, 8)
    }
    for rows, column in ((kernels, "over torch.sparse"), (kernels, "over best peer"), (inference, "over best PyG")):
        assert min(abs(row[column] - 1) for row in rows) == 0  # the baseline against itself
    slopes = document["growth"]["data"]["slopes"]
    assert all(abs(row["slope of time"] - 1) < 1e-9 and abs(row["slope of memory"] - 1) < 1e-9 for row in slopes)
    memory = {(row["model"], row["side"]): row["PyG's over this"] for row in document["memory"]["data"]["rows"]}
    assert memory["GAT", "INT2"] == 40
    assert "| peak memory, GAT, PyG's over INT4's | at least 5 | 20 | met |" in text
    assert text.count("aggregate, INT2, packed, ring, over torch.sparse | at least 20 |") == 1
    assert str(tmp_path) not in text + json.dumps(document)


def test_targets() -> None:
    rows = [{"threads": t, "side": s, "x": v} for t, s, v in ((1, "a", 3.0), (2, "a", 1.5), (1, "b", 9.0))]
    measured = per_threads(rows, "x", side="a")
    assert measured == {"(1 thread)": 3.0, "(2 threads)": 1.5}
    assert not Target("a", 2, measured).is_met
    assert Target("a", 1.5, measured).is_met
    assert not Target("a", 2, {}).is_met
    assert not Target("slope", 1.1, {"": 1.2}, at_most=True).is_met
    assert (
        target_table([Target("a", 2, measured)])[2] == "| a | at least 2 | 3 (1 thread), 1.5 (2 threads) | **missed** |"
    )
    assert target_table([Target("a", 2, {})])[2] == "| a | at least 2 |  | not measured |"


def test_slope_of_a_power() -> None:
    assert slope([1, 10, 1000], [2 * n**1.5 for n in (1, 10, 1000)]) == pytest.approx(1.5)


def test_recall_leaves_the_query_out() -> None:
    index = torch.tensor([[7, 3, 5], [1, 2, 4]])
    own = torch.tensor([3, 9])
    kept = cpu_recall._without(index, own, 2)
    assert kept.tolist() == [[7, 5], [1, 2]]
    products = torch.zeros(2, 10).double()
    products[0, [5, 7]], products[1, [2, 0, 1]] = 1.0, torch.tensor([2.0, 2.0, 1.0]).double()
    truth = torch.tensor([[5, 7], [2, 0]])
    assert cpu_recall.recall(kept, truth, products) == 0.75
    products[1, 1] = 2 - 1e-9  # a tie is no miss
    assert cpu_recall.recall(kept, truth, products) == 1


def test_recall_grows_with_bits() -> None:
    x = torch.randn(80, 24) * torch.rand(80, 1)
    rows = [row for row in cpu_recall.similarity_rows(x) if row["range"] == "node"]
    found = [row["recall@10, packed queries"] for row in rows]
    assert [row["bits"] for row in rows] == [2, 4, 8]
    assert found == sorted(found)
    assert found[-1] > 0.95
    assert rows[0]["bytes"] < rows[-1]["bytes"] < rows[0]["float bytes"]


@pytest.mark.slow
@pytest.mark.skipif(not RESET.exists(), reason="the peak of the resident set is read from Linux' /proc")
def test_probe_in_a_process_of_its_own() -> None:
    found = probe(Job("GCN", 3_000, 20_000, WIDTHS, pyg=(FAST_PATH["GCN"],), bits=(4,), rounds=2))
    assert set(found) == {FAST_PATH["GCN"], "INT4"}
    assert all(figures["ms"] > 0 and figures["first_ms"] > 0 and figures["bytes"] >= 0 for figures in found.values())
    with pytest.raises(RuntimeError, match="failed"):
        probe(Job("GCN", 3_000, 20_000, WIDTHS, pyg=("no such path",)))


@pytest.mark.parametrize("section", [cpu_small, cpu_batches])
def test_sections_of_single_calls(section: Any, monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    is_new = section is cpu_batches
    case = cpu_calls.Case("tiny", cpu_calls.molecules(2, 12), 8, 16, 2, is_new=is_new, rounds=3, least=0.0)
    monkeypatch.setattr(section, "CASES", (case,))
    args = SimpleNamespace(rounds=7)
    data = section.measure(args)
    packed = [row for row in data["rows"] if row["side"] == cpu_calls.SIDE]
    assert [row["model"] for row in packed] == ["GCN", "GraphSAGE", "GAT", "GIN"]
    for row in data["rows"]:
        assert 0 < row["ms"] <= row["99 % ms"]
        same = [other for other in data["rows"] if other["model"] == row["model"] and other["side"] != cpu_calls.SIDE]
        assert row["over best peer"] == min(other["ms"] for other in same) / row["ms"]
        assert row["over best PyG"] == min(o["ms"] for o in same if peers.is_pyg(o["side"])) / row["ms"]
    median, tail = section.targets(data)
    assert median.is_met
    assert set(tail.measured) == {row["model"] for row in packed}
    lines = section.markdown({"data": data, "settings": section.settings(args)})
    assert sum(line.startswith("| tiny") for line in lines) == len(data["rows"])
    assert any(line.startswith("tiny: Peers that took part: PyG") for line in lines)


def test_molecules_are_bonded_both_ways_and_side_by_side() -> None:
    x, edge_index = cpu_calls.molecules(3, 25)(4, torch.Generator().manual_seed(0))
    assert x.size(1) == 4
    assert int(edge_index.max()) < x.size(0)
    pairs = set(map(tuple, edge_index.t().tolist()))
    assert all((dst, src) in pairs for src, dst in pairs)
