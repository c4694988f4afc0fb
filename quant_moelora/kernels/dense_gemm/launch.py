"""Launch of the dense grouped GEMM."""

from __future__ import annotations

from torch import Tensor

from quant_moelora.kernels.common.launch import launch, overlaps
from quant_moelora.kernels.dense_gemm.config import DenseSpec
from quant_moelora.kernels.grouped_gemm.spec import Tile

_INT32_MAX = 2**31 - 1


def dense_gemm(
    x: Tensor,  # (M, k), or (P, k) in sorted order; contiguous
    w: Tensor,  # (E, rows, k_pad) of x's dtype, contiguous
    bias: Tensor | None,  # (E, rows) float32
    tiles: Tensor,  # (T, 4) int32 of `align`, for tiles as high as this one
    rows: Tensor,  # (P,) int32, pair of each sorted row
    top_k: int | None,
    out: Tensor,  # (P, n) of x's dtype, contiguous
    tile: Tile,
) -> Tensor:
    """Multiply each sorted row with its expert's weight, add the bias, round once into ``out``.

    Sorted row i reads the row of x of its token, rows[i] // top_k; without a top_k row i. Only rows with an expert are
    written. Of the weight, the first n rows and the first k columns are read.
    """
    spec = spec_of(x, w, out, tile, has_bias=bias is not None, gather=top_k is not None)
    if not len(tiles):
        return out
    from quant_moelora.kernels.dense_gemm.kernel import dense_gemm_kernel

    launch(
        dense_gemm_kernel,
        (len(tiles) * -(-spec.n // tile.bn),),
        out,
        x,
        w,
        bias,
        out,
        rows,
        tiles,
        len(tiles),
        top_k or 1,
        SPEC=spec,
        num_warps=tile.warps,
        overlap=spec.overlap,
    )
    return out


def spec_of(
    x: Tensor,  # as of `dense_gemm`, and so the others
    w: Tensor,
    out: Tensor,
    tile: Tile,
    *,
    has_bias: bool,
    gather: bool,
) -> DenseSpec:
    """What the kernel is compiled for."""
    return DenseSpec(
        tile=tile,
        n=out.shape[1],
        rows=w.shape[1],
        k=x.shape[1],
        k_pad=w.shape[2],
        has_bias=has_bias,
        gather=gather,
        wide=w.shape[1] * w.shape[2] > _INT32_MAX,
        overlap=tile.overlaps and overlaps(x.device),
    )
