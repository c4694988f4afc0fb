"""LoRA on a parameter of all experts, as PEFT's ParamWrapper folds it into one pair of factors.

A [E*r, in] seen as (E, r, in), B [out, r*E] seen as (out, r, E). in and out are K and N where PEFT takes the parameter
for what it is, and N and K where it takes [E, N, K] for [E, K, N] or the reverse. PEFT 0.17 to 0.19.0 took every
parameter for [E, K, N]; since then it is one if its module says ``is_transposed`` (peft pull request 3165).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from packaging.version import Version
from torch import Tensor

from quant_moelora.loaders.families import PARAMETERS, ExpertsSpec, Projection, projections_of

ROLES_FIXED_IN = "0.19.1"


@dataclass(frozen=True)
class FusedForm:
    """A fused parameter of a layer's experts.

    Attributes:
        spec: the experts.
        parameter: ``gate_up_proj`` or ``down_proj``.
    """

    spec: ExpertsSpec
    parameter: str

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.spec.module}.{self.parameter}"

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Projections that share it."""
        return projections_of(PARAMETERS[self.parameter])

    @property
    def n(self) -> int:
        """Output features, of all its projections together."""
        return sum(self.spec.linear(self.name, projection).n for projection in self.projections)

    @property
    def k(self) -> int:
        """Input features."""
        return self.spec.linear(self.name, self.projections[0]).k

    def rows(self, projection: Projection) -> slice:
        """Rows of one projection in an expert's B."""
        place, places = self.projections.index(projection), len(self.projections)
        if self.spec.interleaved:
            return slice(place, self.n, places)
        return slice(self.n * place // places, self.n * (place + 1) // places)

    def blocks(
        self,
        b: Tensor,  # (E, N, r)
    ) -> list[slice]:
        """Ranks that each projection uses, if none uses those of another; else all of them together.

        PEFT converts per-expert LoRA of gate and up, which have an A each, to such a block-diagonal B.
        """
        places, rank = len(self.projections), b.shape[2]
        ranks = [slice(rank * place // places, rank * (place + 1) // places) for place in range(places)]
        for projection, own in zip(self.projections, ranks, strict=True):
            rows = b[:, self.rows(projection)]
            if rank % places or any(rows[..., other].any() for other in ranks if other != own):
                return [slice(0, rank)]
        return ranks

    def swapped_by(self, peft: Version) -> bool:
        """Whether a version of PEFT takes N for K."""
        taken_for_transposed = self.spec.declared_transposed or peft.release < Version(ROLES_FIXED_IN).release
        return taken_for_transposed != self.spec.transposed

    def fitting(self, a: Tensor, b: Tensor) -> set[bool]:
        """Which roles the shapes of a file's A and B allow: N and K in their places (False), or swapped (True)."""
        folded = a.shape[0]
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != folded or folded == 0 or folded % self.spec.num_experts:
            return set()
        found, expected = (b.shape[0], a.shape[1]), (self.n, self.k)
        return {swapped for swapped in (False, True) if found == (expected[::-1] if swapped else expected)}

    def unfold(
        self,
        a: Tensor,  # (E*r, K), or (E*r, N) if swapped
        b: Tensor,  # (N, r*E), or (K, r*E) if swapped
        swapped: bool,
    ) -> tuple[Tensor, Tensor]:  # (E, r, K), (E, N, r)
        """A and B of every expert, the rows of B as they stand in the parameter."""
        experts = self.spec.num_experts
        rank = a.shape[0] // experts
        a = a.view(experts, rank, -1)
        b = b.view(b.shape[0], rank, experts).permute(2, 0, 1)
        return (b.transpose(1, 2), a.transpose(1, 2)) if swapped else (a, b)

    def fold(
        self,
        a: Tensor,  # (E, r, K)
        b: Tensor,  # (E, N, r)
        swapped: bool,
    ) -> tuple[Tensor, Tensor]:
        """The inverse of `unfold`."""
        if swapped:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)

    def joined(
        self,
        parts: Sequence[Tensor],  # (N of the projection, r) each
    ) -> Tensor:  # (N, r)
        """B of an expert from those of the projections."""
        whole = torch.empty(self.n, parts[0].shape[1], dtype=parts[0].dtype, device=parts[0].device)
        for projection, part in zip(self.projections, parts, strict=True):
            whole[self.rows(projection)] = part
        return whole
