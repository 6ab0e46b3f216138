"""Code that computes with all parameters of a model, as a penalty does: conversion changes what these are."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator

from torch import nn

from ..layers.naming import float_class_of
from ..layers.reads import ABOUT
from .passed_by import functions_of

__all__ = ["warn_of_parameter_sums"]

LISTS = {"parameters", "named_parameters"}
# What a penalty is not: what is asked about a parameter, or done to it once.
HARMLESS = ABOUT | {"is_sparse", "grad_fn", "names", "retain_grad", "register_hook"}
SAME = {"data", "detach", "clone", "float", "view", "flatten", "reshape"}
SETTING = re.compile("init|reset|configure|freeze")


def warn_of_parameter_sums(model: nn.Module, stacklevel: int) -> None:
    """Warn where code of ``model``, converted, takes the values of all parameters: ranges are among them now."""
    owners = {float_class_of(m) for m in model.modules()}
    found = sorted({text for owner in owners for text in _sums(owner)})
    if found:
        warnings.warn(
            f"A converted model has ranges among its parameters, and a packed one scales in the place of weights: what "
            f"{'; '.join(found[:5])} computes of them is another number than for the float model; leave out those that "
            f"qgnn_plugin.range_parameters(model) lists, and take it of the converted model",
            stacklevel=stacklevel + 1,
        )


def _sums(owner: type) -> Iterator[str]:
    """Where code of ``owner`` reads the values of parameters that it goes through, in words."""
    for name, function, _ in functions_of(owner):
        if SETTING.search(name.rpartition(".")[2]):
            continue
        parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(function):
            if isinstance(node, (ast.comprehension, ast.For)) and (listed := _listed(node.iter)) is not None:
                scope = parents[node] if isinstance(node, ast.comprehension) else node
                if any(_is_value(use, parents) for use in _uses(node.target, scope)):
                    yield f"'{ast.unparse(listed)}' in {name}"


def _listed(node: ast.expr) -> ast.Call | None:
    """The call that lists parameters, where ``node`` goes through that."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple"):
        if len(node.args) != 1:
            return None
        node = node.args[0]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LISTS:
        return node
    return None


def _uses(target: ast.expr, scope: ast.AST) -> Iterator[ast.Name]:
    """Where ``scope`` reads the parameter that ``target`` is given."""
    last = target.elts[-1] if isinstance(target, ast.Tuple) and target.elts else target  # of a name and a parameter
    if isinstance(last, ast.Name):
        for node in ast.walk(scope):
            if isinstance(node, ast.Name) and node.id == last.id and isinstance(node.ctx, ast.Load):
                yield node


def _is_value(use: ast.Name, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether ``use`` reads the values of a parameter."""
    node: ast.AST = use
    parent = parents[use]
    while isinstance(parent, ast.Attribute) and parent.attr in SAME:  # p.detach().norm()
        node, parent = parent, parents[parent]
        if isinstance(parent, ast.Call) and parent.func is node:
            node, parent = parent, parents[parent]
    if isinstance(parent, ast.Attribute):
        return parent.attr not in HARMLESS and not parent.attr.endswith("_")
    if isinstance(parent, ast.Call):  # init.zeros_(p), len(p), weights.append(p)
        name = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
        return not name.endswith("_") and name not in ("len", "append", "add", "id", "isinstance", "print")
    return isinstance(parent, ast.BinOp)
