"""What the methods of a class do with its own weights, read from their source."""

from __future__ import annotations

import ast
import inspect
import textwrap
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from torch import nn
from torch_geometric.nn import MessagePassing

__all__ = ["Reads", "goes_around", "reads_of", "with_reading"]

FRAMEWORK = ("torch.", "pytorch_lightning.", "lightning.")
SETTING_UP = {"__init__", "__repr__", "extra_repr", "reset_parameters", "initialize_parameters"}
# What PyG writes for a class, in modules of their own: an argument may be called ``weight`` there.
GENERATED = ("propagate", "edge_updater")
PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "einsum", "segment_matmul"}
TRANSPOSING = {"t", "T", "mT", "transpose", "swapaxes"}
VIEWS = {*TRANSPOSING, "contiguous", "to", "type_as", "unbind", "chunk", "split", "unsqueeze", "squeeze"}
RESHAPING = {"view", "reshape", "flatten"}
# What is asked of a tensor without its values.
ABOUT = {"dtype", "device", "shape", "layout", "ndim", "dim", "size", "numel", "stride", "grad", "requires_grad"}
ABOUT |= {"is_cuda", "is_leaf", "is_floating_point", "element_size", "get_device", "data_ptr"}
ABOUT |= {"requires_grad_", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
ITERATING = {"reversed", "zip", "enumerate", "list", "tuple", "iter", "next", "sorted", "getattr"}
NOBODY = "\0"  # the name of no argument
OUT_LAST, OUT_BEFORE = -2, -1  # the dimension that features meet: of ``x @ W``, and of ``linear(x, W)``


@dataclass
class Reads:
    """What a class reads of its own.

    Args:
        weights: Attributes that are factors of products, with the dimension that is summed over.
        tables: Attributes whose ``weight`` is read.
        maps: Those of them that are read by code of the user's, so that they may be linear maps as well.
        deep: Whether such code reads the ``weight`` of layers inside of attributes.
        methods: The methods and properties that do any of these.
    """

    weights: dict[str, int] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    maps: set[str] = field(default_factory=set)
    deep: bool = False
    methods: set[str] = field(default_factory=set)


_READS: weakref.WeakKeyDictionary[type, Reads] = weakref.WeakKeyDictionary()


def reads_of(cls: type) -> Reads:
    """What the methods of ``cls``, apart from those of its framework, read."""
    if cls not in _READS:
        _READS[cls] = _read(cls)
    return _READS[cls]


def with_reading(member: Any, wrap: Any) -> Any:
    """A method, or what a property gets, as ``wrap`` makes it."""
    if isinstance(member, property):
        return property(wrap(member.fget), member.fset, member.fdel, member.__doc__)
    return wrap(member)


def goes_around(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether ``forward`` of ``cls`` is that of ``base``, called by ``super().forward``, with code before and after it.

    That code reads no weight of its own, nor hands the layer to anybody who might.
    """
    return cls.forward is not base.forward and _goes_around("forward", cls, base, set())


def _goes_around(name: str, cls: type, base: type, seen: set[str]) -> bool:
    seen.add(name)
    for owner in (owner for owner in cls.__mro__ if owner not in base.__mro__ and name in vars(owner)):
        member = vars(owner)[name]
        function: Any = member.fget if isinstance(member, property) else member
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, SyntaxError, TypeError):
            return False
        nodes = list(ast.walk(tree))
        of_super = {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_super(node.value)}
        used = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
        used |= {id(arg) for node in nodes if _is_super(node) for arg in node.args}  # type: ignore[attr-defined]
        asked = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in ABOUT}
        first = next((arg.arg for node in nodes if isinstance(node, ast.arguments) for arg in node.args), "self")
        for node in nodes:
            if isinstance(node, ast.Name) and node.id == first and id(node) not in used:
                return False
            if isinstance(node, ast.Attribute) and id(node) not in asked and _may_be_weights(node.attr):
                return False
        if name == "forward" and of_super != {"forward"}:
            return False
        own = {node.attr for node in nodes if isinstance(node, ast.Attribute)} - seen - of_super
        if not all(_goes_around(other, cls, base, seen) for other in own):
            return False
    return True


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _may_be_weights(name: str) -> bool:
    return "weight" in name or name in {"parameters", "named_parameters", "_parameters", "out_proj", "__dict__"}


def _read(cls: type) -> Reads:
    found = Reads()
    if not issubclass(cls, nn.Module):
        return found
    readers = list(_readers(cls))
    # Code that writes to a weight has to find the parameter itself, wherever it is called from.
    writes = any(reader.writes for _, _, reader in readers)
    for owner, name, reader in readers:
        is_users = not f"{owner.__module__}.".startswith("torch_geometric.")
        tables = set() if writes else reader.tables
        deep = reader.deep and is_users and not writes
        weights = {} if reader.writes else reader.weights
        if weights or tables or deep:
            found.methods.add(name)
        for attribute, dim in weights.items():
            found.weights.setdefault(attribute, dim)
        found.tables |= tables
        found.maps |= tables if is_users else set()
        found.deep |= deep
    return found


def _readers(cls: type) -> Iterator[tuple[type, str, _Reader]]:
    """What reads each method and property of ``cls``, with the class that it is of and its name."""
    for owner in cls.__mro__:
        if owner in (nn.Module, MessagePassing, object) or f"{owner.__module__}.".startswith(FRAMEWORK):
            continue
        for name, member in vars(owner).items():
            method = member.fget if isinstance(member, property) else member
            function = inspect.unwrap(method) if inspect.isfunction(method) else None
            if function is None or name in SETTING_UP or inspect.getattr_static(cls, name) is not member:
                continue
            if function.__module__ in {f"{owner.__module__}_{owner.__name__}_{made}" for made in GENERATED}:
                continue
            if (reader := _reader_of(function, owner, cls)) is not None:
                yield owner, name, reader


def _reader_of(function: FunctionType, owner: type, cls: type) -> _Reader | None:
    """What a method that ``cls`` has of ``owner`` reads, and what those of its parents read that it calls."""
    reader = _Reader()
    if not reader.has_read(function):
        return None
    if not reader.deep and reader.handed:
        reader.deep = _read_by_callees(reader, function, cls, {function})
    above = cls.__mro__[cls.__mro__.index(owner) + 1 :]
    for holder, name in reader.above:
        named = _held(holder, function)
        parents = above[above.index(named) :] if named in above else above if named is None else ()
        parent: type = next((parent for parent in parents if name in vars(parent)), object)
        method, is_theirs = vars(parent).get(name), f"{parent.__module__}.".startswith(FRAMEWORK)
        if not isinstance(method, FunctionType) or name in SETTING_UP or (is_theirs and parent is not nn.Linear):
            continue
        if (inherited := _reader_of(inspect.unwrap(method), parent, cls)) is not None:
            reader.add(inherited, is_users=not is_theirs and not f"{parent.__module__}.".startswith("torch_geometric."))
    return reader


def _read_by_callees(reader: _Reader, function: FunctionType, cls: type, seen: set[FunctionType]) -> bool:
    """Whether a function of the user's that ``function`` hands layers to reads the ``weight`` of one."""
    for node, places, keywords in reader.handed:
        callee, num_bound = _callee(node, reader.owner, function, cls)
        if callee is None or callee in seen:
            continue
        seen.add(callee)
        names = callee.__code__.co_varnames[num_bound : callee.__code__.co_argcount]
        inner = _Reader(owner=NOBODY, inside=keywords | {name for i, name in enumerate(names) if i in places})
        if not inner.has_read(callee) or inner.writes:
            continue
        if inner.deep or _read_by_callees(inner, callee, cls, seen):
            return True
    return False


def _callee(node: ast.expr, owner: str, function: FunctionType, cls: type) -> tuple[FunctionType | None, int]:
    """The function of the user's that ``node`` in the code of ``function`` names, and how many arguments it has."""
    found: Any = None
    num_bound = 0
    if isinstance(node, ast.Name):
        found = _named(node.id, function)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        is_own = node.value.id == owner
        holder = cls if is_own else _named(node.value.id, function)
        if isinstance(holder, (type, ModuleType)):
            found = inspect.getattr_static(holder, node.attr, None)
            num_bound = int(isinstance(found, classmethod) or (is_own and isinstance(found, FunctionType)))
    if isinstance(found, (staticmethod, classmethod)):
        found = found.__func__
    found = inspect.unwrap(found) if isinstance(found, FunctionType) else None
    if found is None or f"{found.__module__}.".startswith((*FRAMEWORK, "torch_geometric.")):
        return None, 0
    return found, num_bound


def _held(node: ast.expr | None, function: FunctionType) -> Any:
    """What a name, or an attribute of one, is around ``function``."""
    if isinstance(node, ast.Attribute):
        return getattr(_held(node.value, function), node.attr, NOBODY)
    return _named(node.id, function) if isinstance(node, ast.Name) else node


def _named(name: str, function: FunctionType) -> Any:
    """What ``name`` is around ``function``."""
    for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        if free == name:
            try:
                return cell.cell_contents
            except ValueError:  # not yet
                return None
    return function.__globals__.get(name)


class _Reader(ast.NodeVisitor):
    """Follows attributes of ``self`` through names and views to the products that they are factors of."""

    def __init__(self, owner: str = "", inside: Collection[str] = ()) -> None:
        self.owner = owner  # what the method calls its first argument
        self.weights: dict[str, int] = {}
        self.tables: set[str] = set()
        self.deep = self.writes = False
        self.names: dict[str, tuple[str, bool]] = {}  # of locals: the attribute that they are, whether transposed
        self.inside: set[str] = set(inside)  # locals that may be layers inside of attributes
        # What is called with such layers, with the places and the names of these.
        self.handed: list[tuple[ast.expr, set[int], set[str]]] = []
        # The methods of parents that are called: of which class, none for that of ``super()``, and which.
        self.above: list[tuple[ast.expr | None, str]] = []

    def has_read(self, function: FunctionType) -> bool:
        """Read the source of ``function``, if there is one."""
        try:
            self.visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
        except (OSError, SyntaxError, TypeError):
            return False
        return True

    def add(self, inherited: _Reader, is_users: bool) -> None:
        """What a method of a parent reads as well."""
        self.weights = {**inherited.weights, **self.weights}
        self.writes |= inherited.writes
        if is_users:
            self.tables |= inherited.tables
            self.deep |= inherited.deep

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not self.owner:
            self.owner = next((arg.arg for arg in (*node.args.posonlyargs, *node.args.args)), "self")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        self._note_inside(node.value, *node.targets)
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
        self._note_inside(node.iter, node.target)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._note_inside(node.iter, node.target)
        self.generic_visit(node)

    def _visit_comprehension(self, node: Any) -> None:
        for generator in node.generators:  # before what they are of
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_comprehension

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _is_weight(node.value) and node.attr in ABOUT:
            return
        if _is_weight(node.value) and (node.attr == "data" or (node.attr[-1] == "_" and node.attr[-2:] != "__")):
            self.writes = True
        if _is_weight(node):
            self.writes |= not isinstance(node.ctx, ast.Load)
            table = self._attribute(node.value)
            if table is not None:
                self.tables.add(table)
            elif self._is_inside(node.value):
                self.deep = True
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if _is_weight(node.value) and not isinstance(node.ctx, ast.Load):
            self.writes = True
        self.generic_visit(node)

    def _note_inside(self, value: ast.expr, *targets: ast.expr) -> None:
        """Note names that are given layers of ``value``."""
        if self._is_inside(value):
            names = (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
            self.inside |= set(names) - {self.owner}

    def _is_inside(self, node: ast.expr) -> bool:
        """Whether ``node`` may be a layer inside of an attribute of the layer itself, or hold such layers."""
        while True:
            if isinstance(node, (ast.Attribute, ast.Subscript)):
                node = node.value
            elif isinstance(node, ast.Call):
                name = node.func
                if isinstance(name, ast.Attribute):  # self.layers.values()
                    node = name.value
                elif node.args and isinstance(name, ast.Name) and name.id in ITERATING:  # reversed(self.layers)
                    return any(self._is_inside(arg) for arg in node.args)
                else:
                    return False
            else:
                return isinstance(node, ast.Name) and node.id in {self.owner, *self.inside}

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
        if name.endswith("_") and any(_is_weight(arg) for arg in node.args):  # init.zeros_(W), F.normalize_(W)
            self.writes = True
        places = {place for place, arg in enumerate(node.args) if self._is_inside(arg)}
        keywords = {keyword.arg for keyword in node.keywords if keyword.arg and self._is_inside(keyword.value)}
        if places or keywords:
            self.handed.append((function, places, keywords))
        if isinstance(function, ast.Attribute):
            self._note_above(function, node.args)
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

    def _note_above(self, function: ast.Attribute, args: list[ast.expr]) -> None:
        """Note ``super().forward(x)``, and ``Parent.forward(self, x)``."""
        holder, first = function.value, args[0] if args else None
        if isinstance(holder, ast.Call) and getattr(holder.func, "id", "") == "super":
            self.above.append((None, function.attr))
        elif isinstance(holder, (ast.Name, ast.Attribute)) and getattr(first, "id", "") == self.owner:
            self.above.append((holder, function.attr))

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


def _is_weight(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "weight"


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id in {"torch", "F"})
