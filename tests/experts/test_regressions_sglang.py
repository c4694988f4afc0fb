"""What went wrong in SGLang 0.5.23, bug by bug; the rest is in `test_regressions.CANNOT`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import AdapterError, ShapeError
from quant_moelora.core.packing import padded_columns
from quant_moelora.core.routing import Routing
from quant_moelora.core.weights import PackedWeight
from quant_moelora.layer import MoEExperts
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.codec import LinearSpec
from quant_moelora.loaders.registry import find_codec
from tests.builders import adapter, move, same_bits, scheme
from tests.checkpoints import ENCODERS, headers_of, quantization_config, random_linear
from tests.experts.definition import check, run
from tests.experts.regressions import (
    DTYPE,
    QUANTISED,
    RANKS,
    UNQUANTISED,
    each_backend,
    make_case,
    small,
    some_adapters,
)
from tests.launched.cases import cast_scales


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@QUANTISED
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_were_read_in_the_dtype_of_the_model(
    dtype: torch.dtype, stored: torch.dtype, backend: str, device: torch.device
) -> None:
    """SGLang 2: scales have the dtype of the checkpoint, and are converted and not reinterpreted.

    Marlin rounds them to the dtype, and so does its definition; no cast of the module touches them.
    """
    info = small(scheme(4, 64, bf16=stored == torch.bfloat16))
    held = MoEExperts(info, backend).to(dtype).info
    assert all(same_bits(tensor, info.tensors()[name]) for name, tensor in held.tensors().items())
    if backend == "marlin":
        assert isinstance(info.w13, PackedWeight) and isinstance(info.w2, PackedWeight)
        held = replace(info, w13=cast_scales(info.w13, dtype), w2=cast_scales(info.w2, dtype))
    case = make_case(held, some_adapters(held, dtype), dtype=dtype)
    check(case, device, backend)
    for out, want in zip(run(case, info.to(device), backend), run(case, held.to(device), backend), strict=True):
        assert out is not None and want is not None and same_bits(out, want)


@pytest.mark.parametrize("act_order", [False, True])
def test_scales_of_w2_had_the_size_of_the_other_kind_of_file(act_order: bool) -> None:
    """SGLang 3: with and without act-order w2 has a scale for each group of its columns, and nothing else is taken."""
    info = small(scheme(4, 32), inter=160, act_order=act_order)
    assert isinstance(info.w2, PackedWeight)
    assert info.w2.scales.shape[2] == padded_columns(160, 32) // 32
    for wrong in (info.w2.scales[:, :, :2].contiguous(), torch.cat([info.w2.scales] * 2, 2)):
        with pytest.raises(ShapeError, match="scales"):
            replace(info.w2, scales=wrong)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_was_carried_into_its_neighbour(bits: int, version: str) -> None:
    """SGLang 5: every row's zero point is its own, those at the ends of the range, and of all rows in 8 bits too."""
    most = (1 << bits) - 1
    zeros = np.array([[0, most, 0, 5, most, most, 1, most - 1, 0, 0, 7, most, 2, 0, most, 3]]).T
    linear = replace(random_linear(np.random.default_rng(0), 16, 32, bits=bits, symmetric=False), zeros=zeros)
    module = "model.layers.0.mlp.experts.0.up_proj"
    tensors, config = ENCODERS[version](linear), quantization_config(version, linear)
    spec, headers = LinearSpec(module, 16, 32), headers_of(tensors, module)
    codec = find_codec(spec, headers, config)
    weight = codec.decode(tensors, spec, codec.describe(spec, headers, config))
    assert isinstance(weight, CanonicalWeight) and weight.zeros is not None
    assert weight.zeros.tolist() == zeros.tolist()
    assert torch.equal(weight.dequantize(), linear.weight)


@QUANTISED
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_fused_sum_left_the_delta_of_down_out(top_k: int, backend: str, device: torch.device) -> None:
    """SGLang 6: an adapter of down alone is in the sum of one, two and all of a token's experts."""
    info = small()
    case = make_case(info, [adapter(info, DTYPE, ranks={"down": 4})], top_k=top_k)
    case.routing.topk_ids[:] = torch.stack([torch.randperm(4)[:top_k] for _ in range(9)])
    check(case, device, backend)


@QUANTISED
@pytest.mark.parametrize("beyond", [4, 5, 1000, 2**31 - 1, -1, -(2**31)])
def test_adapters_had_no_upper_bound_of_experts(beyond: int, backend: str, device: torch.device) -> None:
    """SGLang 7, #40240: neither a weight nor a factor is read for an expert that there is not, whoever asks."""
    info = small()
    case = make_case(info, some_adapters(info), ids=[[3, beyond], [beyond, beyond], [0, 2], [beyond, 1]])
    check(case, device, backend)
    experts = MoEExperts(info.to(device), backend)
    experts.attach(case.bank(info.to(device)).contexts[0])
    routed = move(case.routing, device)
    assert routed.slots is not None
    x = case.x.to(device)
    x[1] = torch.nan
    out = experts(x, routed.topk_ids, routed.topk_weights, routed.slots)
    assert (out[1] == 0).all() and out[[0, 2, 3]].isfinite().all()


@each_backend(weight="int8_zeros")
def test_int8_with_zero_points_had_no_path(backend: str, device: torch.device) -> None:
    """SGLang 8."""
    info = small(scheme(8, 64, symmetric=False, bf16=True))
    check(make_case(info, some_adapters(info)), device, backend)


FUNCTIONS = (
    Activation("silu"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu2", gated=False),
    Activation("silu", gated=False),
    Activation("swigluoai", alpha=1.702, limit=0.5),
    Activation("swigluoai", alpha=0.5, limit=7.0),
)


@QUANTISED
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
@pytest.mark.parametrize("router_weight", ["input", "output"])
def test_adapters_took_every_activation_for_silu(
    router_weight: Any, function: Activation, backend: str, device: torch.device
) -> None:
    """SGLang 9: with and without a gate, with its alpha and limit, wherever the router's weight stands."""
    info = small(activation=function, router_weight=router_weight)
    check(make_case(info, some_adapters(info)), device, backend)


@UNQUANTISED
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_unquantised_adapters_took_every_activation_for_silu(
    function: Activation, backend: str, device: torch.device
) -> None:
    """SGLang 9."""
    info = small(DTYPE, activation=function)
    check(make_case(info, some_adapters(info)), device, backend)


def test_adapters_of_another_layer_were_taken() -> None:
    """SGLang 9: what does not fit a layer is refused when it is attached, and nothing is assumed of it."""
    info = small()
    ctx = make_case(info, [adapter(info, DTYPE, ranks=RANKS)]).bank(info).contexts[0]
    for other in (small(experts=3), small(hidden=64), small(inter=128)):
        with pytest.raises(AdapterError, match="LoRA context"):
            MoEExperts(other).attach(ctx)
    ungated = small(activation=Activation("relu2", gated=False))
    with pytest.raises(AdapterError, match="gate of expert 0"):
        make_case(ungated, [adapter(ungated, DTYPE, ranks=RANKS)]).bank(ungated)


def test_a_routing_of_another_shape_was_taken() -> None:
    """SGLang 9: nothing is inferred from how many numbers there are."""
    experts = MoEExperts(small())
    x, ids, weights = torch.zeros(3, 128), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    for given in ((x[:, :64], ids, weights), (x[:2], ids, weights), (x, ids[:, :1], weights), (x, ids.float(), ids)):
        with pytest.raises(ShapeError):
            experts(*given)
    with pytest.raises(ShapeError, match="slots"):
        Routing(ids, weights, torch.zeros(2, dtype=torch.int32))
