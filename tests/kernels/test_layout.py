"""The bit layout of docs/kernels.md: golden bytes, round trips, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgnn_plugin.kernels.layout import (
    PACKED_BITS,
    check_packed,
    pack_codes,
    row_bytes,
    row_words,
    top_code,
    unpack_codes,
)

GOLDEN = {
    # Ten codes each; byte k holds the features k, k + B, ... from its lowest bits on.
    1: ([1, 0, 1, 1, 0, 0, 1, 0, 1, 1], "05 04 03 01"),
    2: ([3, 1, 0, 2, 1, 3, 2, 0, 2, 1], "27 1d 08 02"),
    4: ([15, 1, 2, 3, 4, 5, 6, 7, 8, 9], "8f 91 02 03 04 05 06 07"),
    8: ([255, 1, 2, 3, 4, 5, 6, 7, 8, 9], "ff 01 02 03 04 05 06 07 08 09 00 00"),
}


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_golden_bytes(bits: int) -> None:
    codes, text = GOLDEN[bits]
    packed = pack_codes(torch.tensor([codes]), bits).numpy().tobytes()
    assert packed == bytes.fromhex(text)


def test_lanes_hold_neighbouring_features() -> None:
    codes = torch.arange(64).remainder(4).view(1, 64)
    word = int(pack_codes(codes, 2)[0, 1])  # bytes 4 to 7: features 4 + k, 20 + k, 36 + k, 52 + k
    for part in range(4):
        lanes = (word >> 2 * part) & 0x03030303
        features = codes[0, 16 * part + 4 : 16 * part + 8]
        assert list(lanes.to_bytes(4, "little")) == features.tolist()


@given(st.sampled_from(PACKED_BITS), st.integers(0, 5), st.integers(0, 150), st.integers(0, 99))
def test_round_trip(bits: int, rows: int, features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, top_code(bits) + 1, (rows, features), generator=generator)
    before = codes.clone()
    words = pack_codes(codes, bits)
    assert words.shape == (rows, row_words(features, bits))
    assert 4 * words.size(1) == row_bytes(features, bits)
    assert torch.equal(unpack_codes(words, features, bits), codes.to(torch.uint8))
    assert torch.equal(codes, before)


def test_noncontiguous_codes() -> None:
    codes = torch.randint(0, 4, (40, 6)).t()
    assert torch.equal(pack_codes(codes, 2), pack_codes(codes.contiguous(), 2))


def test_errors() -> None:
    words = pack_codes(torch.zeros(3, 40), 2)
    with pytest.raises(ValueError, match="Expected 'bits' to be one of"):
        pack_codes(torch.zeros(1, 1), 3)
    with pytest.raises(ValueError, match=r"shape \[N, 5\], 40 features at 4 bits \(got \[3, 3\]\)"):
        check_packed(words, 40, 4)
    with pytest.raises(TypeError, match="packed int32 words"):
        check_packed(words.float(), 40, 2)
