"""What a layer with adapters launches, compiled for a GPU that need not be there."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from quant_moelora.experts import marlin_op
from quant_moelora.kernels.align import launch as align
from quant_moelora.kernels.common.launch import options
from quant_moelora.kernels.grouped_gemm import launch as grouped_gemm
from quant_moelora.kernels.grouped_gemm.spec import GemmSpec
from quant_moelora.kernels.lora import launch as lora
from quant_moelora.kernels.lora.launch import LoRATables, Rider
from quant_moelora.kernels.lora.spec import LoRASpec
from tests.kernels.compiled import MAIN_SCHEME, SHAPES, Gpu, disassembled, prepared_layer, stands_for
from tests.kernels.sass import Program

_SLOTS = 8
_DTYPE = torch.bfloat16


class Case(NamedTuple):
    """A forward with adapters."""

    model: str
    tokens: int
    rank: int
    gpu: Gpu


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: of its function.
        threads: of a program.
        registers: of a thread.
        shared: bytes of shared memory.
        program: its machine code.
        hazards: see `Program.hazards`.
    """

    name: str
    threads: int
    registers: int
    shared: int
    program: Program
    hazards: list[str]


@dataclass(frozen=True)
class Launched:
    """A launch that LoRA has a part in.

    Attributes:
        kernel: what is launched.
        spec: of LoRA's part.
        shrinks: whether that is the shrink of w13.
        gemm: of the product beside which it rides, and the kernel of that product alone; None where it rides along with
            none.
    """

    kernel: Kernel
    spec: LoRASpec
    shrinks: bool
    gemm: tuple[GemmSpec, Kernel] | None

    @property
    def in_blocks(self) -> bool:
        """Whether it takes ranks in several blocks, one after the other."""
        return not self.shrinks and self.spec.max_rank > self.spec.cut.expand_ranks


def launched(cases: list[Case]) -> list[list[Launched]]:
    """All launches of each forward that LoRA has a part in; what rides along also as a launch of its own."""
    return [_launched(case) for case in cases]


class _Driver:
    """As much of a driver of Triton's as it takes to compile."""

    def __init__(self, gpu: Gpu) -> None:
        self._capability = 10 * gpu.capability[0] + gpu.capability[1]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps the kernels of each device apart

    def get_current_stream(self, device: int) -> int:
        return 0


def _launched(case: Case) -> list[Launched]:
    """As `launched`, of one forward."""
    from triton.runtime import driver

    found: list[Launched] = []

    def record(kernel: Any, grid: tuple[int, ...], out: Tensor, *arguments: Any, **named: Any) -> None:
        if "RIDER" in named:
            *problem, rider, riding = arguments
            spec, shrinks = named.pop("RIDER"), named.pop("SHRINKS")
            lora.alone(Rider(shrinks, riding, spec, rider))
            base = named["SPEC"], _compiled(kernel, *problem, None, 0, **named)
            made = _compiled(kernel, *arguments, **named, RIDER=spec, SHRINKS=shrinks)
            found.append(Launched(made, spec, shrinks, base))
        elif isinstance(named["SPEC"], LoRASpec):
            made = _compiled(kernel, *arguments, **named)
            found.append(Launched(made, named["SPEC"], made.name == "shrink13_kernel", None))

    with ExitStack() as patches:
        patches.enter_context(stands_for(case.gpu))
        patches.enter_context(patch.object(driver, "_active", _Driver(case.gpu)))
        patches.enter_context(
            patch.multiple(lora, overlaps=lambda _: case.gpu.overlaps, is_interpreted=lambda _: False)
        )
        patches.enter_context(patch.object(align, "launch", lambda *_, **__: None))
        patches.enter_context(patch.object(marlin_op, "moe_sum", lambda *_, **__: None))
        for module in (grouped_gemm, lora):
            patches.enter_context(patch.object(module, "launch", record))
        _forward(case)
    return found


def _forward(case: Case) -> None:
    """The operator's own launches, of tensors without memory."""
    shape = SHAPES[case.model]

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    tables = LoRATables(
        arena=empty(1 << 20, dtype=_DTYPE),
        offsets=empty(_SLOTS, 4, shape.experts, dtype=torch.int64),
        rank=empty(_SLOTS, 3, shape.experts),
        up_col=empty(_SLOTS, shape.experts),
        scaling=empty(_SLOTS, 3, shape.experts, dtype=torch.float32),
        max_rank=case.rank,
    )
    x, ids = empty(case.tokens, shape.hidden, dtype=_DTYPE), empty(case.tokens, shape.top_k)
    routing = ids, torch.empty_like(ids, dtype=torch.float32), empty(case.tokens)
    layer = prepared_layer(shape, MAIN_SCHEME, _DTYPE)
    with torch.inference_mode():
        marlin_op.write_lora_layer(x, *routing, *layer.arguments(), *tables, torch.empty_like(x))


def _compiled(kernel: Any, *arguments: Any, overlap: bool, **named: Any) -> Kernel:
    made = kernel.warmup(*arguments, grid=(1,), **named, **options(overlap))
    registers, program = disassembled(made.asm["cubin"])
    shared, threads = made.metadata.shared, 32 * made.metadata.num_warps
    return Kernel(kernel.__name__, threads, registers, shared, program, program.hazards())
