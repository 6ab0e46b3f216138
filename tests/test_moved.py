"""Names of modules that earlier versions had."""

import importlib

import pytest

from qgnn_plugin.analysis import error_report, injection, stack_error
from qgnn_plugin.graph import adjacency


@pytest.mark.parametrize(
    ("name", "attribute", "found"),
    [
        ("layers.graph", "NormalizedGraph", adjacency.NormalizedGraph),
        ("smp.error", "error_report", error_report.error_report),
        ("smp.injection", "Injection", injection.Injection),
        ("smp.stack_error", "stack_errors", stack_error.stack_errors),
    ],
)
def test_names_of_before_are_those_of_today(name: str, attribute: str, found: object) -> None:
    assert getattr(importlib.import_module(f"qgnn_plugin.{name}"), attribute) is found
