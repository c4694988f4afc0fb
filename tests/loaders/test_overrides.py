"""The config of one module: gptqmodel's dynamic, auto-round's extra_config, and codecs that read them."""

from typing import Any

import numpy as np
import pytest

from quant_moelora.core.errors import FormatError
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.codec import LinearSpec
from quant_moelora.loaders.overrides import module_config
from quant_moelora.loaders.registry import find_codec
from tests.checkpoints import ENCODERS, Linear, headers_of, quantization_config, random_linear

UP = "model.layers.0.mlp.experts.0.up_proj"
DOWN = "model.layers.11.mlp.experts.3.down_proj"
BASE: dict[str, Any] = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def effective(module: str, **rules: Any) -> dict[str, Any]:
    found = module_config(module, BASE | rules)
    return {key: found[key] for key in BASE}


@pytest.mark.parametrize(
    ("rules", "module", "changes"),
    [
        ({}, UP, {}),
        ({r".*\.up_proj": {"bits": 8, "group_size": 32}}, UP, {"bits": 8, "group_size": 32}),
        ({r"+:.*\.up_proj": {"sym": False, "desc_act": True}}, UP, {"sym": False, "desc_act": True}),
        ({r".*\.up_proj": {"bits": 8}}, DOWN, {}),
        ({r"up_proj": {"bits": 8}}, UP, {}),  # re.match starts at the front of the whole name
        ({r"model\.layers\.1": {"bits": 8}}, DOWN, {"bits": 8}),  # and need not reach its end
        ({r".*experts.*": {"bits": 8}, r".*up_proj": {"group_size": 32}}, UP, {"bits": 8}),  # the first one only
        ({r".*up_proj": {"group_size": 32}, r".*experts.*": {"bits": 8}}, UP, {"group_size": 32}),
        ({r".*up_proj": {}, r".*experts.*": {"bits": 8}}, UP, {}),  # a match that changes nothing
        ({r".*up_proj": {}, r"-:.*experts.*": {}}, UP, {}),
        ({"lm_head": {}, r"-:.*attn.*": {}, r"-:.*shared_expert.*": {}, r"-:.*mtp.*": {}}, UP, {}),  # of real files
    ],
)
def test_dynamic(rules: dict[str, Any], module: str, changes: dict[str, Any]) -> None:
    assert effective(module, dynamic=rules) == BASE | changes


@pytest.mark.parametrize(
    ("rules", "module", "changes"),
    [
        ({UP: {"bits": 8}, r".*up_proj": {"bits": 2}}, UP, {"bits": 8}),
        ({r".*up_proj": {"bits": 2}, UP: {"bits": 8}}, UP, {"bits": 8}),  # whatever the order
        ({r".*up_proj": {"bits": 2}, "mlp.experts.0.up_proj": {"bits": 8}}, UP, {"bits": 8}),  # the end of the name
        ({r"experts\.\d+\.up": {"group_size": 32}}, UP, {"group_size": 32}),  # re.search
        ({r"experts\.\d+\.up": {"group_size": 32}}, DOWN, {}),
        ({"layers.1": {"bits": 8}, "down": {"bits": 8}, "own_proj": {"bits": 8}}, DOWN, {}),  # names, and no regexes
        ({r".*up.*": {"bits": 8}, r".*proj": {"bits": 2}}, UP, {"bits": 8}),
        ({"model.layers.0.self_attn.q_proj": {"bits": 16, "data_type": "float"}}, UP, {}),
    ],
)
def test_extra_config(rules: dict[str, Any], module: str, changes: dict[str, Any]) -> None:
    assert effective(module, extra_config=rules) == BASE | changes


@pytest.mark.parametrize("absent", [{}, {"dynamic": None, "extra_config": None}, {"dynamic": {}, "extra_config": {}}])
def test_without_overrides(absent: dict[str, Any]) -> None:
    assert effective(UP, **absent) == BASE


def test_a_module_that_the_config_excludes() -> None:
    """gptqmodel would not read its tensors either."""
    with pytest.raises(FormatError, match=r"quantised tensors of .*up_proj: got the rule '-:\.\*up_proj' .*dynamic"):
        effective(UP, dynamic={r"-:.*up_proj": {}})


@pytest.mark.parametrize("rules", [{"dynamic": {"+:(": {}}}, {"extra_config": {"(": {}}}])
def test_a_regex_that_is_none(rules: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"regex '\(' of the quantization_config: got missing \)"):
        effective(UP, **rules)


def described(fmt: str, linear: Linear, config: dict[str, Any]) -> CanonicalWeight:
    tensors, spec = ENCODERS[fmt](linear), LinearSpec(UP, *linear.codes.shape)
    headers = headers_of(tensors, UP)
    codec = find_codec(spec, headers, config)
    weight = codec.decode(tensors, spec, codec.describe(spec, headers, config))
    assert isinstance(weight, CanonicalWeight)
    return weight


@pytest.mark.parametrize("kind", ["dynamic", "extra_config"])
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2", "awq"])
def test_codecs_read_the_config_of_the_module(fmt: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    linear = random_linear(rng, 16, 128, bits=4 if fmt == "awq" else 8, group_size=32, symmetric=False)
    other = random_linear(rng, 16, 128, group_size=64, symmetric=fmt != "awq")
    own = {"bits": linear.bits, "group_size": 32, "sym": False}
    config = quantization_config(fmt, other, **{kind: {r".*up_proj$": own}})
    assert described(fmt, linear, config).dequantize().equal(linear.weight)
    assert described(fmt, other, config | {kind: {r".*down_proj$": own}}).dequantize().equal(other.weight)


def test_tensors_against_the_override() -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    for kind, bits in (("dynamic", 8), ("extra_config", 16)):
        config = quantization_config("gptq", linear, **{kind: {r".*up_proj$": {"bits": bits}}})
        with pytest.raises(FormatError, match=rf"bits of .*up_proj: got 4 from the tensors' shapes, expected {bits}"):
            described("gptq", linear, config)
