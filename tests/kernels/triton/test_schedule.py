"""The order of rows in which programs take them."""

import torch
from triton_support import SMALL, plan_of

from qgnn_plugin.kernels.triton.schedule import ROW_ALIGNMENT, build_schedule


def test_schedule_covers_every_edge_once() -> None:
    plan = plan_of(SMALL["power_law"]())
    schedule = build_schedule(plan.rowptr, 8)
    covered = torch.zeros(plan.num_edges, dtype=torch.int)
    for begin, length in zip(schedule.begin.tolist(), schedule.length.tolist(), strict=True):
        covered[begin : begin + length] += 1
    assert covered.eq(1).all()
    assert schedule.num_partial % ROW_ALIGNMENT == 0
    assert schedule.length.max() <= 8
    assert torch.equal(schedule.slot.sort().values, torch.arange(schedule.num_partial).int())
