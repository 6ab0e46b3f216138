"""Models as programs that other processes run: :mod:`torch.export`, AOTInductor packages and ONNX.

In each of them the edges are an input like the features: one program serves graphs of every size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from .atomic import PathLike, atomic_file, named, shown
from .conversion.converted import is_quantized
from .graph.adjacency import has_fixed_graph
from .packing import is_packed

__all__ = ["export_package", "export_program"]


def export_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """A packed or converted model as a :class:`torch.export.ExportedProgram` with its edges among its inputs.

    Saved by :func:`torch.export.save`, it is loaded in a process of its own by::

        import torch, qgnn_plugin  # the second defines the operations in it

        run = torch.export.load("model.pt2").module()
        logits = run(x, edge_index)

    Args:
        model: A model made by ``pack_model`` or ``quantize_model``, in eval mode.
        args: Example inputs; at least two nodes and two edges, of which the program keeps nothing but the kind.
        kwargs: Example inputs by name.
        dynamic_shapes: As :func:`torch.export.export` has it.  By default the numbers of nodes and of edges are free:
            the last dimension of an integer tensor ``[2, E]`` and the first dimension of every other.

    Raises:
        TypeError: If ``model`` is no such model, or ``args`` no tuple.
        ValueError: If it is in training mode, inside ``fixed_graph`` (where the graph would become a constant), or its
            graph is a sparse matrix.
    """
    check_exported(model, args)
    named = dict(kwargs or {})
    if dynamic_shapes is None:
        dynamic_shapes = free_dimensions((*args, *named.values()))
    with torch.no_grad():
        return torch.export.export(model, args, named or None, dynamic_shapes=dynamic_shapes, strict=False)


def export_package(
    model: nn.Module, args: tuple[Any, ...], path: PathLike, kwargs: Mapping[str, Any] | None = None, **options: Any
) -> str:
    """Compile a packed or converted model ahead of time into an AOTInductor package.

    Needs a C++ compiler here, none where the package runs (on the same kind of machine)::

        import torch, qgnn_plugin  # the second defines the operations in it

        run = torch._inductor.aoti_load_package("model.pt2")
        logits = run(x, edge_index)

    Results are those of the model to float rounding: the compiler may round what stands between the kernels, such as
    an exponential, otherwise than PyTorch does.

    Args:
        model, args, kwargs: As in :func:`export_program`.
        path: Where to write the package, ``*.pt2``.
        options: ``dynamic_shapes``, as in :func:`export_program`, and ``inductor_configs``.

    Returns:
        The path.

    Raises:
        ValueError: If ``path`` does not end in ``.pt2``, besides what :func:`export_program` raises.
        OSError: If there is no folder for it.
    """
    configs = options.pop("inductor_configs", None)
    target = named(path)
    if not target.endswith(".pt2"):
        raise ValueError(f"Expected a path that ends in '.pt2' (got '{shown(path)}')")
    with atomic_file(path) as file:
        program = export_program(model, args, kwargs, **options)
        torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=configs)
    return target


def check_exported(model: Any, args: Any) -> None:
    """Raise unless :func:`export_program` takes ``model`` and ``args``, here."""
    if not isinstance(model, nn.Module) or not (is_packed(model) or is_quantized(model)):
        raise TypeError(
            f"Expected a model made by pack_model or quantize_model (got {type(model).__name__}); a plain one is "
            f"exported by torch.export.export"
        )
    if not isinstance(args, tuple):
        raise TypeError(f"Expected example inputs as a tuple, (x, edge_index) (got {type(args).__name__})")
    if model.training:
        raise ValueError("Expected a model in eval mode (got training mode); call model.eval()")
    if has_fixed_graph():
        raise ValueError(
            "Expected no context of 'fixed_graph' around it, inside of which the graph becomes a constant (got one); "
            "leave it, or use torch.export.export for a program of this graph alone"
        )


def free_dimensions(args: tuple[Any, ...]) -> Any:
    """The default of ``dynamic_shapes``."""
    return tuple(tree_map(_dynamic, value) for value in args)


def _dynamic(value: Any) -> Any:
    """Which dimensions of an example count nodes, edges or graphs."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return None
    if value.layout != torch.strided:
        raise ValueError(
            f"Expected dense tensors, the graph as an edge_index [2, E] (got {value.layout}), which a program can take "
            f"as its input; torch_geometric.utils.to_edge_index gives one"
        )
    pairs = value.dim() == 2 and value.size(0) == 2 and not value.is_floating_point()
    dimension = 1 if pairs else 0
    if value.size(dimension) < 2:
        raise ValueError(f"Expected an example of two nodes, edges and graphs or more (got shape {list(value.shape)})")
    return {dimension: Dim.DYNAMIC}
