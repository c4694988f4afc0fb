"""What went wrong in vLLM 0.33, row by row of the list of its faults; the rest is in `test_regressions.CANNOT`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import AdapterError, ShapeError
from quant_moelora.core.packing import padded_columns
from quant_moelora.core.routing import Routing
from quant_moelora.core.shard import ParallelConfig
from quant_moelora.core.weights import PackedWeight
from quant_moelora.experts.registry import BACKENDS
from quant_moelora.kernels.grouped_gemm.config import choose_tiles
from quant_moelora.kernels.grouped_gemm.layer import LayerShape
from quant_moelora.layer import MoEExperts
from quant_moelora.loaders.families import Projection
from quant_moelora.lora.adapter_file import load_adapter
from quant_moelora.lora.bank import AdapterBank
from tests.adapters import Dims, attention_lora, expert_lora, fused_lora, linear_lora, write_adapter
from tests.builders import Adapter, Lora, adapter, layer, move, same_bits, scheme
from tests.experts.definition import Case, check
from tests.experts.parity import serving
from tests.experts.regressions import (
    DTYPE,
    QUANTISED,
    UNQUANTISED,
    each_backend,
    factors_of,
    make_case,
    small,
    some_adapters,
    sort,
)

NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
DIMS = Dims(experts=4, hidden=128, inter=64, layers=(0,))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@QUANTISED
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_backend_dropped_the_experts_adapters(bits: int, backend: str, device: torch.device) -> None:
    """vLLM 1: the Triton wNa16 experts took adapters and computed the base model."""
    info = small(scheme(bits, 64, bf16=True))
    check(make_case(info, some_adapters(info)), device, backend)


@UNQUANTISED
def test_an_unquantised_backend_dropped_the_experts_adapters(backend: str, device: torch.device) -> None:
    """vLLM 1."""
    info = small(DTYPE)
    check(make_case(info, some_adapters(info)), device, backend)


@QUANTISED
@pytest.mark.parametrize(("inter", "group"), [(64, 64), (64, 128), (128, 128), (64, None), (32, 64)])
def test_scales_of_w13_were_ordered_by_the_size_of_w2(
    inter: int, group: int | None, backend: str, device: torch.device
) -> None:
    """vLLM 2, SGLang 1, #50196: with an intermediate size of at most a group, w13 has more groups than that."""
    built = layer(scheme(4, group, bf16=True), experts=3, hidden=256, inter=inter)
    assert isinstance(built.info.w13, PackedWeight)
    assert built.info.w13.codes_and_scales()[1].shape[-1] == (1 if group is None else 256 // group)
    gate, up, down = built.info.dequantize()
    assert built.gate is not None and gate is not None
    for got, want in ((gate, built.gate), (up, built.up), (down, built.down)):
        assert torch.equal(got.double(), want)
    check(make_case(built.info), device, backend)


@QUANTISED
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_the_delta_of_up_stood_at_the_unpadded_offset(projection: str, backend: str, device: torch.device) -> None:
    """vLLM 3: 72 rows of gate are padded, and up begins behind the padding."""
    info = small(inter=72)
    assert info.inter_pad > info.intermediate_size
    check(make_case(info, [adapter(info, DTYPE, ranks={projection: 4})]), device, backend)


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_were_looked_up_by_packed_shapes(bits: int) -> None:
    """vLLM 4: int4 and int8 of one layer differ in nothing but the bits, whatever their tensors' shapes are."""
    info = small(scheme(bits, 64), hidden=192, inter=96)
    shape = LayerShape.of(info.to("meta"), DTYPE)
    pad = padded_columns(96, 64)
    assert (shape.num_experts, shape.w13.rows, shape.w13.columns) == (4, 2 * pad, 192)
    assert (shape.w2.rows, shape.w2.columns, shape.w2.bits) == (192, pad, bits)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_both_products_were_cut_for_different_heights(capability: tuple[int, int]) -> None:
    """vLLM 5: they share the list of row tiles, hence its height, also where their shapes differ much."""
    for hidden, inter, experts in ((1024, 64, 3), (64, 1024, 3), (128, 64, 1)):
        shape = LayerShape.of(layer(scheme(4, 64), experts=experts, hidden=hidden, inter=inter).info.to("meta"), DTYPE)
        for pairs in (1, 7, 64, 500, 4096, 50000):
            tiles = choose_tiles(shape, pairs, capability)
            heights = {tile.bm for tile in (tiles.w13, tiles.w13_fused, tiles.w2) if tile is not None}
            assert len(heights) == 1, pairs


@QUANTISED
@pytest.mark.parametrize("router_weight", ["input", "output"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_router_weight_met_the_delta_twice_or_never(
    gated: bool, router_weight: Any, backend: str, device: torch.device
) -> None:
    """vLLM 7: wherever it stands, it multiplies base + delta once. The weights here are far from 1."""
    function = Activation("silu") if gated else Activation("relu2", gated=False)
    info = small(router_weight=router_weight, activation=function)
    case = make_case(info, some_adapters(info))
    case.routing.topk_weights.mul_(3.0)
    check(case, device, backend)


UNCOMMON = [
    {"weight": "int4_zeros", "group": "g32", "act_order": True},
    {"weight": "int4_zeros", "group": "short_last"},
    {"weight": "int8", "group": "g128", "act_order": True},
    {"weight": "int8_zeros", "group": "channel"},
    {"weight": "int8_zeros", "group": "g32", "act_order": True},
]


@pytest.mark.parametrize("kind", UNCOMMON, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_act_order_zero_points_and_groups_were_refused(device: str, kind: dict[str, Any]) -> None:
    """vLLM 8: they are served by a backend that is made for the device; the matrix shows how right."""
    assert serving(device, **kind)[0] == {"cpu": "cpu", "cuda": "marlin"}[device]


@QUANTISED
def test_a_group_that_no_kernel_was_compiled_for(backend: str, device: torch.device) -> None:
    """vLLM 8: 48 columns."""
    info = small(scheme(4, 48, symmetric=False, bf16=True), hidden=96, inter=96, act_order=True)
    check(make_case(info, some_adapters(info)), device, backend)


@QUANTISED
def test_every_expert_had_to_have_all_projections_of_one_rank(backend: str, device: torch.device) -> None:
    """vLLM 9: each expert has other projections here, and each of them another rank."""
    info = small()
    held: Adapter = {}
    for expert, ranks in enumerate(({"gate": 1, "down": 6}, {"up": 2}, {"down": 3}, {"gate": 4, "up": 9, "down": 2})):
        held = {**held, **adapter(info, DTYPE, ranks=ranks, experts=[expert])}
    check(make_case(info, [held], tokens=12), device, backend)


def test_a_file_with_some_projections_of_some_experts(tmp_path: Path) -> None:
    """vLLM 9: as PEFT writes them, with a rank of their own for some."""
    tensors = expert_lora(DIMS, {"down": "down_proj"}, experts=[1, 3])
    tensors |= linear_lora("model.layers.0.mlp.experts.2.up_proj", 64, 128, rank=2)
    folder = write_adapter(tmp_path / "a", tensors, rank_pattern={"up_proj": 2})
    factors = load_adapter(folder, DIMS.specs()).layers[0]
    assert {key: len(factor.a) for key, factor in factors.items()} == {(1, "down"): 4, (3, "down"): 4, (2, "up"): 2}


@pytest.mark.parametrize(
    ("parameter", "projections"), [("down", {"down"}), ("gate_up", {"gate", "up"})], ids=["down", "gate_up"]
)
@each_backend()
def test_a_fused_adapter_of_one_parameter_was_dropped(
    parameter: str, projections: set[Projection], tmp_path: Path, backend: str, device: torch.device
) -> None:
    """vLLM 10: the other one need not be there, and what is there is served."""
    folder = write_adapter(
        tmp_path / "a", fused_lora(DIMS, (parameter,)), target_parameters=[f"mlp.experts.{parameter}_proj"]
    )
    factors = load_adapter(folder, DIMS.specs()).layers[0]
    assert factors.keys() == {(expert, name) for expert in range(4) for name in projections}
    rounded: Adapter = {key: Lora(f.a.to(DTYPE), f.b.to(DTYPE), f.scaling) for key, f in factors.items()}
    check(make_case(small(), [rounded]), device, backend)


def test_an_adapter_of_which_nothing_applied_served_the_base(tmp_path: Path) -> None:
    """vLLM 11: it is an error, and so is a tensor of an expert that there is not; the bank takes nothing empty."""
    empty = write_adapter(tmp_path / "empty", {})
    with pytest.raises(AdapterError, match="no LoRA tensor"):
        load_adapter(empty, DIMS.specs())
    stray = write_adapter(tmp_path / "stray", linear_lora("model.layers.9.mlp.experts.0.up_proj", 64, 128))
    with pytest.raises(AdapterError, match="no routed experts in layer 9"):
        load_adapter(stray, DIMS.specs())
    attention = write_adapter(tmp_path / "attention", attention_lora({"q_proj": (16, 16)}, layers=[0]))
    loaded = load_adapter(attention, DIMS.specs())
    assert loaded.linears and not loaded.layers
    bank = AdapterBank({0: small()}, DTYPE, max_adapters=1, max_rank=4)
    with pytest.raises(AdapterError, match="no factor of any layer"):
        bank.add("nothing", loaded.layers)


@pytest.mark.parametrize(("experts", "slots"), [(512, 2), (512, 16), (341, 3), (1024, 8), (64, 128)])
def test_more_experts_and_adapters_than_a_sort_had_room_for(experts: int, slots: int, device: torch.device) -> None:
    """vLLM 12: 1023, 1024, 8191 and 8192 of expert and adapter together are no limits."""
    tokens, top_k = 700, 3
    ids = torch.randint(0, experts, (tokens, top_k))
    ids[-1] = experts - 1
    chosen = torch.randint(-1, slots, (tokens,), dtype=torch.int32)
    chosen[-1] = slots - 1
    routed = move(Routing(ids, torch.ones(tokens, top_k), chosen, slots), device)
    order, _, segments = sort(routed, experts)
    assert torch.equal(order.sort().values, torch.arange(tokens * top_k, dtype=torch.int32))
    assert int(segments[:, 2].sum()) == tokens * top_k
    for expert, first, rows, slot in segments[segments[:, 2] > 0].tolist():
        pairs = order[first : first + rows].long()
        assert (ids.flatten()[pairs] == expert).all() and (chosen[pairs // top_k] == slot).all()


@pytest.mark.parametrize(
    "setting",
    [{"use_dora": True}, {"alora_invocation_tokens": [1]}, {"bias": "all"}, {"init_lora_weights": "pissa"}],
    ids=lambda setting: next(iter(setting)),
)
def test_what_is_no_plain_lora_is_refused_and_not_served_as_one(tmp_path: Path, setting: dict[str, Any]) -> None:
    """vLLM 13: refused there too; here each by its name, before anything is attached."""
    folder = write_adapter(tmp_path / "a", expert_lora(DIMS, NAMES), **setting)
    with pytest.raises(AdapterError, match=next(iter(setting))):
        load_adapter(folder, DIMS.specs())


def test_every_slot_took_the_largest_rank_of_every_expert() -> None:
    """vLLM 14: an adapter takes the bytes of its tensors, at most 16 more for each, whatever the largest rank."""
    info = small()
    bank = AdapterBank({0: info}, DTYPE, max_adapters=8, max_rank=256, capacity_bytes=1 << 20)
    held = adapter(info, DTYPE, ranks={"up": 4, "down": 2}, experts=[1])
    bank.add("a", {0: factors_of(held)})
    tensors = [tensor for lora in held.values() for tensor in (lora.a, lora.b)]
    own = sum(tensor.nbytes for tensor in tensors)
    assert own <= bank.report().adapters["a"].nbytes <= own + 16 * len(tensors)
    assert bank.contexts[0].v13_width == 512, "only buffers of a forward have room for it"


@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS])
def test_a_part_of_a_layer_was_taken_for_the_whole(backend: str) -> None:
    """vLLM 16, SGLang 4: a layer by itself refuses a part, whose output is not that of the layer, and says so."""
    for quant in (None, DTYPE):
        part = small(quant, inter=128).part(ParallelConfig(1, 2))
        with pytest.raises(ShapeError, match=r"got a part of one, .*use DistributedExperts"):
            MoEExperts(part, backend=backend)


@QUANTISED
def test_a_batch_of_base_tokens_chose_another_path(backend: str, device: torch.device) -> None:
    """vLLM 6: whether adapters are served hangs on what is attached, and on no batch; such rows are the base's."""
    info = small()
    case = make_case(info, some_adapters(info), tokens=6)
    experts = MoEExperts(info.to(device), backend)
    routed = move(case.routing, device)
    given = (case.x.to(device), routed.topk_ids, routed.topk_weights)
    base = experts(*given)
    experts.attach(case.bank(info.to(device)).contexts[0])
    assert routed.slots is not None
    assert same_bits(experts(*given, torch.full_like(routed.slots, -1)), base)
    alone = Case(info, case.x, replace(case.routing, slots=torch.tensor([-1] * 5 + [1], dtype=torch.int32)), [])
    assert alone.routing.slots is not None
    mixed = experts(*given, alone.routing.slots.to(device))
    assert same_bits(mixed[:5], base[:5]) and not same_bits(mixed[5], base[5])
