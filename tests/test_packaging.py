"""Three folders install as one package, from a wheel and in editable form, without a network."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "qgnn_plugin": "qgnn_plugin",
    "kernels": "qgnn_plugin/kernels",
    "lightning_modules": "qgnn_plugin/lightning_modules",
}
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
NEEDS = (
    "import qgnn_plugin, qgnn_plugin.kernels, qgnn_plugin.lightning_modules, qgnn_plugin.data; "
    "print(*(m.__file__ for m in (qgnn_plugin, qgnn_plugin.kernels, "
    "qgnn_plugin.lightning_modules, qgnn_plugin.data)), sep='\\n')"
)


def _run(*command: object, cwd: Path) -> str:
    """Runs outside the checkout; shows both streams where it fails."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is built, so that no build folder appears in the checkout."""
    target = tmp_path / "source"
    target.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, target)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__py*"))
    return target


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Interpreter of a bare environment that sees this one's packages, but not its checkout.

    A path file adds the folder without reading the path files in it, the editable install's among
    them. No pip inside: ours installs from outside.
    """
    prefix = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", prefix, cwd=tmp_path)
    scheme = "nt" if os.name == "nt" else "posix_prefix"
    site = Path(sysconfig.get_path("purelib", scheme, {"base": str(prefix)}))
    (site / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return prefix / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _install(python: Path, *what: object, cwd: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    alone = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    _run(*pip, *alone, *what, cwd=cwd)


def _imported(python: Path, cwd: Path) -> list[Path]:
    return [Path(line).resolve() for line in _run(python, "-c", NEEDS, cwd=cwd).splitlines()]


def test_wheel(source: Path, python: Path, tmp_path: Path) -> None:
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps")
    _run(*build, "--no-build-isolation", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("qgnn_plugin-*.whl")

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(n for n in archive.namelist() if n.endswith("METADATA"))
        header = archive.read(metadata).decode()
    expected = {"qgnn_plugin/py.typed"}
    for folder, mapped in FOLDERS.items():
        for path in (p for kind in ("py", "json", "npz", "txt") for p in (source / folder).rglob(f"*.{kind}")):
            expected.add(f"{mapped}/{path.relative_to(source / folder).as_posix()}")
    assert names == expected
    assert "Requires-Python: <3.14,>=3.10" in header
    assert "License-Expression: MIT" in header
    assert "Requires-Dist: torch>=2.6\n" in header
    required = [line for line in header.splitlines() if line.startswith("Requires-Dist")]
    assert not [line for line in required if "triton" in line and "platform_system" not in line]

    _install(python, wheel, cwd=tmp_path)
    shutil.rmtree(source)
    for path in _imported(python, tmp_path):
        assert (tmp_path / "venv").resolve() in path.parents
    assert (python.parent / "qgnn").exists() or (python.parent / "qgnn.exe").exists()


def test_editable_install(source: Path, python: Path, tmp_path: Path) -> None:
    _install(python, "--editable", source, cwd=tmp_path)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    for path, folder in zip(_imported(python, outside), [*FOLDERS, "qgnn_plugin"], strict=True):
        assert (source / folder).resolve() in path.parents
    # A module added later is there without another installation.
    (source / "kernels" / "added_later.py").write_text("VALUE = 7\n")
    added = "from qgnn_plugin.kernels.added_later import VALUE; print(VALUE)"
    assert _run(python, "-c", added, cwd=outside).strip() == "7"


def test_packages_are_found_by_themselves(source: Path) -> None:
    """New sub-packages of every folder are listed, no name but ``qgnn_plugin`` is claimed."""
    added = ["tests", "examples", "benchmarks", "qgnn_plugin/new", "kernels/new/deep"]
    for folder in [*added, "kernels/new"]:
        (source / folder).mkdir(exist_ok=True, parents=True)
        (source / folder / "__init__.py").touch()
    show = "import setuptools; setuptools.setup = lambda packages: print(*packages)\n"
    listed = _run(sys.executable, "-c", f"{show}exec(open('setup.py').read())", cwd=source).split()
    assert {package.split(".")[0] for package in listed} == {"qgnn_plugin"}
    for package in ("qgnn_plugin.new", "qgnn_plugin.kernels.new.deep", "qgnn_plugin.data"):
        assert package in listed
