"""Triton kernels are tested under the interpreter, with poisoned outputs and short segments."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("triton") else ["*/test_triton.py", "triton/*"]

SEGMENT = 16  # small graphs have hubs, and interpreted loops stay short
KERNELS = ("aggregate_sum", "aggregate_multiplied", "aggregate_max", "aggregate_weighted", "attention", "float_sum")


@pytest.fixture(autouse=True)
def small_segments(request: pytest.FixtureRequest) -> Iterator[None]:
    """In every ``test_triton.py`` of an op, and in ``triton/``."""
    if request.path.name != "test_triton.py" and request.path.parent.name != "triton":
        yield
        return
    request.getfixturevalue("poison_empty")
    from qgnn_plugin.kernels.triton.launch import Config, override

    configs = {name: Config(segment=SEGMENT, unroll=2) for name in KERNELS}
    configs["attention_v2"] = Config(segment=SEGMENT, unroll=1, max_codes=32)
    with override(**configs):
        yield
