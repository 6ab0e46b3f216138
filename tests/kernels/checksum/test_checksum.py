"""Checksums of memory: the compiled form against its reference, and what they tell apart."""

import pytest
import torch

from qgnn_plugin.kernels.checksum import checksum, checksum_reference

DTYPES = (torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 3, 8, 9, 1000, 1025])
def test_compiled_is_the_reference(size: int, dtype: torch.dtype) -> None:
    tensor = (torch.rand(size) * 200).to(dtype)
    assert checksum(tensor) == int(checksum_reference(tensor))
    part = tensor[size // 3 :]  # at any address
    assert checksum(part) == checksum(part.clone()) == int(checksum_reference(part))


def test_values_count_and_strides_do_not() -> None:
    tensor = torch.randint(100, (6, 10))
    for view in (tensor.t(), tensor[:, 2:5], tensor[::2], tensor[0].expand(3, 10)):
        assert checksum(view) == checksum(view.contiguous()) == int(checksum_reference(view))


def test_threads_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from qgnn_plugin.kernels.checksum import cpu as compiled

    tensor = torch.randint(1 << 40, (3 * compiled.CHUNK + 17,))
    alone = checksum(tensor)
    monkeypatch.setattr(compiled, "SHARED", compiled.CHUNK)
    monkeypatch.setattr(compiled, "num_threads", lambda: 2)
    assert checksum(tensor) == alone == int(checksum_reference(tensor))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32], ids=str)
def test_every_bit_and_its_place_count(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 65).to(dtype)
    words = tensor.view(torch.int64)
    seen = {checksum(tensor)}
    for i in range(0, words.numel(), 7):
        for bit in range(64):
            words[i] ^= -(1 << 63) if bit == 63 else 1 << bit
            seen.add(checksum(tensor))
            words[i] ^= -(1 << 63) if bit == 63 else 1 << bit
    for i in range(63):
        swapped = tensor.clone()
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        seen.add(checksum(swapped))
    signs = 0  # two flipped signs, whose differences a weak sum would let cancel
    for i in range(16):
        for j in range(i):
            flipped = tensor.clone()
            flipped[[i, j]] *= -1
            seen.add(checksum(flipped))
            signs += 1
    bits = 64 * len(range(0, words.numel(), 7))
    assert len(seen) == 1 + bits + 63 + signs


def test_reading_leaves_the_tensor_resizable() -> None:
    """As ``tensor.numpy()`` would not."""
    tensor = torch.arange(10)
    checksum(tensor)
    assert tensor.untyped_storage().resizable()
