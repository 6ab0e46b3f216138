"""What ``import qgnn_plugin`` offers, and what it does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qgnn_plugin as qgnn

LAZY = ("data", "lightning_modules", "recipe")
LATER = (*LAZY, "analysis", "cli", "exporting", "onnx", "pretrained", "kernels.cpu.linear", "kernels.triton")


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sub_packages_are_attributes_but_load_on_demand() -> None:
    names = [f"qgnn_plugin.{name}" for name in LATER]
    code = f"import sys, qgnn_plugin as q; print([n for n in {names} if n in sys.modules], 'pytorch_lightning' in"
    code += " sys.modules); print(q.recipe.run_recipe, q.data.load_dataset, q.lightning_modules.NodeDataModule)"
    loaded, found = _run(code).splitlines()
    assert loaded == "[] False"
    assert "run_recipe" in found
    assert "NodeDataModule" in found


@pytest.mark.parametrize("name", LAZY)
def test_sub_packages_are_listed(name: str) -> None:
    assert name in dir(qgnn)
    assert name in qgnn.__all__


def test_unknown_attributes_are_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'recipes'"):
        qgnn.recipes  # noqa: B018


def test_the_import_resolves_no_paths_of_other_modules() -> None:
    """Registering an op by torch's own means asks for the real path of every module that is loaded, a thousand."""
    code = (
        "import os.path, torch, torch_geometric.nn; real, paths = os.path.realpath, []\n"
        "os.path.realpath = lambda path, **options: paths.append(path) or real(path, **options)\n"
        "import qgnn_plugin; print(len(paths))"
    )
    assert int(_run(code)) < 10


# What is in a line may import what is in the lines before it.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("kernels",),
    ("config",),
    ("quantizers", "graph"),
    ("smp",),
    ("layers",),
    ("conversion",),
    ("packing",),
    ("messages", "convs"),
    ("data", "onnx"),
    ("analysis",),
    ("cli",),
)
PACKING = (("lazy",), ("layers",), ("direct", "message_passing"), ("files",), ("embeddings",))


def _imported(file: Path, package: list[str], depth: int = 1) -> set[str]:
    """The sub-packages, and modules beside them, that a module imports from, if only inside a function.

    Args:
        file: The module.
        package: Names of the package that it is in and of those around that one.
        depth: Of the sub-packages among these names.
    """
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            path = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            path = [name for name in path if name]
            names = [path[depth]] if len(path) > depth else [alias.name for alias in node.names]
            found |= set(names) if len(path) >= depth else set()
    return found


@pytest.mark.parametrize(("inside", "levels"), [((), LEVELS), (("packing",), PACKING)])
def test_imports_go_down(inside: tuple[str, ...], levels: tuple[tuple[str, ...], ...]) -> None:
    """Between the sub-packages; what is beside them, at the top, is the interface and what all of them share."""
    root = Path(qgnn.__file__).parent.joinpath(*inside)
    rank = {name: level for level, names in enumerate(levels) for name in names}
    folders = {folder.name for folder in root.iterdir() if (folder / "__init__.py").exists()}
    assert folders - set(rank) <= {"kernels", "lightning_modules"}
    above = ["qgnn_plugin", *inside]
    upwards = [
        f"{file.relative_to(root)} -> {name}"
        for folder in folders & set(rank)
        for file in (root / folder).rglob("*.py")
        for name in _imported(file, [*above, *file.relative_to(root).parts[:-1]], len(above)) & set(rank)
        if name != folder and rank[name] >= rank[folder]
    ]
    assert not upwards


def test_no_sub_package_imports_itself_through_others() -> None:
    """Not by way of the modules at the top either."""
    root = Path(qgnn.__file__).parent
    graph: dict[str, set[str]] = {}
    for file in root.rglob("*.py"):
        path = file.relative_to(root).parts
        if path != ("__init__.py",):
            graph.setdefault(path[0].removesuffix(".py"), set()).update(_imported(file, ["qgnn_plugin", *path[:-1]]))
    folders = {folder.name for folder in root.iterdir() if (folder / "__init__.py").exists()}
    assert len(folders) > 8
    assert not [name for name in folders & set(graph) if name in _reached(graph, graph[name] - {name})]


def _reached(graph: dict[str, set[str]], start: set[str]) -> set[str]:
    """What imports lead to, the first ones included."""
    found, left = set[str](), set(start)
    while left:
        name = left.pop()
        found.add(name)
        left |= graph.get(name, set()) - found
    return found


def test_every_listed_name_is_there() -> None:
    assert not [name for name in qgnn.__all__ if getattr(qgnn, name, None) is None]


@pytest.mark.parametrize("name", ["packing.lazy", "packing.message_passing"])
def test_folders_that_say_what_is_where_name_every_module(name: str) -> None:
    folder = Path(qgnn.__file__).parent.joinpath(*name.split("."))
    doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert [path.stem for path in folder.glob("[a-z]*.py") if f"``{path.stem}``" not in doc] == []
