"""QLRQuantizer on 0/1 data and on sparse features."""

import pytest
import torch
from quantizers.support import BITS, binary, fitted

from qgnn_plugin import QLRQuantizer
from qgnn_plugin.quantizers import RangeKind


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.3, 1e30])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
def test_zero_one_features_are_exact(
    bits: int, sparse: bool, factor: float, granularity: str
) -> None:
    x = binary() * factor
    quantizer = QLRQuantizer(bits, granularity=granularity, channels=200)  # type: ignore[arg-type]
    given = x.to_sparse_csr() if sparse else x
    quantized = quantizer.train()(given)
    assert quantizer.range_kind == RangeKind.ZERO_ONE
    assert quantizer.stored_bits == 1
    assert quantizer.qmax == 1
    assert quantized.shape == (30, 200)
    assert torch.equal(quantized.dequantize(), x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_with_a_scale_each_are_exact(bits: int, sparse: bool) -> None:
    """Row-normalized bags of words; a row of zeros among them."""
    x = binary()
    x[4] = 0
    x = x / x.sum(1, keepdim=True).clamp_min(1)
    quantizer = QLRQuantizer(bits)
    quantized = quantizer.train()(x.to_sparse_csr() if sparse else x)
    assert quantizer.range_kind == RangeKind.ZERO_ONE_ROWS
    assert torch.equal(quantized.dequantize(), x)
    assert quantized.scale.shape == (30, 1)


def test_a_scale_per_row_must_pay_for_itself() -> None:
    x = binary(30, 8) * torch.rand(30, 1)
    assert fitted(x, 2).range_kind == RangeKind.NONNEGATIVE  # 8 bits saved, 32 spent
    assert fitted(binary(30, 8), 2).range_kind == RangeKind.ZERO_ONE


def test_dropout_on_zero_one_features_stays_exact() -> None:
    quantizer = QLRQuantizer(2)
    x = binary()
    dropped = torch.nn.functional.dropout(x, 0.4)
    assert torch.equal(quantizer.train()(dropped).dequantize(), dropped)
    assert torch.equal(quantizer.eval()(x).dequantize(), x)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_data_that_stop_being_zero_one(sparse: bool, rows: bool) -> None:
    """Training widens the range; eval refuses rather than return zeros and ones."""
    x = binary() * (torch.rand(30, 1) if rows else 1.0)
    quantizer = QLRQuantizer(8, site="conv1.input").train()
    quantizer(x)
    other = x * torch.rand(30, 200)
    given = other.to_sparse_csr() if sparse else other
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    with pytest.raises(ValueError, match=r"'conv1\.input' to be zero or one value.*calibrate"):
        quantizer.eval()(given)
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())
    error = (quantizer.train()(given).dequantize() - other).norm() / other.norm()
    assert quantizer.range_kind == RangeKind.NONNEGATIVE
    assert error < 0.02


def test_gradient_passes_through_exact_codes() -> None:
    x = binary().requires_grad_()
    quantizer = QLRQuantizer(4)
    quantizer.train()(x).dequantize().sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]
    assert quantizer.log_scale.grad is not None  # every parameter takes part: DDP expects it
    assert quantizer.offset is not None
    assert quantizer.offset.grad is not None


# Sparse features ##################################################################################


@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
@pytest.mark.parametrize("levels", ["affine", "symmetric", "half"])
@pytest.mark.parametrize("sign", ["non-negative", "mixed", "negative"])
def test_sparse_features_equal_dense_ones(granularity: str, levels: str, sign: str) -> None:
    """In the values they stand for and in their error, implicit zeros included."""
    x = torch.randn(30, 20) * (torch.rand(30, 20) < 0.3)
    x = {"non-negative": x.abs(), "mixed": x, "negative": -x.abs() - 5 * (x != 0)}[sign]
    options = {"granularity": granularity, "levels": levels, "channels": 20}
    quantizer = QLRQuantizer(8, **options).train()  # type: ignore[arg-type]
    sparse = quantizer(x.to_sparse_csr())
    assert sparse.shape == (30, 20)
    assert float((sparse.dequantize() - x).detach().norm() / x.norm()) < 0.03
    torch.testing.assert_close(quantizer(x).dequantize(), sparse.dequantize())
    if levels == "affine" and sign == "non-negative" and granularity != "channel":
        assert sparse.pattern is not None
        assert sparse.codes.shape == (int((x != 0).sum()),)


def test_sparse_matrix_without_values() -> None:
    quantizer = fitted(torch.rand(5, 4))
    empty = torch.zeros(5, 4).to_sparse_csr()
    assert torch.equal(quantizer(empty).dequantize(), torch.zeros(5, 4))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csc])
def test_sparse_layouts_agree(layout: torch.layout) -> None:
    x = torch.rand(6, 5) * (torch.rand(6, 5) < 0.4)
    quantizer = fitted(x)
    assert torch.equal(quantizer(x.to_sparse(layout=layout)).dequantize(), quantizer(x.to_sparse_csr()).dequantize())
