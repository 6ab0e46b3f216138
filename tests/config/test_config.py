"""QuantConfig: checks, overrides, and a description that survives JSON."""

import json
from dataclasses import FrozenInstanceError, fields
from types import MappingProxyType
from typing import Any

import pytest
from torch_geometric.nn import GCNConv

from qgnn_plugin import QuantConfig, SMPConfig

BIT_FIELDS = [f.name for f in fields(QuantConfig) if f.name.endswith("bits")]


@pytest.mark.parametrize("name", BIT_FIELDS)
@pytest.mark.parametrize("value", [0, 3, 16, -4, 4.0, True, "4"])
def test_widths_are_one_two_four_eight_or_off(name: str, value: Any) -> None:
    widths = "2, 4, 8" if name == "attention_bits" else "1, 2, 4, 8"
    with pytest.raises(ValueError, match=rf"'{name}' to be one of {widths} or 32 = off \(got {value!r}\)"):
        QuantConfig(**{name: value})


def test_what_two_levels_cannot_hold_has_two_bits() -> None:
    """Attention numerators, and gap messages, of which zero is a level."""
    config = QuantConfig(bits=1)
    assert [config.bits_for(s) for s in ("input", "weight", "activation", "message")] == [1] * 4  # type: ignore[arg-type]
    assert config.bits_for("attention") == 2
    assert QuantConfig(bits=1, attention_bits=8).bits_for("attention") == 8
    with pytest.raises(ValueError, match=r"'attention_bits' to be one of 2, 4, 8 or 32 = off \(got 1\)"):
        QuantConfig(attention_bits=1)
    for name in ("gap_bits", "state_bits"):
        with pytest.raises(ValueError, match=rf"'{name}' to be one of .*2, 4, 8, 32 \(got 1\)"):
            SMPConfig(**{name: 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 1, "weight_levels": "symmetric"},
        {"bits": 4, "weight_bits": 1, "weight_levels": "symmetric"},
        {"bits": 1, "message_levels": "symmetric"},
        {"bits": 4, "message_levels": "symmetric", "overrides": {"conv": {"message_bits": 1}}},
    ],
)
def test_two_levels_around_zero_do_not_hold_it(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"levels' other than 'symmetric' at 1 bit.*use 'half'"):
        QuantConfig(**changes)
    QuantConfig(**changes | {"bits": 4, "weight_bits": None, "overrides": {}})


@pytest.mark.parametrize("value", [2, 4, 8, 32])
def test_widths_fall_back_to_bits(value: int) -> None:
    sites = ("input", "weight", "activation", "message", "attention")
    config = QuantConfig(bits=value)
    assert {config.bits_for(site) for site in sites} == {value}  # type: ignore[arg-type]
    assert config.bits_for("output") == 32
    assert QuantConfig(bits=2, output_bits=None).bits_for("output") == 2
    config = QuantConfig(bits=value, message_bits=8)
    assert config.bits_for("message") == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "nodes"}, r"'granularity' to be one of .* \(got 'nodes'\)\. Did you mean 'node'\?"),
        ({"weight_granularity": "node"}, "'weight_granularity' to be one of 'tensor', 'channel'"),
        ({"message_levels": "halve"}, "Did you mean 'half'"),
        ({"weight_levels": None}, "'weight_levels' to be one of"),
        ({"truncation": "stb"}, "'truncation' to be one of None, 'bt', 'sbt'"),
        ({"version": 2}, r"version 1 \(got 2\)"),
        ({"overrides": {"*": {"weigth_bits": 4}}}, r"Unknown field 'weigth_bits' .* '\*'\. Did you mean 'weight_bits'"),
        ({"overrides": {"*": {"overrides": {}}}}, "Unknown field 'overrides'"),
        ({"overrides": {"*": {"bits": 5}}}, r"'bits' to be one of .* \(got 5\)"),
    ],
)
def test_values_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smp": {"alpha": 1.0}}, r"an SMPConfig or None \(got dict\)"),
        ({"overrides": [("a", {})]}, r"a mapping for 'overrides' in 'overrides' \(got list\)"),
        ({"overrides": {"conv1": 8}}, r"a mapping for 'conv1' in 'overrides' \(got int\)"),
        ({"bit": 8}, "unexpected keyword argument 'bit'"),
    ],
)
def test_types_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QuantConfig(**options)


