"""What autograd functions share."""

from __future__ import annotations

import inspect

import torch

import qgnn_plugin as qgnn


def test_signatures_of_functions_with_contexts_are_kept() -> None:
    assert qgnn.quantize_model
    ours = [f for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith("qgnn_plugin")]
    apart = [f for f in ours if f.setup_context is not torch.autograd.Function.setup_context]
    assert len(apart) > 3
    for function in apart:
        kept = vars(function.forward)["__signature__"]
        del function.forward.__signature__
        found = inspect.signature(function.forward)
        function.forward.__signature__ = kept
        assert kept == found
