"""Other implementations of the same grouped GEMMs: Humming's kernels, and torch on bfloat16 weights.

Of weights that are not quantised torch's layer is measured too, as transformers puts it together.

Each rival is made of the benchmark's weights and gives, for a case, calls that compute w13 and then w2, and its
relative error. w2 takes random activations, since no rival's activation is measured.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.moe_case import CHECKED_TOKENS, DENSE_BITS, DTYPE, GROUP, SHAPES, Case, relative_error
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import DenseWeight, ExpertWeight, PackedWeight

Calls = tuple[list[Callable[[], object]], float | None, str]
_AT_ONCE = 8  # experts that are converted together
_QWEN3_MOE = "transformers.models.qwen3_moe.modeling_qwen3_moe"


def _chunks(weight: PackedWeight) -> list[PackedWeight]:
    return [
        replace(weight, num_experts=len(qweight), qweight=qweight, scales=scales)
        for qweight, scales in zip(weight.qweight.split(_AT_ONCE), weight.scales.split(_AT_ONCE), strict=True)
    ]


def _weights(info: MoEQuantInfo) -> tuple[PackedWeight, PackedWeight]:
    assert isinstance(info.w13, PackedWeight) and isinstance(info.w2, PackedWeight)
    return info.w13, info.w2


def _dense(weight: ExpertWeight) -> Tensor:  # (E, rows, K) bfloat16
    if isinstance(weight, DenseWeight):
        return weight.w
    return torch.cat([part.dequantize().flatten(1, 2).to(DTYPE) for part in _chunks(weight)])


def _activations(case: Case) -> Tensor:  # (P, I)
    return torch.randn(case.tokens * case.shape.top_k, case.shape.inter, device=case.x.device).to(DTYPE)


def _humming(module: str) -> Any:
    """A module of `humming-kernels`, which only this benchmark wants."""
    return importlib.import_module(f"humming.{module}")


class Torch:
    """`torch._grouped_mm` on weights in bfloat16, dequantised if need be; rows are sorted and their offsets given."""

    bits = DENSE_BITS

    def __init__(self, info: MoEQuantInfo) -> None:
        self._weights = (info.w13, info.w2)
        self._copies = [[_dense(weight) for weight in self._weights]]

    def layer(self, case: Case, copies: int) -> list[Callable[[], object]]:
        """Forwards of transformers' experts around the same products."""
        transformers = importlib.import_module("transformers")
        shape = case.shape
        config = transformers.Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.inter,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            experts_implementation="grouped_mm",
        )
        layers: list[Any] = []
        for w13, w2 in self._grown(copies):
            with torch.device("meta"):
                experts = importlib.import_module(_QWEN3_MOE).Qwen3MoeExperts(config)
            experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(w, False) for w in (w13, w2))
            layers.append(experts)
        routed = [(copy, ids.long()) for copy, ids in case.launches(copies)]
        return [functools.partial(layers[copy], case.x, ids, case.topk_weights) for copy, ids in routed]

    def _grown(self, copies: int) -> list[list[Tensor]]:
        while len(self._copies) < copies:
            self._copies.append([w.clone() for w in self._copies[0]])
        return self._copies[:copies]

    def gemms(self, case: Case, copies: int) -> Calls:
        """Calls, relative error over the quantised weights, and how it was called."""
        held = self._grown(copies)
        h, pairs = _activations(case), torch.arange(case.tokens * case.shape.top_k, device=case.x.device)
        calls: list[Callable[[], object]] = []
        error = None
        for number, (copy, ids) in enumerate(case.launches(copies)):
            rows = ids.flatten().argsort(stable=True)
            ends = ids.flatten().bincount(minlength=case.shape.experts).cumsum(0).to(torch.int32)
            inputs = (case.x[pairs[rows] // case.shape.top_k], h)
            made = [
                functools.partial(torch.ops.aten._grouped_mm, x, w.transpose(-2, -1), offs=ends)
                for x, w in zip(inputs, held[copy], strict=True)
            ]
            if not number and case.tokens <= CHECKED_TOKENS:
                parts = zip(made, inputs, self._weights, strict=True)
                error = max(relative_error(call(), x, ids.flatten()[rows], w) for call, x, w in parts)
            calls += made
        return calls, error, "bfloat16 weights, rows sorted before"


class Humming:
    """Grouped GEMMs of `humming-kernels`, with the tiles that its own heuristics choose for a case.

    Args:
        info: the weights.
        kind: ``indexed`` gathers tokens itself; ``grouped_contiguous`` takes rows that were sorted before.
    """

    def __init__(self, info: MoEQuantInfo, kind: str, tensors: list[list[Any]]) -> None:
        self._kind = kind
        self._weights = _weights(info)
        self.bits = self._weights[0].scheme.bits
        self._copies = tensors
        self._locks = torch.zeros(2048, dtype=torch.int32, device=info.device)

    @staticmethod
    def convert(info: MoEQuantInfo) -> list[list[Any]]:
        """One copy of both weights in Humming's order: each its configuration and its tensors."""
        transform = _humming("transform").transform_humming_tensors
        made: list[Any] = []
        for weight in _weights(info):
            config, schema = layer_config(weight.num_experts, weight.halves * weight.n, weight.k, weight.scheme.bits)
            raw = [_canonical(part, schema) for part in _chunks(weight)]
            tensors = {name: torch.cat([part[name] for part in raw]) for name in raw[0]}
            del raw
            made.append((config, transform(config, tensors)))
        return [made]

    def gemms(self, case: Case, copies: int) -> Calls:
        """Calls, relative error and tiles."""
        while len(self._copies) < copies:
            first = self._copies[0]
            self._copies.append([(config, {k: t.clone() for k, t in held.items()}) for config, held in first])
        h, top_k = _activations(case), case.shape.top_k
        pairs = case.tokens * top_k
        tunings = [tuning(config, self._kind, pairs) for config, _ in self._copies[0]]
        outs = [torch.empty(pairs, w.halves * w.n, dtype=DTYPE, device=h.device) for w in self._weights]
        calls: list[Callable[[], object]] = []
        error = None
        for number, (copy, ids) in enumerate(case.launches(copies)):
            order = ids.flatten().argsort(stable=True) if self._kind != "indexed" else None
            x = case.x if order is None else case.x[order // top_k]
            made = [
                self._call(held, source, out, tune, ids, gather)
                for held, source, out, tune, gather in zip(
                    self._copies[copy], (x, h), outs, tunings, (top_k, 1), strict=True
                )
            ]
            if not number and case.tokens <= CHECKED_TOKENS:
                rows = ids.flatten() if order is None else ids.flatten()[order]
                sources = (case.x.repeat_interleave(top_k, 0) if order is None else x, h)
                parts = zip(made, sources, outs, self._weights, strict=True)
                error = max(_error(call, out, source, rows, w) for call, source, out, w in parts)
            calls += made
        words = ("x".join(map(str, tune["block_shape"])) for tune in tunings)
        return calls, error, "; ".join(f"{name} {tile}" for name, tile in zip(("w13", "w2"), words, strict=True))

    def _call(
        self, held: Any, x: Tensor, out: Tensor, tune: dict[str, Any], ids: Tensor, gather: int
    ) -> Callable[[], object]:
        config, tensors = held
        if self._kind == "indexed":
            work = _blocks(ids, config.num_experts, tune["block_shape"][0]) | {"top_k": gather}
        else:
            ends = ids.flatten().bincount(minlength=config.num_experts).cumsum(0)
            work = {"expert_layout": torch.nn.functional.pad(ends, (1, 0))}
        return functools.partial(
            _humming("forward").humming_forward,
            config,
            x,
            **tensors,
            **work,
            outputs=out,
            locks=self._locks,
            compute_config=json.dumps({"gemm_type": self._kind}),
            tuning_config=json.dumps(tune),
        )


def _error(call: Callable[[], object], out: Tensor, x: Tensor, experts: Tensor, weight: PackedWeight) -> float:
    out.fill_(float("nan"))
    call()
    return relative_error(out, x, experts, weight)


def layer_config(experts: int, n: int, k: int, bits: int) -> tuple[Any, Any]:
    """Humming's description of a weight, and the schema of its integers."""
    integers = _humming("schema").HummingWeightSchema(b_dtype=f"uint{bits}", weight_scale_group_size=GROUP)
    # What Humming turns symmetric integers without their least code into: a sign and a magnitude.
    signed = _humming("dtypes").FloatingPointType(num_bits=bits, exponent_bits=0, mantissa_bits=bits - 1)
    config = _humming("transform").prepare_layer_config(
        n, k, replace(integers, b_dtype=signed), num_experts=experts, torch_dtype=DTYPE, device=torch.device("cuda", 0)
    )
    return config, integers


def _canonical(part: PackedWeight, schema: Any) -> dict[str, Tensor]:
    """Rows of codes along K in int32 words, and scales, as Humming takes them."""
    codes, scales = part.codes_and_scales()
    words = _humming("ops").pack_weight(codes.flatten(1, 2).to(torch.int32).contiguous(), part.scheme.bits)
    signed, tensors = schema.convert_symmetric_integer_weight({"weight": words})
    assert signed.b_dtype != schema.b_dtype
    return {"weight": tensors["weight"], "weight_scale": scales.flatten(1, 2).contiguous()}


def tuning(config: Any, kind: str, pairs: int) -> dict[str, Any]:
    """The tile and the rest that Humming's heuristics choose."""
    return _humming("tune").get_heuristics_config(config, shape_m=pairs, gemm_type=kind)


def _blocks(ids: Tensor, experts: int, height: int) -> dict[str, Tensor]:
    """Pairs by expert, each expert's filled up to whole blocks with the number of pairs, for the indexed kernel."""
    flat = ids.flatten().to(torch.int64)
    counts = flat.bincount(minlength=experts)
    blocks = -(-counts // height)
    shift = (blocks * height).cumsum(0) - blocks * height - (counts.cumsum(0) - counts)
    order = flat.argsort(stable=True)
    total = int(blocks.sum()) * height
    filled = torch.full((total,), flat.numel(), dtype=torch.int32, device=ids.device)
    filled[torch.arange(flat.numel(), device=ids.device) + shift[flat[order]]] = order.to(torch.int32)
    return {
        "sorted_ids": filled,
        "expert_ids": torch.arange(experts, device=ids.device).repeat_interleave(blocks).to(torch.int32),
        "num_tokens_padded": torch.tensor(total, dtype=torch.int32, device=ids.device),
    }


def compile_ahead(name: str, bits: int, tokens: int, kind: str) -> None:
    """Compile the kernels of a case into Humming's cache."""
    shape = SHAPES[name]
    for n, k in ((2 * shape.inter, shape.hidden), (shape.hidden, shape.inter)):
        config, _ = layer_config(shape.experts, n, k, bits)
        tune = json.dumps(tuning(config, kind, tokens * shape.top_k))
        _humming("kernel.humming").HummingKernel.prepare_kernels(config.to_str(), json.dumps({"gemm_type": kind}), tune)