def test_frozen_and_independent_of_its_arguments() -> None:
    overrides = {"a": {"bits": 8}}
    config = QuantConfig(overrides=overrides)
    overrides["a"]["bits"] = 3
    overrides["b"] = {}
    assert config.overrides == {"a": {"bits": 8}}
    with pytest.raises(FrozenInstanceError):
        config.bits = 8  # type: ignore[misc]


CONFIGS = [
    QuantConfig(),
    QuantConfig.accurate(2, weight_bits=4),
    QuantConfig(bits=2, input_bits=8, output_bits=4, truncation="sbt", learn_ranges=False, smp=None),
    QuantConfig(smp=SMPConfig(alpha=0.5, correction="explicit", damping=0.1)),
    QuantConfig(
        overrides={
            "convs.*": {"bits": 8, "smp": SMPConfig(alpha=0.1)},
            "head": MappingProxyType({"smp": None, "granularity": "node"}),
        }
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_description_survives_json(config: QuantConfig) -> None:
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    described = config.to_dict()
    described["bits"] = 8
    assert config.bits != 8 or config == CONFIGS[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"wieght_bits": 4}, "Unknown QuantConfig field 'wieght_bits'. Did you mean 'weight_bits'"),
        ({"smp": {"alhpa": 0.1}}, "Unknown SMPConfig field 'alhpa'. Did you mean 'alpha'"),
        ({"overrides": {"a": {"smp": {"etaa": 1.0}}}}, "Unknown SMPConfig field 'etaa'. Did you mean 'eta'"),
        ({"bits": 7}, "got 7"),
    ],
)
def test_descriptions_are_checked(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig.from_dict(data)


def test_overrides_by_layer() -> None:
    config = QuantConfig(bits=4, overrides={"convs.*": {"bits": 8}, "*.1": {"weight_bits": 2, "smp": None}})
    assert config.for_layer("head") == QuantConfig(bits=4)
    assert config.for_layer("convs.0") == QuantConfig(bits=8)
    assert config.for_layer("convs.1") == QuantConfig(bits=8, weight_bits=2, smp=None)
    assert config.for_layer("Convs.0").bits == 4  # patterns are case-sensitive


def test_patterns_must_match() -> None:
    config = QuantConfig(overrides={"convs.?": {}, "haed": {}})
    with pytest.raises(ValueError, match=r"'haed' matches no layer\. Did you mean 'head'\? Layers: convs\.0, head"):
        config.check_overrides(["convs.0", "head"])
    config.check_overrides(["convs.0", "haed"])


@pytest.mark.parametrize("pattern", [GCNConv, 3, None, ("a", "b")], ids=repr)
def test_patterns_are_texts(pattern: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected names of layers, or patterns of them, in 'overrides'"):
        QuantConfig(overrides={pattern: {"bits": 8}})


def test_equal_configurations_have_one_hash() -> None:
    configs = [QuantConfig(overrides={"a": {"bits": 8}}), QuantConfig(overrides={"a": {"bits": 8}}), QuantConfig()]
    assert hash(configs[0]) == hash(configs[1])
    assert len(set(configs)) == 2


def test_accurate_placement() -> None:
    config = QuantConfig.accurate(2, message_bits=8)
    assert (config.bits, config.message_bits) == (2, 8)
    assert (config.granularity, config.message_levels) == ("node", "half")
    assert QuantConfig.accurate(granularity="tensor").granularity == "tensor"
