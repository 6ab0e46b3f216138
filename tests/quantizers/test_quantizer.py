"""QLRQuantizer: kinds of data, layouts of ranges, awkward values."""

import pytest
import torch
from torch import Tensor

from qgnn_plugin import QLRQuantizer
from qgnn_plugin.quantizers import RangeKind
from qgnn_plugin.quantizers.range_search import MAX_SAMPLES

BITS = (2, 4, 8)


def fitted(x: Tensor, bits: int = 4, **options: object) -> QLRQuantizer:
    quantizer = QLRQuantizer(bits, site="conv1.input", **options)  # type: ignore[arg-type]
    quantizer.set_range(x)
    return quantizer.eval()


def dequantized(x: Tensor, bits: int = 4, **options: object) -> Tensor:
    return fitted(x, bits, **options)(x).dequantize()


def relative_error(x: Tensor, bits: int = 4, **options: object) -> float:
    error = dequantized(x, bits, **options).detach().double() - x.double()
    return float(error.norm() / x.double().norm())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(40, 12)


# Widths, levels and layouts of ranges #############################################################


@pytest.mark.parametrize("levels", ["affine", "symmetric", "half"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
def test_error_falls_with_the_width(x: Tensor, levels: str, granularity: str) -> None:
    options = {"levels": levels, "granularity": granularity, "channels": 12}
    errors = [relative_error(x, bits, **options) for bits in (*BITS, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.02
    assert errors[3] == 0.0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("truncation", [None, "bt", "sbt"])
def test_codes_are_integers_of_the_width(x: Tensor, bits: int, truncation: str | None) -> None:
    quantized = fitted(x, bits, truncation=truncation)(3 * x)
    assert quantized.qmax == 2**bits - 1
    assert torch.equal(quantized.codes, quantized.codes.round())
    assert quantized.codes.min() == 0
    assert quantized.codes.max() == 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
def test_half_levels_are_half_integers(x: Tensor, bits: int) -> None:
    quantizer = fitted(x, bits, levels="half")
    steps = quantizer(x).dequantize() / quantizer.log_scale.exp()
    torch.testing.assert_close(steps + 0.5, (steps + 0.5).round(), rtol=0, atol=1e-3)
    assert quantizer.offset is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("levels", ["symmetric", "unsigned"])
def test_zero_is_a_level(x: Tensor, bits: int, levels: str) -> None:
    x = x.abs() if levels == "unsigned" else x
    x[3] = 0
    assert torch.equal(dequantized(x, bits, levels=levels)[3], torch.zeros(12))


def test_affine_range_of_non_negative_data_starts_at_zero(x: Tensor) -> None:
    x = x.relu()
    quantizer = fitted(x)
    assert quantizer.range_kind == RangeKind.NONNEGATIVE
    quantized = quantizer(x)
    assert quantized.unsigned
    assert float(quantized.lower.detach()) == 0
    assert torch.equal(quantized.dequantize()[x == 0], torch.zeros(int((x == 0).sum())))


def test_unsigned_refuses_negative_values(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"non-negative values for the unsigned 'conv1\.input'"):
        fitted(x, levels="unsigned")


def test_ranges_per_channel_differ(x: Tensor) -> None:
    spread = x * torch.logspace(-3, 3, 12)
    quantizer = fitted(spread, 8, granularity="channel", channels=12)
    assert quantizer.log_scale.shape == (12,)
    error = (quantizer(spread).dequantize() - spread).norm(dim=0) / spread.norm(dim=0)
    assert (error < 0.02).all()
    assert relative_error(spread[:, :6], 8) < 0.02  # a single range serves only the largest
    single = dequantized(spread, 8)
    assert torch.equal(single[:, 0], single[0, 0].expand(40))


def test_channels_of_weights_are_rows(x: Tensor) -> None:
    spread = x * torch.logspace(-3, 3, 40).unsqueeze(1)
    quantizer = fitted(spread, 8, levels="half", granularity="channel", channels=40, channel_dim=0)
    error = (quantizer(spread).dequantize() - spread).norm(dim=1) / spread.norm(dim=1)
    assert (error < 0.02).all()


def test_node_ranges_follow_each_row_and_unseen_nodes(x: Tensor) -> None:
    quantizer = fitted(x, 8, granularity="node")
    assert quantizer.log_scale.shape == ()
    unseen = torch.randn(7, 12) * torch.logspace(-20, 20, 7).unsqueeze(1)
    quantized = quantizer(unseen)
    assert quantized.per_node
    error = (quantized.dequantize() - unseen).norm(dim=1) / unseen.norm(dim=1)
    assert (error < 0.05).all()
    factor = quantizer.log_scale.exp() * unseen.abs().amax(1, keepdim=True)
    torch.testing.assert_close(quantized.scale, factor)


def test_truncation_is_nothing_at_eight_bits(x: Tensor) -> None:
    """There is nothing to truncate; BT*'s correction would only shift every code."""
    assert torch.equal(dequantized(x.exp(), 8, truncation="sbt"), dequantized(x.exp(), 8))


def test_skewness_is_measured_for_sbt_only() -> None:
    x = torch.randn(4000).exp()
    centred = x.double() - x.double().mean()
    skewness = centred.pow(3).mean() / centred.square().mean() ** 1.5
    corrected, plain = fitted(x, 2, truncation="sbt"), fitted(x, 2, truncation="bt")
    assert corrected.skew is not None
    assert float(corrected.skew) == float(skewness.round()) >= 3
    assert float(plain.skew) == 0  # type: ignore[arg-type]
    assert "skew" in corrected.state_dict()
    assert fitted(x, 2).skew is None


# 0/1 data #########################################################################################


def binary(rows: int = 30, columns: int = 200) -> Tensor:
    return (torch.rand(rows, columns) < 0.1).float()


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


# Awkward values ###################################################################################


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("levels", ["affine", "symmetric"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 3.7, -3.7, 1e30, -1e30])
def test_constant_tensors(bits: int, levels: str, value: float) -> None:
    x = torch.full((5, 4), value)
    torch.testing.assert_close(dequantized(x, bits, levels=levels), x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", ["affine", "unsigned", "symmetric", "half"])
def test_zeros_are_exact_and_do_not_set_a_range_for_good(levels: str) -> None:
    """As from a zero-initialized layer: the first real batch finds its range."""
    quantizer = QLRQuantizer(8, levels=levels).train()  # type: ignore[arg-type]
    assert torch.equal(quantizer(torch.zeros(6, 4)).dequantize(), torch.zeros(6, 4))
    assert quantizer.is_set
    x = torch.rand(6, 4) * 100 + 1
    x[0] = 0
    error = (quantizer(x).dequantize() - x).norm() / x.norm()
    assert error < 0.02


@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (0, 0)])
def test_empty_tensors(granularity: str, shape: tuple[int, int]) -> None:
    options = {"granularity": granularity, "channels": 4}
    empty = torch.empty(shape)
    quantizer = QLRQuantizer(4, **options)  # type: ignore[arg-type]
    for mode in (True, False):  # nothing to quantize, so no range is needed or set
        assert quantizer.train(mode)(empty).dequantize().shape == shape
    assert not quantizer.is_set
    with pytest.raises(ValueError, match="got an empty tensor"):
        quantizer.set_range(empty)
    if granularity != "channel" or shape == (0, 4):
        quantizer.set_range(torch.randn(3, 4))
        assert quantizer.eval()(empty).dequantize().shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sparse", [False, True])
def test_non_finite_values_name_the_site(x: Tensor, bad: float, sparse: bool) -> None:
    quantizer = fitted(x)
    x[3, 5] = bad
    given = x.to_sparse_csr() if sparse else x
    message = r"finite values at 'conv1\.input' \(got 1 NaN or infinite of 480\)"
    for mode in (True, False):
        with pytest.raises(ValueError, match=message):
            quantizer.train(mode)(given)
    with pytest.raises(ValueError, match=message):
        quantizer.set_range(x)
    quantizer.observe()
    with pytest.raises(ValueError, match=message):
        quantizer(given)


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    x = torch.tensor([[3e38, 3e38, 1e38]])
    torch.testing.assert_close(dequantized(x, 8), x, rtol=1e-2, atol=0)


@pytest.mark.parametrize("magnitude", [1e30, 1e18, 1e-18, 1e-28])
@pytest.mark.parametrize("levels", ["affine", "half"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
def test_magnitude_does_not_matter(
    x: Tensor, magnitude: float, levels: str, granularity: str
) -> None:
    options = {"levels": levels, "granularity": granularity, "channels": 12}
    assert relative_error(x * magnitude, 8, **options) < 0.02
    scaled = (x * magnitude).requires_grad_()
    quantizer = fitted(scaled.detach(), 8, **options)
    quantizer(scaled).dequantize().sum().backward()
    assert scaled.grad is not None
    assert scaled.grad.isfinite().all()
    assert quantizer.log_scale.grad is not None
    assert quantizer.log_scale.grad.isfinite().all()


@pytest.mark.parametrize("levels", ["affine", "symmetric", "half"])
def test_denormal_values_are_nearly_zero(levels: str) -> None:
    x = torch.randn(5, 4) * 1e-41
    error = (dequantized(x, 8, levels=levels).double() - x.double()).abs().max()
    assert error <= 1e-30


def test_range_far_from_zero_keeps_its_step() -> None:
    """The offset counts steps, so an inexact step times many of them would miss the data."""
    x = -1000 - torch.rand(50, 4)
    quantizer = fitted(x, 8)
    step = float(quantizer.log_scale.exp())
    assert step < 1.01 / 255
    assert float((quantizer(x).dequantize() - x).abs().max()) <= step  # step/2, clipping, rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", ["affine", "half"])
def test_other_precisions(x: Tensor, dtype: torch.dtype, levels: str) -> None:
    x = x.to(dtype)
    quantizer = fitted(x, 4, levels=levels, dtype=dtype)
    out = quantizer(x).dequantize()
    assert out.dtype == dtype
    assert float((out - x).float().norm() / x.float().norm()) < 0.15
    zeros = fitted(torch.zeros_like(x), 4, levels=levels, dtype=dtype)
    assert torch.equal(zeros(torch.zeros_like(x)).dequantize(), torch.zeros_like(x))
    tiny = fitted(x * 1e-7, 4, levels=levels, dtype=dtype)(x * 1e-7).dequantize()
    assert tiny.isfinite().all()


# The life of a range ##############################################################################


def test_first_training_batch_sets_the_range(x: Tensor) -> None:
    quantizer = QLRQuantizer(4, site="conv1.message")
    assert not quantizer.is_set
    with pytest.raises(RuntimeError, match=r"'conv1\.message' is unset: call .*calibrate"):
        quantizer.eval()(x)
    quantizer.train()(x)
    assert quantizer.is_set
    before = quantizer.log_scale.item()
    quantizer(100 * x)
    assert quantizer.log_scale.item() == before  # learned from here on, not measured again
    quantizer.unset()
    quantizer(100 * x)
    assert quantizer.log_scale.item() > before + 4


def test_off_is_the_identity(x: Tensor) -> None:
    quantizer = QLRQuantizer(32).eval()
    assert quantizer.is_set
    quantized = quantizer(x)
    assert quantized.codes is x
    assert quantized.qmax is None
    assert torch.equal(quantized.dequantize(), x)
    assert not any(p.requires_grad for p in quantizer.parameters())


def test_frozen_ranges(x: Tensor) -> None:
    quantizer = QLRQuantizer(4, learn=False)
    leaf = x.clone().requires_grad_()
    quantizer.train()(leaf).dequantize().sum().backward()
    assert not any(p.requires_grad for p in quantizer.parameters())
    learned = QLRQuantizer(4)
    other = x.clone().requires_grad_()
    learned.train()(other).dequantize().sum().backward()
    assert torch.equal(leaf.grad, other.grad)  # type: ignore[arg-type]
    assert learned.log_scale.grad is not None


def test_another_device_is_named(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"values on cpu, where 'conv1\.input' .*got meta.*\.to\("):
        fitted(x)(x.to("meta"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1, "levels": "symmetric"}, "'levels' other than 'symmetric' at 1 bit"),
        ({"bits": 3}, r"'bits' to be 1, 2, 4, 8 or 32 = off \(got 3\)"),
        ({"bits": 4.0}, r"got 4\.0"),
        ({"bits": True}, "got True"),
        ({"bits": 4, "levels": "halve"}, "Did you mean 'half'"),
        ({"bits": 4, "granularity": "nodes"}, "Did you mean 'node'"),
        ({"bits": 4, "truncation": "btt"}, "Did you mean 'bt'"),
        ({"bits": 4, "granularity": "channel"}, "'channels' >= 1"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QLRQuantizer(**options)  # type: ignore[arg-type]


# Observation ######################################################################################


@pytest.mark.parametrize("granularity", ["tensor", "channel", "node", "row"])
def test_observed_batches_act_as_one(x: Tensor, granularity: str) -> None:
    options = {"granularity": granularity, "channels": 12}
    whole = fitted(x, 4, **options)
    parts = QLRQuantizer(4, **options).eval()  # type: ignore[arg-type]
    parts.observe()
    for batch in x.split(15):
        assert parts(batch).dequantize() is batch
    parts(x[:0])
    parts.finish()
    assert torch.equal(parts(x).dequantize(), whole(x).dequantize())


def test_most_general_kind_of_all_batches_wins() -> None:
    quantizer = QLRQuantizer(4).eval()
    for batches, kind in [
        ([binary(), binary() * 0.5], RangeKind.ZERO_ONE),
        ([binary(), torch.rand(30, 200)], RangeKind.NONNEGATIVE),
        ([binary(), torch.rand(30, 200).to_sparse_csr(), torch.randn(3, 200)], RangeKind.FREE),
    ]:
        quantizer.observe()
        for batch in batches:
            quantizer(batch)
        quantizer.finish()
        assert quantizer.range_kind == kind


def test_observed_values_are_not_changed_by_what_follows() -> None:
    """A model may overwrite an activation in place after the site has seen it."""
    x = torch.randn(20, 8)
    expected = fitted(x)
    quantizer = QLRQuantizer(4).eval()
    quantizer.observe()
    work = x.clone()
    quantizer(work)
    work.relu_().add_(100)
    quantizer.finish()
    assert torch.equal(quantizer(x).dequantize(), expected(x).dequantize())


def test_observation_is_bounded_and_keeps_extremes() -> None:
    quantizer = QLRQuantizer(8).eval()
    quantizer.observe()
    for i in range(30):
        batch = torch.randn(1000, 20)
        if i == 7:
            batch[501, 3] = -300.0
        quantizer(batch)
    sample = quantizer._observed
    assert sample is not None
    assert sample.rows().numel() <= MAX_SAMPLES
    assert float(sample.rows().amin()) == -300.0
    quantizer.finish()
    assert quantizer._observed is None


def test_abort_leaves_the_range(x: Tensor) -> None:
    quantizer = fitted(x)
    before = quantizer(x).dequantize()
    quantizer.observe()
    quantizer(100 * x)
    quantizer.abort()
    assert torch.equal(quantizer(x).dequantize(), before)
