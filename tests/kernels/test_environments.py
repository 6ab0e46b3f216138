"""Kernels in forked processes, with damaged compile caches, and where numba may not compile."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_support import plan_of, random_words, threads

from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.cpu import jit, memory, parallel
from qgnn_plugin.kernels.quantize_pack import cpu as cpu_quantize_pack
from qgnn_plugin.kernels.quantize_pack import quantize_pack

FLOAT = torch.float32
RUN = """
import torch
from qgnn_plugin.kernels.quantize_pack import quantize_pack
x, scale, offset = torch.arange(40.).view(2, 20), torch.ones(1), torch.zeros(1)
print(quantize_pack(x, scale, offset, 8).tolist())
"""
ASKED = """
from qgnn_plugin.kernels.backend import available_backends, use_backend
print(available_backends())
try:
    with use_backend("cpu"):
        quantize_pack(x, scale, offset, 8)
except RuntimeError as error:
    print(str(error)[-len("NUMBA_DISABLE_JIT unset"):])
"""
EXPECTED = quantize_pack(torch.arange(40.0).view(2, 20), torch.ones(1), torch.zeros(1), 8).tolist()


def _in_a_child(work: Callable[[], object]) -> bool:
    """Whether ``work`` ends and holds in a forked process."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a deadlock ends the child
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_has_its_own_threads_and_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SERIAL_COST", 1)
    plan = plan_of("power_law")
    words, one = random_words(plan.num_src, 40, 2), torch.ones(1)

    def run() -> torch.Tensor:
        return aggregate(words, plan, one, one, 40, 2)

    with threads(2):
        expected = run()
        assert parallel._pool is not None
        locks, held, release = (memory._lock, parallel._lock), threading.Event(), threading.Event()

        def hold() -> None:
            with locks[0], locks[1]:
                held.set()
                release.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        try:
            assert _in_a_child(lambda: torch.equal(run(), expected) and memory.empty((1 << 19,), FLOAT).numel())
        finally:
            release.set()
            holder.join()
        assert torch.equal(run(), expected)


def _damage(content: bytes, how: str) -> bytes:
    if how == "one bit":
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {"empty": b"", "cut": content[: len(content) // 2], "other bytes": b"\x80\x04garbage" * 20}[how]


@pytest.mark.parametrize("how", ["empty", "cut", "other bytes", "one bit"])
@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
def test_damaged_files_of_compiled_code_are_as_good_as_none(tmp_path: Path, pattern: str, how: str) -> None:
    file = jit._CheckedFile(str(tmp_path), "kernel", "stamp")
    file.save("key", "code")
    assert file.load("key") == "code"
    (path,) = tmp_path.glob(pattern)
    path.write_bytes(_damage(path.read_bytes(), how))
    assert file.load("key") is None
    file.save("key", "code compiled anew")
    assert file.load("key") == "code compiled anew"
    assert jit._CheckedFile(str(tmp_path), "kernel", "of other sources").load("key") is None


def test_compiled_code_of_classes_that_have_moved_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = type("Moved", (), {"__module__": __name__, "__qualname__": "Moved"})
    monkeypatch.setitem(globals(), "Moved", moved)
    file = jit._CheckedFile(str(tmp_path), "kernel", "stamp")
    file.save(("key", moved), "code")
    monkeypatch.delitem(globals(), "Moved")
    assert file.load("key") is None
    file.save("key", "code compiled anew")
    assert file.load("key") == "code compiled anew"


def test_a_source_of_the_same_age_and_place_is_compiled_anew(tmp_path: Path) -> None:
    """Kernels outside of the kernels' folder, too: numba tells sources apart by their age and size."""
    file = tmp_path / "kernel_of_one_number.py"

    def found(number: int) -> int:
        file.write_text(
            f"from qgnn_plugin.kernels.cpu.jit import kernel\n\n\n@kernel\ndef number():\n    return {number}\n"
        )
        os.utime(file, (1e9, 1e9))
        jit._stamp_of.cache_clear()
        namespace = runpy.run_path(str(file))
        return namespace["number"]()

    assert [found(1), found(1), found(2)] == [1, 1, 2]


def test_kernels_use_these_files() -> None:
    cache = cpu_quantize_pack._kernel._cache
    assert cache is None or isinstance(cache._cache_file, jit._CheckedFile)


@pytest.mark.slow
def test_a_process_with_a_damaged_cache(tmp_path: Path) -> None:
    for how in (None, "cut", "one bit"):
        for file in tmp_path.rglob("*.nb?"):
            file.write_bytes(_damage(file.read_bytes(), how or "empty"))
        assert _process(RUN, NUMBA_CACHE_DIR=str(tmp_path)) == [str(EXPECTED)]
    assert list(tmp_path.rglob("*.nbc"))


def test_without_compilation_the_references_run() -> None:
    code = RUN + ASKED
    assert _process(code, NUMBA_DISABLE_JIT="1") == [str(EXPECTED), "('torch',)", "NUMBA_DISABLE_JIT unset"]


def _process(code: str, **environment: str) -> list[str]:
    """What another process prints."""
    variables = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
