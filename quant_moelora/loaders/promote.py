"""Promotion of a canonical weight to a scheme that says more, where every value stays the same.

4 bits become 8: a symmetric code moves with its zero point, from 8 to 128; a code with a zero point of its own stays.
A group becomes several that share its scale. A symmetric weight gets zero points. Scales never change their dtype.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.scheme import QuantScheme, num_groups
from quant_moelora.loaders.canonical import CanonicalWeight


def common_scheme(*schemes: QuantScheme) -> QuantScheme | None:
    """The least scheme that weights of all of these can be promoted to; None if there is none.

    The smallest group size must divide the others; a group for each channel is divided by any size.
    """
    sizes = [scheme.group_size for scheme in schemes if scheme.group_size is not None]
    least = min(sizes, default=None)
    dtypes = {scheme.scale_dtype for scheme in schemes}
    if len(dtypes) > 1 or any(size % least for size in sizes if least is not None):
        return None
    return QuantScheme(
        max(scheme.bits for scheme in schemes), least, all(scheme.symmetric for scheme in schemes), dtypes.pop()
    )


def promote(weight: CanonicalWeight, scheme: QuantScheme, what: str) -> CanonicalWeight:
    """The same weight in ``scheme``, a `common_scheme` of its own and others.

    Args:
        weight: the weight.
        scheme: its new scheme.
        what: its name, for messages.

    Raises:
        UnsupportedError: its groups would have to be divided, and act-order mixes their columns.
    """
    old = weight.scheme
    if old == scheme:
        return weight
    if weight.g_idx is not None and old.group_size != scheme.group_size:
        raise UnsupportedError(
            f"g_idx of {what}",
            got=f"act-order in groups of {old.group_size or 'a channel'}",
            rule=f"groups of {scheme.group_size}, as others have that share a weight with it",
            remedy="quantise gate and up of all experts with one group size, or without act-order",
        )
    k = weight.codes.shape[-1]
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    if old.symmetric:
        shift = scheme.symmetric_zero - old.symmetric_zero  # codes and zero points together
        codes = codes + shift
        zeros = None if scheme.symmetric else torch.full_like(scales, scheme.symmetric_zero, dtype=torch.uint8)
    first = torch.arange(num_groups(k, scheme.group_size), device=codes.device) * (scheme.group_size or k)
    group = first // (old.group_size or k)  # old group of each new one

    def divided(values: Tensor) -> Tensor:  # (..., N, G) -> (..., N, new G)
        """Values of the old groups for the new ones."""
        return values[..., group]

    return replace(
        weight, scheme=scheme, codes=codes, scales=divided(scales), zeros=None if zeros is None else divided(zeros)
    )
