"""Compile the kernels ahead of time, for any architecture, on a machine without a GPU.

Run with Triton's interpreter off (``TRITON_INTERPRET`` unset), from tests in a subprocess::

    python -m tools.aot [--target sm_90] [--grid small|full] [--case PATTERN]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from qgnn_plugin.kernels.triton.launch import Config, launch_options

from .aot_cases import BUILDERS
from .case import TARGETS, Case, is_hip
from .rehearsal import driven_by
from .sass import Binary, read_amdgcn, read_cubin

__all__ = ["GRIDS", "cases", "compile_case", "main"]

GRIDS = ("small", "full")


def compile_case(case: Case, target: str) -> Binary:
    """Compile ``case`` for a key of :data:`TARGETS` and read the binary."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("Expected TRITON_INTERPRET to be unset (got 1); use a subprocess")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = set(case.types) - set(names) | set(case.constants) - set(names)
    if unknown:
        raise ValueError(f"Expected arguments of the kernel {names} (got {sorted(unknown)})")
    signature = {n: case.types.get(n, "constexpr") for n in names}
    constants = {n: case.constants.get(n) for n in names if n not in case.types}
    # What the launcher specializes on: tensors of torch's allocator start at multiples of 16.
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in case.types.items() if kind.startswith("*")}
    source = ASTSource(case.kernel, signature, constants, aligned)
    launched = launch_options(Config(num_warps=case.num_warps, max_registers=case.max_registers), not is_hip(target))
    with driven_by(target):
        compiled = triton.compile(
            source,
            target=GPUTarget(*TARGETS[target]),
            options={**launched, "num_stages": case.num_stages, "enable_fp_fusion": False},
        )
    if "cubin" in compiled.asm:
        return read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return read_amdgcn(compiled.asm["amdgcn"])


def cases(grid: str, target: str) -> Iterator[Case]:
    """The specializations of ``grid`` (``"small"`` for quick tests, ``"full"``) for ``target``."""
    for build in BUILDERS:
        yield from build(grid, target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--grid", choices=GRIDS, default="small")
    parser.add_argument(
        "--case", action="append", metavar="PATTERN",
        help="only cases whose op and label, joined by a blank, match one of these shell patterns",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    rows = []
    for target in options.target or list(TARGETS):
        for case in cases(options.grid, target):
            if not any(fnmatchcase(f"{case.op} {case.label}", pattern) for pattern in options.case or ("*",)):
                continue
            binary = compile_case(case, target)
            row = {
                "op": case.op, "case": case.label, "target": target, "num_warps": case.num_warps,
                "codes_per_iteration": case.codes_per_iteration, **case.facts, **asdict(binary),
                "integer_instructions": binary.integer_instructions,
            }  # fmt: skip
            rows.append(row)
            if options.json:  # as far as it got, should the run be cut off
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(
                f"{target:7} {case.op:22} {case.label:34} reg {binary.registers:3} "
                f"spills {binary.spills:3} shared {binary.shared_bytes:6} "
                f"widest load {binary.widest_load:2}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
