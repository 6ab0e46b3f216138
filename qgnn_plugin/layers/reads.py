"""What the methods of a class do with its own weights, read from their source."""

from __future__ import annotations

import ast
import inspect
import textwrap
import weakref
from dataclasses import dataclass, field

from torch import nn
from torch_geometric.nn import MessagePassing

__all__ = ["Reads", "reads_of"]

FRAMEWORK = ("torch.", "pytorch_lightning.", "lightning.")
SETTING_UP = {"__init__", "__repr__", "extra_repr", "reset_parameters", "initialize_parameters"}
PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "einsum", "segment_matmul"}
TRANSPOSING = {"t", "T", "mT", "transpose", "swapaxes"}
VIEWS = {*TRANSPOSING, "contiguous", "to", "type_as", "unbind", "chunk", "split", "unsqueeze", "squeeze"}
RESHAPING = {"view", "reshape", "flatten"}
OUT_LAST, OUT_BEFORE = -2, -1  # the dimension that features meet: of ``x @ W``, and of ``linear(x, W)``


@dataclass
class Reads:
    """What a class reads of its own.

    Args:
        weights: Attributes that are factors of products, with the dimension that is summed over.
        tables: Attributes whose ``weight`` is read.
        methods: The methods that do either.
    """

    weights: dict[str, int] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    methods: set[str] = field(default_factory=set)


_READS: weakref.WeakKeyDictionary[type, Reads] = weakref.WeakKeyDictionary()


def reads_of(cls: type) -> Reads:
    """What the methods of ``cls``, apart from those of its framework, read."""
    if cls not in _READS:
        _READS[cls] = _read(cls)
    return _READS[cls]


def _read(cls: type) -> Reads:
    found = Reads()
    if not issubclass(cls, nn.Module):
        return found
    for owner in cls.__mro__:
        if owner in (nn.Module, MessagePassing, object) or f"{owner.__module__}.".startswith(FRAMEWORK):
            continue
        for name, method in vars(owner).items():
            function = inspect.unwrap(method) if inspect.isfunction(method) else None
            if function is None or name in SETTING_UP or inspect.getattr_static(cls, name) is not method:
                continue
            reader = _Reader()
            try:
                reader.visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
            except (OSError, SyntaxError, TypeError):
                continue
            if reader.weights or reader.tables:
                found.methods.add(name)
            for attribute, dim in reader.weights.items():
                found.weights.setdefault(attribute, dim)
            found.tables |= reader.tables
    return found


class _Reader(ast.NodeVisitor):
    """Follows attributes of ``self`` through names and views to the products that they are factors of."""

    def __init__(self) -> None:
        self.owner = ""  # what the method calls its first argument
        self.weights: dict[str, int] = {}
        self.tables: set[str] = set()
        self.names: dict[str, tuple[str, bool]] = {}  # of locals: the attribute that they are, whether transposed

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not self.owner:
            self.owner = next((arg.arg for arg in (*node.args.posonlyargs, *node.args.args)), "self")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        origin = self._origin(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.names.pop(target.id, None)
                if origin is not None:
                    self.names[target.id] = origin

    def visit_For(self, node: ast.For) -> None:
        origin = self._origin(node.iter)
        if origin is not None and isinstance(node.target, ast.Name):
            self.names[node.target.id] = origin
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "weight" and (table := self._attribute(node.value)) is not None:
            self.tables.add(table)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        # A product of two weights is a weight that is computed, not one that features meet.
        if isinstance(node.op, ast.MatMult) and not (self._is_own(node.left) and self._is_own(node.right)):
            self._factor(node.left, OUT_BEFORE)
            self._factor(node.right, OUT_LAST)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name not in PRODUCTS:
            return
        if isinstance(function, ast.Attribute) and self._origin(function.value) is not None:  # W.matmul(x)
            self._factor(function.value, OUT_BEFORE)
        args = [*node.args, *(keyword.value for keyword in node.keywords)]
        if name == "einsum":
            self._einsum(args)
            return
        for place, arg in enumerate(args):
            is_method = isinstance(function, ast.Attribute) and not _is_module(function.value)
            right = is_method or place > 0
            self._factor(arg, OUT_BEFORE if name == "linear" or not right else OUT_LAST)

    def _einsum(self, args: list[ast.expr]) -> None:
        equation = args[0].value if args and isinstance(args[0], ast.Constant) else None
        if not isinstance(equation, str) or "->" not in equation:
            return
        terms, out = equation.replace(" ", "").split("->")
        for labels, arg in zip(terms.split(","), args[1:], strict=False):
            summed = [i - len(labels) for i, label in enumerate(labels) if label not in out]
            self._factor(arg, summed[0] if len(summed) == 1 else OUT_LAST)

    def _factor(self, node: ast.expr, dim: int) -> None:
        origin = self._origin(node)
        if origin is not None:
            attribute, transposed = origin
            self.weights.setdefault(attribute, -3 - dim if transposed and dim in (-1, -2) else dim)

    def _attribute(self, node: ast.expr) -> str | None:
        """The name of an attribute of the layer itself."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.owner:
            return node.attr
        return None

    def _is_own(self, node: ast.expr) -> bool:
        """Whether ``node`` is a weight, whatever its shape is now."""
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RESHAPING:
            node = node.func.value
        return self._origin(node) is not None

    def _origin(self, node: ast.expr) -> tuple[str, bool] | None:
        """The attribute of ``self`` of which ``node`` is a view, and whether its last dimensions are exchanged."""
        transposed = False
        while True:
            attribute = self._attribute(node)
            if attribute is not None:
                return attribute, transposed
            if isinstance(node, ast.Name):
                found = self.names.get(node.id)
                return None if found is None else (found[0], found[1] != transposed)
            if isinstance(node, ast.Subscript):
                node = node.value
                continue
            name = node.func if isinstance(node, ast.Call) else node
            if not isinstance(name, ast.Attribute) or name.attr not in VIEWS:
                return None
            transposed ^= name.attr in TRANSPOSING
            node = name.value


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id in {"torch", "F"})
