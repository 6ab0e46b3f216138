"""Row programs: generated kernels against their reference, over widths, ranges, empty rows and hubs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from row_programs import PROGRAMS, arrays_for, gathered, load, node

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.generated.program import Operand, Program, Unsupported, reference
from qgnn_plugin.kernels.generated.run import NotFinite, can_run, row_program
from qgnn_plugin.kernels.generated.store import CACHE_ENV, load_kernel
from qgnn_plugin.kernels.plan import GraphPlan

pytest.importorskip("numba")

SOURCES, TARGETS, EDGES = 40, 30, 300


def graph(hub: int = 0) -> GraphPlan:
    """Edges in no order, with isolated targets, duplicates and, on demand, a hub."""
    src, dst = torch.randint(SOURCES, (EDGES + hub,)), torch.randint(TARGETS - 3, (EDGES + hub,))
    dst[:hub] = 5
    return GraphPlan.from_edges(src, dst, SOURCES, TARGETS)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.usefixtures("poison_empty")
def test_kernels_agree_with_their_reference(name: str) -> None:
    program = PROGRAMS[name]
    for plan in (graph(), graph(hub=10_500), GraphPlan.from_edges(*torch.empty((2, 0), dtype=torch.long), 4, 3)):
        arrays = arrays_for(program, plan)
        expected = reference(program, arrays, plan.rowptr, plan.col, plan.edge_ids)
        with use_backend("cpu"):
            found = row_program(program, plan, arrays)
        for got, wanted in zip(found, expected, strict=True):
            scale = float(wanted.abs().max()) if wanted.numel() else 1.0
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6 * max(1.0, scale))


def test_sums_and_products_are_those_of_torch_bit_for_bit() -> None:
    program, plan = PROGRAMS["64 features, 4 bits"], graph()
    arrays = arrays_for(program, plan)
    expected = reference(program, arrays, plan.rowptr, plan.col, plan.edge_ids)
    with use_backend("cpu"):
        found = row_program(program, plan, arrays)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name.startswith("maps")])
def test_linear_maps_are_those_of_rows_bit_for_bit(name: str) -> None:
    """Their largest results; the sum has exponentials in it."""
    program, plan = PROGRAMS[name], graph(hub=200)
    arrays = arrays_for(program, plan)
    expected = reference(program, arrays, plan.rowptr, plan.col, plan.edge_ids)
    with use_backend("cpu"):
        found = row_program(program, plan, arrays)
    assert torch.equal(found[0], expected[0])
    first = program.nodes[program.outputs[0]].width
    assert torch.equal(found[1][:, :first], expected[1][:, :first])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_linear_maps_of_what_is_not_finite_are_refused(value: float) -> None:
    program, plan = PROGRAMS["maps of 32 features, multipliers"], graph()
    arrays = arrays_for(program, plan)
    arrays[2][0][17, 1] = value
    with use_backend("cpu"), pytest.raises(NotFinite):
        row_program(program, plan, arrays)


def test_rows_are_the_same_whatever_the_number_of_threads() -> None:
    program, plan = PROGRAMS["4 heads of 16"], graph(hub=30_000)
    arrays, before = arrays_for(program, plan), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with use_backend("cpu"):
                results.append(row_program(program, plan, arrays))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


FUNCTIONS = {
    "exp": (-100.0, 88.0), "expm1": (-20.0, 20.0), "log": (1e-30, 1e30), "log1p": (-0.999, 1e6), "sqrt": (0.0, 1e9),
    "sigmoid": (-90.0, 90.0), "tanh": (-12.0, 12.0), "softplus": (-80.0, 80.0), "abs": (-3.0, 3.0),
    "neg": (-3.0, 3.0), "relu": (-3.0, 3.0),
}  # fmt: skip


def test_functions_to_a_few_units_in_the_last_place() -> None:
    """All of them in one kernel, whose rows have one edge each."""
    names, width, count = list(FUNCTIONS), 16, 2_000
    nodes = [load(k, width) for k in range(len(names))]
    nodes += [node(name, k, width=width) for k, name in enumerate(names)]
    nodes += [node("sum", len(names) + k, width=width, row=True) for k in range(len(names))]
    operands = tuple(Operand("source", width) for _ in names)
    program = Program(operands, tuple(nodes), tuple(range(2 * len(names), 3 * len(names))))
    every = torch.arange(count)
    plan = GraphPlan.from_edges(every, every, count, count)
    arrays = []
    for low, high in FUNCTIONS.values():
        x = torch.rand(count, width) * (high - low) + low
        x[: count // 4] = (torch.randn(count // 4, width) * 1e-3).clamp(low, high)
        arrays.append((x.contiguous(),))
    arrays[0][0][0, :4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    arrays[names.index("log")][0][0, :4] = torch.tensor([0.0, -1.0, float("inf"), float("nan")])
    with use_backend("cpu"):
        found = row_program(program, plan, arrays)
    for name, got, (x,) in zip(names, found, arrays, strict=True):
        wanted = getattr(torch, name, getattr(torch.nn.functional, name, None))(x.double())
        close = torch.isclose(got.double(), wanted, rtol=1e-6, atol=1e-37, equal_nan=True)
        assert close.all(), (name, x[~close][:3], got[~close][:3])


def test_what_has_no_kernel_says_so() -> None:
    wide = gathered(4096, 4, "tensor")
    with pytest.raises(Unsupported, match="4096 features"):
        wide.check()
    mixed = Program(
        (Operand("source", 8, 4, "tensor"), Operand("source", 8, 8, "tensor")),
        (load(0, 8), load(1, 8), node("add", 0, 1, width=8), node("sum", 2, width=8, row=True)),
        (3,),
    )
    with use_backend("cpu"):
        assert "[4, 8] bits" in str(can_run(mixed, torch.device("cpu")))
    with use_backend("torch"):
        assert "torch" in str(can_run(PROGRAMS["1 feature, 1 bit"], torch.device("cpu")))


def test_operands_of_another_shape_are_refused() -> None:
    program, plan = PROGRAMS["5 features, 8 bits"], graph()
    arrays = arrays_for(program, plan)
    with pytest.raises(ValueError, match="operand 1 of shape"):
        row_program(program, plan, [arrays[0], (torch.randn(3, 5),)])
    words, scale, lower = arrays[0]
    with pytest.raises(ValueError, match="'scale' of operand 0"):
        row_program(program, plan, [(words, scale[:3], lower), arrays[1]])


# Files ###################################################################################################

SOURCE = '''
from qgnn_plugin.kernels.cpu import jit


@jit.kernel
def kernel(x):
    return x + {0}
'''


def test_a_module_is_written_whole_and_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "new"))
    assert load_kernel(SOURCE.format(41))(1) == 42
    files = sorted((tmp_path / "new").glob("*"))
    assert [f.suffix for f in files if f.is_file()] == [".py"]
    assert files[0].stat().st_mode & 0o077 == 0 or (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_a_file_that_holds_something_else_is_never_run(tmp_path: Path) -> None:
    """Whoever wrote it, and whatever it is."""
    script = (
        "from qgnn_plugin.kernels.generated.store import load_kernel\n"
        f"print(load_kernel({SOURCE.format(5)!r})(1))\n"
    )

    def run() -> str:
        environment = {"PATH": "", CACHE_ENV: str(tmp_path), "PYTHONPATH": ""}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return done.stdout.strip()

    assert run() == "6"
    (path,) = tmp_path.glob("*.py")
    written = path.read_text()
    path.write_text("raise SystemExit('run')\n")
    assert run() == "6"
    assert path.read_text() == written


def test_without_a_place_to_write_kernels_run_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv(CACHE_ENV, str(blocked / "below"))
    assert load_kernel(SOURCE.format(7))(1) == 8


def test_few_numbers_of_edges_times_a_matrix() -> None:
    width, count = 48, 5
    nodes = (
        load(0, width),
        load(1, count),
        load(2, count * width),
        node("map", 1, 2, width=width),
        node("add", 0, 3, width=width),
        node("sum", 4, width=width, row=True),
    )
    operands = (Operand("source", width, 4, "row"), Operand("edge", count), Operand("constant", count * width))
    program, plan = Program(operands, nodes, (5,)), graph()
    arrays = arrays_for(program, plan)
    expected = reference(program, arrays, plan.rowptr, plan.col, plan.edge_ids)
    with use_backend("cpu"):
        found = row_program(program, plan, arrays)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
