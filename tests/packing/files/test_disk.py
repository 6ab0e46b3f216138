"""Files on disk: permissions, names, links, crashes, and files that change while a model is in use."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from packing.cases import MODELS, packed_pair

import qgnn_plugin
from qgnn_plugin import PackedEmbeddings, atomic
from qgnn_plugin.atomic import atomic_file
from qgnn_plugin.cli.building import Origin
from qgnn_plugin.cli.loading import save_checkpoint
from qgnn_plugin.packing.files import container

Save = Callable[[Any], None]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    _, packed, args = packed_pair("gcn", bits=2)
    return packed, args


@pytest.fixture(params=["model", "embeddings", "command line"])
def save(request: pytest.FixtureRequest, pair: Any) -> Save:
    table = PackedEmbeddings.from_float(torch.randn(5, 4))
    linear, origin = torch.nn.Linear(2, 2), Origin("torch.nn.Linear")
    return {
        "model": lambda path: qgnn_plugin.save_packed(pair[0], path),
        "embeddings": lambda path: table.save(path),
        "command line": lambda path: save_checkpoint(linear, Path(os.fsdecode(path)), origin),
    }[request.param]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(save: Save, mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, b"caf\xe9.safetensors", "with space\nand line", b"bytes"])
def test_names(save: Save, name: str | bytes, tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    save(path)
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]


@pytest.mark.parametrize("name", ["x" * 255, b"caf\xe9.safetensors"])
def test_such_names_load(pair: Any, name: str | bytes, tmp_path: Path) -> None:
    packed, args = pair
    path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    for there in (path, os.fsdecode(path), Path(os.fsdecode(path))):
        qgnn_plugin.save_packed(packed, there)
        assert torch.equal(qgnn_plugin.load_packed(there, MODELS["gcn"]())(*args), packed(*args))
    Path(os.fsdecode(path)).write_bytes(b"short")
    with pytest.raises(ValueError, match="truncated") as caught:
        qgnn_plugin.load_packed(path, MODELS["gcn"]())
    str(caught.value).encode()  # can be printed


def test_places_that_cannot_be_written(pair: Any, tmp_path: Path) -> None:
    packed, _ = pair
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("here")
    with pytest.raises(FileNotFoundError, match=r"folder.*none.*make it.*/missing'"):
        qgnn_plugin.save_packed(packed, tmp_path / "missing" / "file")
    with pytest.raises(IsADirectoryError, match=r"got a folder.*/folder'"):
        qgnn_plugin.save_packed(packed, tmp_path / "folder")
    with pytest.raises(NotADirectoryError, match="/file'"):
        qgnn_plugin.save_packed(packed, tmp_path / "file" / "inside")
    with pytest.raises(OSError, match=r"too long.*xxx'") as caught:
        qgnn_plugin.save_packed(packed, tmp_path / ("x" * 256))
    assert ".tmp" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    for name, found in (("folder", "a folder"), ("nothing", "nothing"), ("\0", "nothing")):
        with pytest.raises(FileNotFoundError, match=f"got {found}"):
            qgnn_plugin.load_packed(tmp_path / name, MODELS["gcn"]())


def test_a_link_is_replaced_and_not_followed(save: Save, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("untouched")
    (tmp_path / "link").symlink_to("elsewhere")
    save(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "untouched"


def test_the_file_and_its_name_reach_the_disk(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)), sync(fd)))
    save(tmp_path / "file")
    assert synced == [False, True]


def test_what_killed_writers_leave_is_swept_by_the_next(tmp_path: Path) -> None:
    """And only that: not the file of a writer that lives, and nothing of the user's."""
    script = textwrap.dedent(f"""
        import os, runpy, signal, sys
        with runpy.run_path({atomic.__file__!r})["atomic_file"](sys.argv[1]) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    own = {".qgnn-file.tmp", f".qgnn-{'a' * 32}.tmp"}
    (tmp_path / ".qgnn-file.tmp").write_text("the user's own")
    (tmp_path / f".qgnn-{'a' * 32}.tmp").symlink_to(".qgnn-file.tmp")
    for name in ("model", "other"):
        done = subprocess.run([sys.executable, "-c", script, tmp_path / name], check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(os.listdir(tmp_path)) == 3  # the second has swept what the first one left
    with atomic_file(tmp_path / "model") as first:
        first.write(b"first")
        with atomic_file(tmp_path / "model") as second:
            second.write(b"second")
        assert (tmp_path / "model").read_bytes() == b"second"
    assert (tmp_path / "model").read_bytes() == b"first"
    assert set(os.listdir(tmp_path)) == {"model", *own}


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    def interrupted() -> None:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("harm", ["overwrite", "cut"])
def test_a_model_does_not_follow_its_file(pair: Any, verify: bool, harm: str, tmp_path: Path) -> None:
    packed, args = pair
    path = tmp_path / "model"
    qgnn_plugin.save_packed(packed, path)
    table = PackedEmbeddings.from_float(torch.randn(50, 20))
    table.save(tmp_path / "table")
    loaded = qgnn_plugin.load_packed(path, MODELS["gcn"](), verify=verify)
    again = PackedEmbeddings.load(tmp_path / "table", verify=verify)
    for name in ("model", "table"):
        with open(tmp_path / name, "r+b") as file:
            file.write(b"\xff" * os.path.getsize(tmp_path / name)) if harm == "overwrite" else file.truncate(0)
    assert torch.equal(loaded(*args), packed(*args))
    assert torch.equal(again.dequantize(), table.dequantize())


def test_mapped_files(pair: Any, tmp_path: Path) -> None:
    """The same numbers; writing to them leaves the file as it is."""
    packed, args = pair
    path = tmp_path / "model"
    qgnn_plugin.save_packed(packed, path)
    data = path.read_bytes()
    loaded = qgnn_plugin.load_packed(path, MODELS["gcn"](), mmap=True)
    assert torch.equal(loaded(*args), packed(*args))
    for buffer in loaded.buffers():
        buffer.zero_()
    assert path.read_bytes() == data
    table = PackedEmbeddings.from_float(torch.randn(50, 20))
    table.save(path)
    assert torch.equal(PackedEmbeddings.load(path, mmap=True).dequantize(), table.dequantize())


DTYPES = (torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float64, torch.int64)


def test_the_format_is_that_of_the_library(tmp_path: Path) -> None:
    """Both ways, and of all types and shapes."""
    tensors = {str(dtype): (torch.rand(3, 5) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(4, 0, 2), "columns": torch.rand(4, 6)[:, ::2]}
    tensors |= {"é.name": torch.arange(3, dtype=torch.int32)}
    container.write(tmp_path / "ours", "kind", tensors, {"a": 1})
    read = safetensors.torch.load_file(tmp_path / "ours")
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        metadata = file.metadata()
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(stored, tmp_path / "theirs", metadata)
    for name in ("ours", "theirs"):
        for mmap in (False, True):
            found, description = container.read(tmp_path / name, "kind", mmap=mmap)
            assert description == {"a": 1}
            for other in (read, found):
                assert other.keys() == tensors.keys()
                assert all(torch.equal(other[key], value) for key, value in tensors.items())
                assert all(other[key].dtype == value.dtype for key, value in tensors.items())
    with pytest.raises(ValueError, match=r"dense tensor.*'sparse'"):
        container.write(tmp_path / "sparse", "kind", {"sparse": torch.eye(3).to_sparse_csr()}, {})
    assert not (tmp_path / "sparse").exists()
