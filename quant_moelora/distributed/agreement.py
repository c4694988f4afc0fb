"""Whether all processes of a mesh mean the same thing: an error on each of them within bounded time, and no hang.

Processes speak through the store of their process group, which serves whether or not the others have come, so that
those that do not come can be named. Collectives could only wait for them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from quant_moelora.core.errors import DistributedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.distributed.mesh import ExpertMesh
from quant_moelora.lora.bank import AdapterBank

Facts = Mapping[str, str]

TIMEOUT = timedelta(seconds=60)  # how long a process may be late, unless the caller says otherwise
_PREFIX = "quant_moelora/agree"


def layer_facts(infos: Mapping[int, MoEQuantInfo] | Mapping[str, MoEQuantInfo]) -> dict[str, str]:
    """What all processes have to say alike of the layers they hold parts of."""
    facts: dict[str, str] = {}
    for layer, info in infos.items():
        shard = info.shard
        experts, inter = (
            (shard.num_experts, shard.intermediate_size) if shard else (info.num_experts, info.intermediate_size)
        )
        facts[f"layer {layer}"] = (
            f"{experts} experts, hidden size {info.hidden_size}, intermediate size {inter}, {info.scheme_name}, "
            f"{info.activation.name}, router weight on the {info.router_weight}"
        )
    return facts


def adapter_facts(bank: AdapterBank) -> dict[str, str]:
    """What all processes have to say alike of the adapters that they hold parts of."""
    return {
        f"adapter {name}": f"slot {held.slot}, {'enabled' if held.enabled else 'disabled'}, factors {held.digest}"
        for name, held in bank.report().adapters.items()
    }


def agree(mesh: ExpertMesh, facts: Facts, timeout: timedelta = TIMEOUT) -> None:
    """Compare facts with those of all processes of the mesh; all of them call it, as often as each other.

    Args:
        mesh: the processes.
        facts: by name. The mesh's own sizes are added.
        timeout: how long a process may be late.

    Raises:
        DistributedError: facts differ, or a process did not come in time. It names the processes and what they say
            else, and is raised on all that came.
    """
    agreement = _Agreement(mesh, timeout)
    digests = agreement.exchange({"mesh": str(mesh), **facts})
    if len(set(digests.values())) > 1:
        agreement.differ(digests)


class _Agreement:
    """One call of `agree`, on one process."""

    def __init__(self, mesh: ExpertMesh, timeout: timedelta) -> None:
        group = dist.group.WORLD
        if group is None:
            raise DistributedError(
                "process group", got="none", rule="one", remedy="call torch.distributed.init_process_group first"
            )
        self._store: Any = group.get_group_store()
        self._ranks, self._timeout = mesh.ranks, timeout
        self._rank = dist.get_rank()
        # Every process counts its own calls about these processes, in the store, so that a mesh made anew goes on.
        self._about = f"{_PREFIX}/{'-'.join(map(str, self._span()))}"
        self._round = self._store.add(f"{self._about}/count/{self._rank}", 1)

    def _span(self) -> Sequence[int | str]:
        """The ranks in few characters."""
        first, last = self._ranks[0], self._ranks[-1]
        if self._ranks == list(range(first, last + 1)):
            return first, last
        return hashlib.sha256(str(self._ranks).encode()).hexdigest()[:16], len(self._ranks)

    def _key(self, what: str, rank: int, back: int = 0) -> str:
        return f"{self._about}/{self._round - back}/{what}/{rank}"

    def exchange(self, facts: Facts) -> dict[int, str]:
        """Say facts, and return every process's digest of its own."""
        text = json.dumps(facts, sort_keys=True)
        self._store.set(self._key("facts", self._rank), text)
        self._store.set(self._key("digest", self._rank), hashlib.sha256(text.encode()).hexdigest())
        keys = [self._key("digest", rank) for rank in self._ranks]
        self._wait(keys)
        digests = {rank: self._store.get(key).decode() for rank, key in zip(self._ranks, keys, strict=True)}
        if self._round > 1:  # whoever is here has read all of the round before
            for what in ("facts", "digest"):
                self._store.delete_key(self._key(what, self._rank, back=1))
        return digests

    def _wait(self, keys: Sequence[str]) -> None:
        deadline = time.monotonic() + self._timeout.total_seconds()
        missing = list(zip(self._ranks, keys, strict=True))
        while missing:
            missing = [(rank, key) for rank, key in missing if not self._store.check([key])]
            if missing and time.monotonic() > deadline:
                raise DistributedError(
                    "processes of the mesh",
                    got=f"nothing from rank {', '.join(str(rank) for rank, _ in missing)} "
                    f"in {self._timeout.total_seconds():g} s",
                    rule=f"all of {len(self._ranks)} to come to agreement {self._round}",
                    remedy="look at what those ranks printed: they ended, hang, or agree less often than the others",
                )
            if missing:
                time.sleep(0.02)

    def differ(self, digests: Mapping[int, str]) -> None:
        """Raise with what most processes say, and what others do; the lowest rank's word breaks a tie."""
        usual, _ = Counter(digests.values()).most_common(1)[0]
        speaker = next(rank for rank in self._ranks if digests[rank] == usual)
        expected = self._facts(speaker)
        found: list[str] = []
        for rank in self._ranks:
            if digests[rank] != usual:
                own = self._facts(rank)
                names = [name for name in {**expected, **own} if own.get(name) != expected.get(name)]
                found += [
                    f"rank {rank} has {name}: {own.get(name, 'none')}, and not {expected.get(name, 'none')}"
                    for name in names
                ]
        raise DistributedError(
            "facts of the mesh's processes",
            got="; ".join(found),
            rule=f"what rank {speaker} says",
            remedy="start all processes with the same model, mesh and adapters, and change adapters on all of them",
        )

    def _facts(self, rank: int) -> dict[str, str]:
        return json.loads(self._store.get(self._key("facts", rank)).decode())
