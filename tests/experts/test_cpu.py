"""The cpu backend by itself: memory, bits that depend on nothing else, shapes off every block, what it declines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.errors import BackendError
from quant_moelora.core.routing import Routing
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import PackedWeight
from quant_moelora.experts.cpu import CpuBackend
from quant_moelora.kernels.align.reference import align
from quant_moelora.kernels.cpu_gemm import product
from quant_moelora.kernels.cpu_gemm.dequant import BlockDequantizer
from quant_moelora.layer import MoEExperts
from tests.builders import BuiltWeight, expected, layer, packed, roundoff, routing, same_bits, scheme, threads

CPU = torch.device("cpu")
SCHEMES = [
    scheme(bits, group, symmetric)
    for bits in (4, 8)
    for group in (16, 48, 96, 128, None)
    for symmetric in (False, True)
]
SCHEME = pytest.mark.parametrize("quant", SCHEMES, ids=lambda quant: quant.name)


def multiply(built: BuiltWeight, x: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of each pair's row with its expert's weight, in the order of pairs."""
    weight = built.weight
    plan = align(Routing(ids, torch.ones(ids.shape)), weight.num_experts)
    run = packing.run_length(weight.scheme.bits, weight.group)
    assert run is not None
    columns = packing.run_columns(weight.k_pad, weight.scheme.bits, run)
    if out is None:
        out = torch.empty(ids.numel(), weight.rows)
    product.grouped_gemm(x, weight, columns, plan, ids.shape[1], out)
    return out[plan.inverse.long()]


