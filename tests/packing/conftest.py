"""The references execute the ops here: backends are held to them by tests of their own."""

from collections.abc import Iterator

import pytest

from qgnn_plugin.kernels.backend import use_backend


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield
