"""Every Triton test runs under the interpreter, with poisoned outputs and short segments."""

from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

SEGMENT = 16  # small graphs have hubs, and interpreted loops stay short
KERNELS = ("aggregate_sum", "aggregate_max", "aggregate_weighted", "attention", "float_sum")


@pytest.fixture(autouse=True)
def small_segments(poison_empty: None) -> Iterator[None]:
    from qgnn_plugin.kernels.triton.launch import Config, override

    configs = {name: Config(segment=SEGMENT, unroll=2) for name in KERNELS}
    configs["attention_v2"] = Config(segment=SEGMENT, unroll=1, max_codes=32)
    with override(**configs):
        yield
