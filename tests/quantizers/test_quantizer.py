"""QLRQuantizer: widths, levels, layouts of ranges, and the life of a range."""

import pytest
import torch
from quantizers.support import BITS, binary, dequantized, fitted, relative_error
from torch import Tensor

from qgnn_plugin import QLRQuantizer
from qgnn_plugin.quantizers import RangeKind
from qgnn_plugin.quantizers.range_search import MAX_SAMPLES


@pytest.fixture
def x() -> Tensor:
    return torch.randn(40, 12)


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
