"""``smp_step`` against its reference."""

import pytest
import torch
from triton_support import SMALL, assert_same, plan_of, ranges

from qgnn_plugin.kernels.layout import pack_codes
from qgnn_plugin.kernels.smp_step import smp_step


def packed_rows(rows: int, features: int, bits: int) -> torch.Tensor:
    return pack_codes(torch.randint(0, 2**bits, (rows, features)), bits)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_smp_step(packed: bool, multiplier: float) -> None:
    plan = plan_of(SMALL["erdos_renyi"]())
    nodes, features = plan.num_src, 33
    h, x0, norm = torch.randn(nodes, features), torch.randn(nodes, features), torch.rand(nodes)
    options: dict[str, object] = {"eta": 0.1, "mu": 9.0, "multiplier": multiplier}
    if packed:
        scale, offset = ranges("column", nodes, features)
        options |= {
            "words": packed_rows(nodes, features, 2), "scale": scale, "offset": offset, "bits": 2,
            "measure": True, "out_bits": 4, "out_scale": torch.tensor(0.2),
            "out_offset": torch.tensor(-1.0),
        }  # fmt: skip
    assert_same(lambda: smp_step(h, x0, plan, norm, **options), exact=False)
