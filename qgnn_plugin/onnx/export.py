"""``export_onnx``: a packed model as an ONNX file whose graph is an input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..atomic import PathLike, atomic_file
from ..exporting import check_exported, export_program, free_dimensions
from .standard import standard_forms

__all__ = ["DOMAIN", "export_onnx"]

DOMAIN = "qgnn"  # of the ops, version 1
OPSET = 20
INSTALL = "Expected the packages onnx, onnxscript and, to run files, onnxruntime; pip install 'qgnn_plugin[onnx]'"


class _Poisoned(nn.Module):
    """A model whose outputs are NaN where features are: ONNX has no operation that refuses them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, *args: Any) -> Any:
        floats = [v for v in tree_leaves(args) if isinstance(v, Tensor) and v.is_floating_point()]
        nothing = sum((v * 0).sum() for v in floats)  # NaN of NaN and infinity

        def poisoned(y: Any) -> Any:
            return y + nothing if isinstance(y, Tensor) and y.is_floating_point() else y

        return tree_map(poisoned, self.model(*args))


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: PathLike,
    *,
    standard_ops: bool = False,
    dynamic_shapes: Any = None,
    input_names: tuple[str, ...] | None = None,
) -> None:
    """Write a packed or converted model as an ONNX file; numbers of nodes and edges are free.

    By default the ops of packed models are nodes of the domain ``qgnn``, version 1, with the arguments of the op of
    that name, for a runtime that has kernels for them.  Spelled out in standard ops the file runs in any runtime, with
    weights still in packed words, but without the speed of the kernels.  There, what sums over codes (GCN, GraphSAGE,
    GIN, propagation) is bitwise the model; attention and edge weights are to float rounding.  Features with NaN or
    infinity give NaN, nodes that do not exist are refused by the runtime or read elsewhere.

    Args:
        model: A model made by ``pack_model`` or ``quantize_model``, in eval mode.
        args: Example inputs, as in :func:`qgnn_plugin.export_program`.
        path: Where to write it.
        standard_ops: Whether to spell the ops out.
        dynamic_shapes: As in :func:`qgnn_plugin.export_program`.
        input_names: Of the inputs; by default those of the model's ``forward``.

    Raises:
        ImportError: If the packages onnx and onnxscript are missing.
        ValueError: If the model uses an op that has no form of standard ones, besides what
            :func:`qgnn_plugin.export_program` raises.
        OSError: If there is no folder for ``path``.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{INSTALL} (got: {error})") from error
    with atomic_file(path) as file:
        check_exported(model, args)
        shapes = free_dimensions(args) if dynamic_shapes is None else dynamic_shapes
        program = export_program(_Poisoned(model), args, dynamic_shapes=(tuple(shapes),))
        if standard_ops:
            program = program.run_decompositions({**torch.export.default_decompositions(), **standard_forms()})
        translations = _translations(program, standard_ops)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names or _names(model, args)),
            custom_translation_table=translations,
            verbose=False,
        )
        assert exported is not None
        file.write(onnx_bytes(exported.model_proto, onnx))


def onnx_bytes(proto: Any, onnx: Any) -> bytes:
    """The file of a model, whose imported domains include ours."""
    imported = any(entry.domain == DOMAIN for entry in proto.opset_import)
    if not imported and any(node.domain == DOMAIN for node in proto.graph.node):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return proto.SerializeToString()


def _names(model: nn.Module, args: tuple[Any, ...]) -> list[str]:
    """Names of the tensors in ``args`` by the parameters of ``forward``."""
    parameters = list(inspect.signature(model.forward).parameters)
    names = []
    for place, value in enumerate(args):
        name = parameters[place] if place < len(parameters) else f"input_{place}"
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        names += [name] if len(leaves) == 1 else [f"{name}_{k}" for k in range(len(leaves))]
    return names


def _translations(program: torch.export.ExportedProgram, standard_ops: bool) -> dict[Callable[..., Any], Any]:
    """What the ops that are left in a program become."""
    from .nodes import custom_node, plan_in_standard_ops

    found = {n.target for n in program.graph.nodes if n.op == "call_function" and _is_ours(n.target)}
    if not standard_ops:
        return {op: custom_node(op) for op in found}
    plan: Any = torch.ops.qgnn.plan.default
    if others := sorted(str(op) for op in found - {plan}):
        raise ValueError(
            f"Expected a model whose ops have a form of standard ones (got {', '.join(others)}); leave 'standard_ops' "
            f"out for nodes of the domain '{DOMAIN}'"
        )
    return {plan: plan_in_standard_ops} if plan in found else {}


def _is_ours(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == DOMAIN


