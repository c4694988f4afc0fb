"""Launch of the grouped GEMM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.kernels.common.launch import capability, launch, multiprocessors, overlaps
from quant_moelora.kernels.dequant.prepare import PreparedWeight
from quant_moelora.kernels.grouped_gemm.spec import GemmSpec, Tile, uses_mma_sync
from quant_moelora.kernels.grouped_gemm.specialized.config import aligned
from quant_moelora.kernels.lora.launch import Rider

_INT32_MAX = 2**31 - 1


def grouped_gemm(
    x: Tensor,  # (M, columns), (P, columns) in sorted order, or (halves, P, k_pad) in each half's column order
    weight: PreparedWeight,
    tiles: Tensor,  # (T, 4) int32 of `align`, or the router's ids (P,), each pair a tile of its own
    rows: Tensor | None,  # (P,) int32, pair of each sorted row; None with ids
    top_k: int | None,
    out: Tensor,  # (P, columns) of x's dtype, or (split, P, columns) float32
    tile: Tile,
    activation: Activation | None = None,
    rider: Rider | None = None,
    *,
    plain: bool = False,
) -> Tensor:
    """Multiply each sorted row with its expert's weight, add the bias, round once into ``out``.

    Sorted row i reads the row of x of its token, rows[i] // top_k; without a top_k row i. Only rows with an expert are
    written. A tile with a split leaves partial sums, whose sum over the first dimension in its order is the product.

    Args:
        weight: the weight, for x's dtype.
        tiles: the work.
        top_k: of w13; None for x in sorted order.
        out: all columns of the weight, or the logical ones of one half.
        tile: how to cut it; with consumers, for the kernel in `specialized`, which gives the same bits.
        activation: applied to gate and up, rounded to the dtype of ``out``, which then has the columns of one half.
        rider: work of LoRA that the launch does beside the product; not with consumers.
        plain: for the interpreter, with scales and zero points as they are stored.
    """
    x = aligned(x) if tile.consumers else x
    spec = _spec(x, weight, rows is None, top_k, out, tile, activation, plain=plain)
    row_tiles, riding = tiles.shape[0], 0 if rider is None else rider.programs
    if not row_tiles:
        return out
    launch(
        *_kernel(spec, row_tiles, riding, x.device),
        out,
        x,
        x.stride(-2),
        x.stride(0) if spec.by_half else 0,
        weight.qweight,
        weight.scales,
        weight.zero if weight.zeros is None else weight.zeros,
        weight.scales if weight.post is None else weight.post,
        weight.scales if weight.bias is None else weight.bias,
        out,
        out.stride(-2),
        out.stride(0) if tile.split > 1 else 0,
        tiles if rows is None else rows,
        tiles,
        row_tiles,
        weight.num_experts,
        top_k or 1,
        *(() if tile.consumers else (rider and rider.arguments, riding)),
        SPEC=spec,
        **({} if rider is None else {"RIDER": rider.spec, "SHRINKS": rider.shrinks}),
        num_warps=tile.warps,
        maxnreg=tile.registers,
        overlap=spec.overlap,
    )
    return out


def _kernel(spec: GemmSpec, row_tiles: int, riding: int, device: torch.device) -> tuple[Any, tuple[int, int]]:
    """The kernel of a tile, whose launcher Triton gives no types, and how many programs it has."""
    tile = spec.tile
    if not tile.consumers:
        from quant_moelora.kernels.grouped_gemm.kernel import grouped_gemm_kernel

        return grouped_gemm_kernel, (row_tiles * (spec.n // tile.bn) + -(-riding // tile.split), tile.split)
    from quant_moelora.kernels.grouped_gemm.specialized.kernel import specialized_gemm_kernel

    assert not (riding or spec.by_half or spec.direct or spec.plain or tile.split > 1), (
        "`serves` says what there is no loop for"
    )
    return specialized_gemm_kernel, (min(multiprocessors(device), row_tiles * -(-spec.n // tile.bn)), 1)


def _spec(
    x: Tensor,
    weight: PreparedWeight,
    direct: bool,
    top_k: int | None,
    out: Tensor,
    tile: Tile,
    activation: Activation | None,
    *,
    plain: bool,
) -> GemmSpec:
    """What the kernel is compiled for; parameters as of `grouped_gemm`."""
    return GemmSpec(
        tile=tile,
        n=weight.rows,
        k=weight.k_pad,
        x_columns=min(x.shape[-1], weight.k_pad),
        n_out=out.shape[-1],
        half_rows=weight.n_pad,
        bits=weight.bits,
        group=weight.group,
        zeros=weight.zeros is not None,
        one_step=weight.one_step,
        fp16=x.dtype == torch.float16,
        has_bias=weight.bias is not None,
        has_post=weight.post is not None,
        by_half=x.ndim == 3,
        gather=top_k is not None,
        direct=direct,
        activation="" if activation is None else activation.name,
        alpha=0.0 if activation is None else activation.alpha or 0.0,
        limit=0.0 if activation is None else activation.limit or 0.0,
        wide=x.shape[-2] * x.stride(-2) > _INT32_MAX,
        mma_sync=uses_mma_sync(capability(x.device)),
        overlap=tile.overlaps and overlaps(x.device),
        plain=plain,
    )
