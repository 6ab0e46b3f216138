"""What docstrings and comments refer to by its place is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {name: ROOT / name for name in ("qgnn_plugin", "kernels", "lightning_modules")}
MAPPED = ("kernels", "lightning_modules")  # within the package
ROLE = re.compile(r":(?:mod|func|class|meth|data|attr|exc):`~?((?:\.+|qgnn_plugin\.)[\w.]+)`")
SOURCES = sorted(file for folder in FOLDERS.values() for file in folder.rglob("*.py"))


def _place(file: Path) -> list[str]:
    """Names of the package that a module is in."""
    parts = list(file.relative_to(ROOT).parent.parts)
    return ["qgnn_plugin", *parts] if parts[0] in MAPPED else parts


def _path(names: list[str]) -> Path:
    """Where a module or package of these names would be, without an ending."""
    inner = len(names) > 1 and names[1] in MAPPED
    return ROOT.joinpath(*names[1:]) if inner else ROOT.joinpath(*names)


@cache
def _names(file: Path) -> frozenset[str]:
    """What a module defines or imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
    return frozenset(found)


def _is_there(names: list[str]) -> bool:
    for count in range(len(names), 0, -1):
        path = _path(names[:count])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                rest = names[count:]
                # Of what is not a module, only classes have names of their own.
                return not rest or (rest[0] in _names(file) and (len(rest) == 1 or rest[0].strip("_")[0].isupper()))
    return False


@pytest.mark.parametrize("folder", FOLDERS)
def test_references_lead_somewhere(folder: str) -> None:
    lost, seen = [], 0
    for file in SOURCES:
        if not file.is_relative_to(FOLDERS[folder]):
            continue
        for match in ROLE.finditer(file.read_text()):
            target, seen = match.group(1), seen + 1
            dots = len(target) - len(target.lstrip("."))
            package = _place(file)
            names = [*package[: len(package) - dots + 1], *target.lstrip(".").split(".")] if dots else target.split(".")
            if not _is_there(names):
                lost.append(f"{file.relative_to(ROOT)}: {target}")
    assert seen
    assert not lost
