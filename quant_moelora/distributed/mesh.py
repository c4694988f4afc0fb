"""ExpertMesh: the processes that share the experts of a layer, and what they say to one another.

Collectives are torch's functional operators, which `torch.compile` traces and CUDA graphs capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.shard import ParallelConfig

DIMENSIONS = ("ep", "tp")
_ops: Any = torch.ops._c10d_functional  # torch's own name of them


@dataclass(frozen=True)
class Group:
    """The processes of one dimension of a mesh; one alone has nothing to say to anybody.

    Attributes:
        name: of the process group, as torch's operators know it.
        rank: this process's place in it.
        size: how many there are.
    """

    name: str
    rank: int
    size: int

    def all_reduce(
        self,
        x: Tensor,  # any shape
    ) -> Tensor:
        """The sum over all processes, in x's dtype."""
        return self.arrived(self.start_all_reduce(x))

    def start_all_reduce(
        self,
        x: Tensor,  # any shape
    ) -> Tensor:
        """`all_reduce`, to be given to `arrived` before it is read."""
        return x if self.size == 1 else _ops.all_reduce(x.contiguous(), "sum", self.name)

    def all_gather(
        self,
        x: Tensor,  # (n, ...), of one shape everywhere
    ) -> Tensor:  # (size * n, ...)
        """What all processes have, one after the other."""
        return x if self.size == 1 else self.arrived(_ops.all_gather_into_tensor(x.contiguous(), self.size, self.name))

    def start_all_gather(
        self,
        tensors: Sequence[Tensor],  # each (n, ...), of one shape everywhere
    ) -> Sequence[Tensor]:  # each (size * n, ...)
        """`all_gather` of several tensors at once, each to be given to `arrived` before it is read."""
        if self.size == 1:
            return tensors
        parts = [x.contiguous() for x in tensors]
        if parts[0].is_cpu:  # gloo would send all of them in one promoted dtype and read them in the first one's
            return [_ops.all_gather_into_tensor(x, self.size, self.name) for x in parts]
        return _ops.all_gather_into_tensor_coalesced(parts, self.size, self.name)

    def start_reduce_scatter(
        self,
        x: Tensor,  # (size * n, ...), of one shape everywhere
    ) -> Tensor:  # (n, ...)
        """This process's part of the sum over all processes, in x's dtype; for `arrived`."""
        return x if self.size == 1 else _ops.reduce_scatter_tensor(x.contiguous(), "sum", self.size, self.name)

    def arrived(
        self,
        x: Tensor,  # of a collective that was started
    ) -> Tensor:
        """The same, of which later work may make use; on a GPU the host does not wait."""
        return x if self.size == 1 else _ops.wait_tensor(x)

    def all_to_all(
        self,
        x: Tensor,  # (sum of given, ...)
        given: Sequence[int],
        taken: Sequence[int],
    ) -> Tensor:  # (sum of taken, ...)
        """Give ``given[i]`` rows to process i, in their order, and take ``taken[i]`` rows from it."""
        if self.size == 1:
            return x
        return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), list(taken), list(given), self.name))


@dataclass(frozen=True)
class TensorParallelRanks:
    """`RankCollectives` of a tensor parallel group."""

    group: Group

    def gather(
        self,
        v: Tensor,  # (P, W) float32
    ) -> Tensor:  # (P, W * size)
        """See `RankCollectives.gather`."""
        pairs, width = v.shape
        parts = self.group.all_gather(v).view(self.group.size, pairs, width)
        return parts.permute(1, 2, 0).reshape(pairs, width * self.group.size)

    def sum(
        self,
        v: Tensor,  # (P, W) float32
    ) -> Tensor:  # (P, W)
        """See `RankCollectives.sum`."""
        return self.group.all_reduce(v)


class ExpertMesh:
    """Processes that share the experts of a layer.

    Attributes:
        mesh: the device mesh.
        config: this process's place in it.
        tp: those that share each expert; their tokens are the same.
        ep: those that share out the experts.

    Args:
        mesh: with dimensions ``tp``, ``ep`` or both, as of `torch.distributed.device_mesh.init_device_mesh` or a
            slice of a larger one. Processes of one ``tp`` group are best on one machine.
        fully_sharded_lora: whether tensor parallel cuts A of gate and up and B of down of adapters too, which takes
            two more collectives of a few ranks a token and a 1/tp-th of their memory.

    Raises:
        UnsupportedError: the mesh has other dimensions, or none that are named.
    """

    def __init__(self, mesh: DeviceMesh, *, fully_sharded_lora: bool = False) -> None:
        names = mesh.mesh_dim_names or ()
        if not names or not set(names) <= set(DIMENSIONS):
            raise UnsupportedError(
                "device mesh",
                got=f"dimensions {', '.join(names) or 'without names'}",
                rule="tp, ep or both",
                remedy="name them, or pass the slice mesh['ep', 'tp'] of a larger mesh",
            )
        self.mesh = mesh
        self.tp, self.ep = group_of(mesh, "tp"), group_of(mesh, "ep")
        self.config = ParallelConfig(self.tp.rank, self.tp.size, self.ep.rank, self.ep.size, fully_sharded_lora)

    def __deepcopy__(self, memo: object) -> ExpertMesh:
        """Itself: there is one set of processes, however often a config that names them is copied."""
        return self

    @property
    def ranks(self) -> list[int]:
        """Global ranks of the mesh's processes, in its order."""
        return self.mesh.mesh.flatten().tolist()

    def __str__(self) -> str:
        """Sizes, and how adapters are cut."""
        config = self.config
        lora = "fully sharded LoRA" if config.fully_sharded_lora else "plain LoRA"
        return f"ep={config.ep_size}, tp={config.tp_size}, {lora}"


def group_of(mesh: DeviceMesh, name: str | None = None) -> Group:
    """The processes of a mesh's dimension, without a name of the only one; this process alone if there is none."""
    if name is not None and name not in (mesh.mesh_dim_names or ()):
        return Group("", 0, 1)
    group = mesh.get_group(name)
    return Group(group.group_name, mesh.get_local_rank(name), group.size())
