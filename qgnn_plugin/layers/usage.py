"""What a message function does with its arguments, read from its source: some matter by their differences alone."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

__all__ = ["is_position", "is_relative"]

POSITIONS = frozenset(
    {"pos", "position", "positions", "coor", "coors", "coord", "coords", "coordinate", "coordinates", "xyz", "loc"}
    | {"location", "locations", "point", "points", "normal", "normals"}
)
# Functions of two points that depend on their difference alone.
_DISTANCES = {"sub", "subtract", "pairwise_distance", "cdist", "dist"}
# Methods that leave a difference of two results a difference of two points.
_PLAIN = {"detach", "float", "double", "half", "to", "type_as", "clone", "contiguous"}
_PLAIN |= {"view", "reshape", "squeeze", "unsqueeze"}
_METADATA = {"shape", "dtype", "device", "size", "dim", "ndim", "numel", "layout"}


def is_position(name: str) -> bool:
    """Whether an argument is called as coordinates are."""
    return any(part in POSITIONS for part in name.lower().split("_"))


def is_relative(layer: Any, name: str) -> bool:
    """Whether ``layer.message`` takes ``name`` at both ends of an edge, and nothing but their difference matters.

    It is not where the source cannot be read.
    """
    taken = layer.inspector.get_param_names("message")
    ends = {f"{name}_i", f"{name}_j"}
    if not ends <= set(taken):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(layer.message)))
    except (OSError, SyntaxError, TypeError):
        return False
    uses = _Uses(ends)
    uses.visit(tree)
    return uses.differences > 0 and not uses.others


class _Uses(ast.NodeVisitor):
    """Counts differences of two names, and whatever else is done with one of them."""

    def __init__(self, names: set[str]) -> None:
        self.names, self.differences, self.others = names, 0, 0

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Sub) and self._are_both(node.left, node.right):
            self.differences += 1
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in _DISTANCES:
            pairs = [(function.value, node.args[0])] if node.args else []  # a.sub(b)
            pairs += [(node.args[0], node.args[1])] if len(node.args) > 1 else []  # torch.sub(a, b)
            if any(self._are_both(*pair) for pair in pairs):
                self.differences += 1
                return
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not (isinstance(node.value, ast.Name) and node.attr in _METADATA):
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.others += node.id in self.names

    def _are_both(self, left: ast.expr, right: ast.expr) -> bool:
        return {_root(left), _root(right)} == self.names


def _root(node: ast.expr) -> str | None:
    """The name of which ``node`` is a part, a view or a copy."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _PLAIN:
            node = node.func.value
        else:
            return None
    return node.id
