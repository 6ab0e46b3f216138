"""Triton kernels of row programs, written from the same expressions as those of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from row_programs import LARGE_MAPS, PROGRAMS, arrays_for, load, node

from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.generated.program import Operand, Product, Program, Unsupported, reference
from qgnn_plugin.kernels.generated.run import row_program
from qgnn_plugin.kernels.generated.triton import write_triton
from qgnn_plugin.kernels.plan import GraphPlan

SOURCES, TARGETS, EDGES = 9, 6, 30


def graph() -> GraphPlan:
    """A few rows, since each costs an interpreted program; one of them is empty, one has half of the edges."""
    src, dst = torch.randint(SOURCES, (EDGES,)), torch.randint(TARGETS - 1, (EDGES,))
    dst[: EDGES // 2] = 2
    return GraphPlan.from_edges(src, dst, SOURCES, TARGETS)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in LARGE_MAPS])
def test_interpreted_kernels_agree_with_their_reference(name: str) -> None:
    program, plan = PROGRAMS[name], graph()
    arrays = arrays_for(program, plan)
    expected = reference(program, arrays, plan.rowptr, plan.col, plan.edge_ids)
    with use_backend("interpret"):
        found = row_program(program, plan, arrays)
    for got, wanted in zip(found, expected, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6 * max(1.0, scale))


def test_large_maps_of_edges_are_for_row_blocks() -> None:
    product = Product(256, 128, 4, 4, True, True)
    nodes = (load(0, 256), node("linear", 0, width=128), node("sum", 1, width=128, row=True))
    with pytest.raises(Unsupported, match="a map of 256 to 128 features"):
        write_triton(Program((Operand("source", 256),), nodes, (2,), products=(product,)))
    for name in LARGE_MAPS:  # each map alone would fit
        with pytest.raises(Unsupported, match="features per edge on an accelerator"):
            write_triton(PROGRAMS[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_of_what_is_not_finite_are_no_numbers(value: float) -> None:
    program, plan = PROGRAMS["maps of 13 features, 8 bits"], graph()
    arrays = arrays_for(program, plan)
    arrays[2][0][:] = value  # of all edges
    with use_backend("interpret"):
        found = row_program(program, plan, arrays)
    reached = plan.degree > 0
    assert found[0][reached].isnan().all()
    assert not found[0][~reached].isnan().any()


def test_interpreted_functions() -> None:
    names, width, count = ("expm1", "log1p", "sigmoid", "tanh", "softplus"), 16, 12
    nodes = [load(0, width), *(node(name, 0, width=width) for name in names)]
    nodes += [node("sum", 1 + k, width=width, row=True) for k in range(len(names))]
    program = Program((Operand("source", width),), tuple(nodes), tuple(range(1 + len(names), 1 + 2 * len(names))))
    every = torch.arange(count)
    x = torch.linspace(-0.99, 25, count * width).view(count, width)
    x[0] = torch.randn(width) * 1e-3
    with use_backend("interpret"):
        found = row_program(program, GraphPlan.from_edges(every, every, count, count), [(x,)])
    for name, got in zip(names, found, strict=True):
        wanted = getattr(torch, name, getattr(torch.nn.functional, name, None))(x.double())
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=1e-30, msg=lambda m, n=name: f"{n}: {m}")


def test_few_numbers_of_edges_times_a_matrix() -> None:
    width, count = 20, 3
    nodes = (
        load(0, width), load(1, count), load(2, count * width), node("map", 1, 2, width=width),
        node("add", 0, 3, width=width), node("sum", 4, width=width, row=True),
    )  # fmt: skip
    operands = (Operand("source", width, 4, "row"), Operand("edge", count), Operand("constant", count * width))
    program, plan = Program(operands, nodes, (5,)), graph()
    arrays = arrays_for(program, plan)
    expected = reference(program, arrays, plan.rowptr, plan.col, plan.edge_ids)
    with use_backend("interpret"):
        found = row_program(program, plan, arrays)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)


COMPILED = {
    "64 features, 4 bits": 1, "4 heads of 16": 1, "3 heads of 5": 1, "softmax of 33 features": 1,
    "maps of 32 features, multipliers": 8,
}  # fmt: skip
SCRIPT = """
import sys
from qgnn_plugin.kernels.generated.store import load_kernel
from tools.aot import Case, compile_case
for path in sys.argv[1:]:
    kernel = load_kernel(open(path).read())
    types = {name: "*fp32" for name in kernel.arg_names} | {"rowptr": "*i64", "col": "*i32", "edge": "*i64"}
    types |= {name: "*i32" for name in kernel.arg_names if name + "_scale" in kernel.arg_names}
    warps = int(path.rpartition("_")[2].removesuffix(".py"))
    for target in ("sm_80", "sm_90", "gfx942"):
        binary = compile_case(Case("generated", path, kernel, types, {}, num_warps=warps), target)
        print(target, binary.registers, binary.spills)
"""


def test_kernels_compile_ahead_of_time_without_spills(tmp_path: Path) -> None:
    paths = []
    for k, (name, warps) in enumerate(COMPILED.items()):
        path = tmp_path / f"{k}_{warps}.py"
        path.write_text(write_triton(PROGRAMS[name]))
        paths.append(str(path))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 3 * len(COMPILED)
    assert all(int(spills) == 0 for _, _, spills in rows), rows
