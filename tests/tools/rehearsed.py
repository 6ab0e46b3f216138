"""Rehearses ops and models for one card and prints what would have been launched, as JSON.

Run with the interpreter off: ``python rehearsed.py TARGET BITS... [--models NAME...]``
"""

import argparse
import json
from typing import Any

import torch

from benchmarks.gpu.checks import checks
from benchmarks.gpu.graphs import edge_index_of
from benchmarks.gpu.models import packed_model
from benchmarks.stacks import STACKS, build_stack
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.triton.autotune import power_law_plan
from qgnn_plugin.kernels.triton.launch import architecture
from tools.rehearsal import Launch, rehearse

FEATURES, HEADS = 64, 4
WIDTHS = (64, 128, 128, 40)
SIZES = ((2048, 40_000), (1531, 30_011))  # a multiple of 16 and an odd number


def run_ops(target: str, plan: GraphPlan, bits: list[str]) -> list[Launch]:
    with rehearse(target) as launches:
        for name, _, run in checks(plan, FEATURES, HEADS):
            if name.rsplit("int", 1)[1] in bits:
                run()
    return launches


def run_models(target: str, plan: GraphPlan, names: list[str], bits: list[str]) -> list[Launch]:
    x, edge_index = torch.randn(plan.num_src, WIDTHS[0]), edge_index_of(plan)
    found: list[Launch] = []
    for name in names:
        for width in bits:
            model = packed_model(build_stack(name, WIDTHS).eval(), x, edge_index, int(width))
            with rehearse(target) as launches, torch.no_grad():
                assert model(x, edge_index).shape == (plan.num_dst, WIDTHS[-1])
            found += launches
    return found


def shown(launches: list[Launch], hip: bool) -> list[dict[str, Any]]:
    """One entry per binary."""
    entries = []
    for launch in {launch.code: launch for launch in launches}.values():
        entry = {"kernel": launch.kernel, "threads": launch.num_warps * (64 if hip else 32)}
        if not hip:
            binary = launch.binary
            entry |= {"registers": binary.registers, "spills": binary.spills, "local_bytes": binary.local_bytes}
        entries.append(entry)
    return entries


def main(target: str, bits: list[str], names: list[str]) -> None:
    torch.manual_seed(0)
    plans = [power_law_plan(nodes, edges, torch.device("cpu")) for nodes, edges in SIZES]
    first, second = (run_ops(target, plan, bits) for plan in plans)
    models = run_models(target, plans[0], names, [b for b in bits if b != "8"])
    assert architecture(torch.device("cpu")) == "default"  # over
    document = {
        "launches": [[launch.kernel for launch in launches] for launches in (first, second)],
        "new": [launch.kernel for launch in second if launch.code not in {launch.code for launch in first}],
        "ops": shown(first, target.startswith("gfx")),
        "models": shown(models, target.startswith("gfx")),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("bits", nargs="+")
    parser.add_argument("--models", nargs="+", default=list(STACKS))
    arguments = parser.parse_args()
    main(arguments.target, arguments.bits, arguments.models)
