"""Kernels compiled for other processors than the one at hand: what these lack is left out, results stay the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from llvmlite.binding import get_host_cpu_features

AVX2 = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3")
AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
PROCESSORS = {  # LLVM's name, what it has
    "haswell": AVX2,
    "alderlake": (*AVX2, "avxvnni"),
    "skylake-avx512": (*AVX2, *AVX512),
    "cascadelake": (*AVX2, *AVX512, "avx512vnni"),
    "generic": (),
}
CHECK = """
import torch
from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.backend import use_backend
from qgnn_plugin.kernels.layout import pack_codes, top_code
from qgnn_plugin.kernels.linear import linear
from qgnn_plugin.kernels.plan import GraphPlan

one, low = torch.ones(1), -torch.ones(1)


def check(function, *args, **kwargs):
    with use_backend("torch"):
        expected = function(*args, **kwargs)
    with use_backend("cpu"):
        assert torch.equal(function(*args, **kwargs), expected), (function.__name__, kwargs)


for bits in (2, 4, 8):
    top = top_code(bits)
    for rows, depth, channels in ((53, 70, 130), (9, 256, 40)):
        for least in (0, top):  # any codes, and the largest ones alone: the sums that are hardest to hold
            x = pack_codes(torch.randint(least, top + 1, (rows, depth)), bits)
            w = pack_codes(torch.randint(least, top + 1, (channels, depth)), bits)
            check(linear, x, w, one, low, one, low, depth, bits, bits)
    plan = GraphPlan.from_edges(*torch.randint(0, 53, (2, 900)), 53, 53)
    words = pack_codes(torch.randint(0, top + 1, (53, 70)), bits)
    multiplier = torch.randint(1, 16, (53,), dtype=torch.uint8)
    check(aggregate, words, plan, one, low, 70, bits, multiplier=multiplier)
"""


@pytest.mark.parametrize(
    "name",
    ["haswell", *(pytest.param(name, marks=pytest.mark.slow) for name in PROCESSORS if name != "haswell")],
)
def test_results_are_the_same(name: str) -> None:
    host = get_host_cpu_features()
    missing = [feature for feature in PROCESSORS[name] if not host.get(feature)]
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    features = ",".join(f"+{feature}" for feature in PROCESSORS[name])
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-W", "ignore", "-c", CHECK]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
