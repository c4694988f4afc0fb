"""adapter_ids: from the requests of a batch to the slot of each of its tokens, on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_moelora.core.checks import check_same_device
from quant_moelora.core.errors import ShapeError
from quant_moelora.core.routing import BASE_SLOT


def adapter_ids(
    seq_lens: Tensor,  # (B,) int, tokens of each request, 0 or more
    slots: Tensor,  # (B,) int, slot of each request's adapter, -1 = base
    num_tokens: int,
) -> Tensor:  # (num_tokens,) int32
    """Slot of each token of a batch in which the requests' tokens follow one another.

    Tokens beyond the sum of ``seq_lens``, as in a padded batch of a CUDA graph, are the base's. Nothing waits for the
    device, so that a graph can be captured.

    Raises:
        ShapeError: the two tensors are not of one length, of integers, on one device.
    """
    shapes, dtypes = (tuple(seq_lens.shape), tuple(slots.shape)), (seq_lens.dtype, slots.dtype)
    if seq_lens.ndim != 1 or shapes[0] != shapes[1] or any(d.is_floating_point or d == torch.bool for d in dtypes):
        raise ShapeError(
            "seq_lens and slots",
            got=f"shapes {shapes}, dtypes {dtypes}",
            rule="one integer each for every request",
            remedy="give the length and the slot of each request, -1 for one without an adapter",
        )
    check_same_device({"seq_lens": seq_lens, "slots": slots})
    ends = seq_lens.cumsum(0)
    # The first request that ends behind a token, hence none without tokens; B beyond all of them.
    request = torch.searchsorted(ends, torch.arange(num_tokens, device=ends.device), right=True)
    return F.pad(slots.to(torch.int32), (0, 1), value=BASE_SLOT)[request]