@SCHEME
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act"])
@pytest.mark.parametrize("halves", [1, 2])
def test_product(quant: QuantScheme, act_order: bool, halves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that end with the rows and others that do not, parts of several blocks, a short last group."""
    monkeypatch.setattr(product, "_BLOCK", 2 * 64 * 200)
    monkeypatch.setattr(product, "_BLOCKS", 2)
    built = packed(quant, experts=3, halves=halves, n=330, k=200, bias=True, act_order=act_order)
    x, ids = torch.randn(5, 200), torch.tensor([[0, 2], [2, 0], [-1, 2], [2, 3], [0, 0]])
    out = multiply(built, x, ids).unflatten(1, (halves, -1))
    for pair, expert in enumerate(ids.flatten().tolist()):
        if expert not in (0, 2):
            assert out[pair].isnan().all()  # nobody wrote there
            continue
        row, w = x[pair // 2].double(), built.value[expert]
        want = w @ row + built.bias[expert]
        # K + 1 roundings of a float32 sum, each of the root of squares of what is summed up: 8 standard deviations.
        size = ((w * row).square().sum(-1) + built.bias[expert].square()).sqrt()
        bound = 8 * 201**0.5 * roundoff(torch.float32) * size
        assert ((out[pair, :, :330].double() - want).abs() <= bound).all()
        assert (out[pair, :, 330:] == 0).all()


@SCHEME
def test_blocks_are_exact(quant: QuantScheme) -> None:
    """Every value of a block is the float32 of the definition, bit for bit."""
    built = packed(quant, experts=2, n=192, k=192)
    weight = built.weight
    run = packing.run_length(quant.bits, weight.group)
    assert run is not None
    columns = packing.run_columns(weight.k_pad, quant.bits, run)
    scales, zeros = product._scales_and_zeros(weight, 1, slice(1, 3))
    values = BlockDequantizer(weight, 2)(weight.qweight[1, 1:3], zeros, scales)
    stored = torch.empty_like(values)
    stored[:, columns] = values
    assert same_bits(stored[:, :192], weight.dequantize()[1, 0, 64:192])


def test_a_row_depends_on_nothing_but_itself() -> None:
    """Not on the number of rows, nor its place, nor the number of threads: adapters change other rows' routing."""
    info = layer(scheme(4, 64, symmetric=False), experts=4, hidden=256, inter=192).info
    module = MoEExperts(info, "cpu")
    case = routing(33, 2, 4, holes=False)
    x = torch.randn(33, 256)
    with torch.no_grad():
        whole = module(x, case.topk_ids, case.topk_weights)
        for count in (1, 2, 3):
            with threads(count):
                for part in (slice(0, 1), slice(5, 9), slice(7, 33), slice(0, 33)):
                    out = module(x[part], case.topk_ids[part], case.topk_weights[part])
                    assert same_bits(out, whole[part])


@pytest.mark.parametrize(
    "quant", [scheme(4, 128), scheme(4, 32, symmetric=False), scheme(8, 128)], ids=lambda q: q.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resident_memory(quant: QuantScheme, dtype: torch.dtype) -> None:
    """At most 1.2 times the packed bytes stay: weights, what was prepared, and buffers after a forward of 8 tokens."""
    info = layer(quant, experts=8, hidden=512, inter=256).info
    module = MoEExperts(info, "cpu")
    case = routing(8, 2, 8)
    with torch.no_grad():
        module(torch.randn(8, 512).to(dtype), case.topk_ids, case.topk_weights)
    prepared, workspace = module._prepared, module._workspace
    assert prepared is not None and workspace is not None
    held = {id(t): t.nbytes for t in (*module.buffers(), *info.tensors().values(), *prepared.tensors.values())}
    assert sum(held.values()) + workspace.nbytes <= 1.2 * info.nbytes
    assert prepared.info is info and prepared.lossy is None


def test_modes_of_autograd() -> None:
    """Threads write buffers of any mode, and what they compute is part of the graph of autograd."""
    built = layer(scheme(4, 32), experts=3)
    module, case = MoEExperts(built.info, "cpu"), routing(5, 2, 3)
    x = torch.randn(5, 64)
    want, _ = expected(built, x, case)
    with threads(2):
        with torch.inference_mode():
            first = module(x, case.topk_ids, case.topk_weights)
        with torch.no_grad():
            assert same_bits(module(x, case.topk_ids, case.topk_weights), first.clone())
        out = module(x.requires_grad_(), case.topk_ids, case.topk_weights)
        assert same_bits(out.detach(), first.clone()) and out.requires_grad
    assert ((out.double() - want).norm() <= 1e-5 * want.norm()).item()


def test_declines_with_every_reason() -> None:
    info = layer(scheme(4, 24), experts=1).info
    assert CpuBackend().supports(info.to("meta"), torch.device("cuda"), torch.float64, lora=True).reasons == (
        "device cuda is not the CPU",
        "activation dtype torch.float64 is not float32, bfloat16 or float16",
        "w13 has groups of 24 columns, which is no multiple of 16",
        "w2 has groups of 24 columns, which is no multiple of 16",
    )
    dense = layer(torch.bfloat16, experts=1).info
    verdict = CpuBackend().supports(dense, CPU, torch.bfloat16, lora=False)
    assert verdict.reasons == ("w13 is not quantised", "w2 is not quantised")


@pytest.mark.parametrize(("zero", "served"), [(-112, True), (128, True), (-113, False), (129, False)])
def test_zero_points_that_do_not_fit(zero: int, served: bool) -> None:
    info = layer(scheme(4, 32, symmetric=False), experts=1).info
    assert isinstance(info.w2, PackedWeight)
    zeros = torch.full((1, info.w2.rows, info.w2.k_pad // 32), zero, dtype=torch.int16)
    w2 = replace(info.w2, zeros=packing.pack_pairs(zeros))
    if not served:
        with pytest.raises(BackendError, match=rf"zero points of w2 .*got {zero} to {zero}, expected -112 to 128"):
            CpuBackend().prepare(replace(info, w2=w2), torch.float32)
        return
    CpuBackend().prepare(replace(info, w2=w2), torch.float32)
    (scales, found), (run,) = product._scales_and_zeros(w2, 0, slice(0, 1)), [packing.run_length(4, 32)]
    assert run is not None
    values = BlockDequantizer(w2, 1)(w2.qweight[0, :1], found, scales)
    stored = torch.empty_like(values)
    stored[:, packing.run_columns(w2.k_pad, 4, run)] = values
    assert same_bits(stored[:, : w2.k], w2.dequantize()[0, 0, :64])
