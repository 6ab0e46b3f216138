"""The choice of backends, and recycled result memory."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from cpu_support import plan_of, random_words, threads
from torch import Tensor

from qgnn_plugin.kernels import backend
from qgnn_plugin.kernels.aggregate import aggregate
from qgnn_plugin.kernels.backend import available_backends, backend_for, use_backend
from qgnn_plugin.kernels.cpu import memory
from qgnn_plugin.kernels.library import register_backend
from qgnn_plugin.kernels.plan import GraphPlan
from qgnn_plugin.kernels.quantize_pack import quantize_pack
from qgnn_plugin.kernels.unpack_dequantize import unpack_dequantize


def test_choice() -> None:
    assert available_backends("cpu")[0] == "cpu"
    assert backend_for("cpu") == "cpu"
    with use_backend("torch"):
        assert backend_for("cpu") == "torch"
        with use_backend("cpu"):
            assert backend_for("cpu") == "cpu"
        assert backend_for("cpu") == "torch"


def test_unavailable_choice_lists_what_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"available: \('cpu', 'torch'"):
        backend_for("cpu")
    with pytest.raises(ValueError, match="Expected a backend out of"), use_backend("mkl"):
        pass
    monkeypatch.setenv("QGNN_BACKEND", "mkl")
    with pytest.raises(ValueError, match="Expected a backend out of"):
        backend_for("cpu")


def test_a_backend_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder: ops are found in it by their names, and take what they need of their arguments."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "quantize_pack.py").write_text(
        "import torch\n\ndef quantize_pack(unit, bits, x):\n    return torch.full((1, 1), bits, dtype=torch.int32)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backend, "_others", {})
    try:
        register_backend("elsewhere", "elsewhere", ("cpu",))
        assert available_backends("cpu")[:3] == ("cpu", "elsewhere", "torch")
        assert "elsewhere" not in available_backends("cuda")
        one, x = torch.ones(1), torch.randn(3, 4)
        with use_backend("elsewhere"):
            assert quantize_pack(x, one, one, 4).tolist() == [[4]]
            with pytest.raises(ModuleNotFoundError, match=r"elsewhere\.unpack_dequantize"):
                unpack_dequantize(torch.zeros(1, 1, dtype=torch.int32), one, one, 4, 2)
        with pytest.raises(ValueError, match="a name that no backend has"):
            register_backend("elsewhere", "elsewhere", ("cpu",))
    finally:
        monkeypatch.undo()
        backend._available.cache_clear()


def test_memory_returns_only_when_nothing_refers_to_it() -> None:
    memory.release_cpu_memory()
    shape = (memory.RECYCLE_BYTES // 4, 1)
    first = memory.empty(shape, torch.float32)
    address = first.data_ptr()
    assert address % memory.ALIGNMENT == 0
    view = first[1:]
    del first
    second = memory.empty(shape, torch.float32)
    assert second.data_ptr() != address
    del view
    third = memory.empty(shape, torch.float32)
    assert third.data_ptr() == address


def test_idle_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.release_cpu_memory()
    monkeypatch.setenv("QGNN_CPU_CACHE_MB", "3")
    tensors = [memory.empty((memory.RECYCLE_BYTES,), torch.uint8) for _ in range(6)]
    tensors.clear()
    assert sum(buffer.nbytes for buffer in memory._idle) <= 3 << 20
    memory.release_cpu_memory()
    monkeypatch.setenv("QGNN_CPU_CACHE_MB", "0")
    memory.empty((memory.RECYCLE_BYTES,), torch.uint8)
    assert not memory._idle
    monkeypatch.delenv("QGNN_CPU_CACHE_MB")
    assert memory.RECYCLE_BYTES < memory._limit() < 1 << 50


def _in_child(queue: "multiprocessing.Queue[float]", plan: GraphPlan, words: Tensor) -> None:
    # Only our threads are under test: torch's own do not survive a fork.
    one = torch.ones(1)
    queue.put(float(aggregate(words, plan, one, one, 64, 2)[0, 0]))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_threads_survive_a_fork() -> None:
    """A data loader's worker forks after the threads exist; they do not exist in the child."""
    plan, one = plan_of("star"), torch.ones(1)
    words = random_words(plan.num_src, 64, 2)
    with threads(2):
        expected = float(aggregate(words, plan, one, one, 64, 2)[0, 0])
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(queue, plan, words))
        child.start()
        assert queue.get(timeout=60) == expected
        child.join()
