"""Messages that call modules with weights of their own are not recorded: they run by blocks of rows."""

from __future__ import annotations

import pytest
import torch
from messages.cases import EDGE_INDEX, NODES, floats
from torch_geometric.nn import DNAConv

import qgnn_plugin as qgnn


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_over_layers(groups: int) -> None:
    """``DNAConv`` maps what each edge sees by weights held in groups; recording that ended the process."""
    x = floats(NODES, 3, 8)
    qmodel = qgnn.quantize_model(DNAConv(8, heads=2, groups=groups).eval(), bits=8)
    qgnn.calibrate(qmodel, (x, EDGE_INDEX))
    packed = qgnn.pack_model(qmodel)
    with torch.no_grad():
        torch.testing.assert_close(packed(x, EDGE_INDEX), qmodel(x, EDGE_INDEX), rtol=1e-4, atol=1e-5)
    assert qgnn.summary(packed).layers[0].runs.startswith("packed: ")
