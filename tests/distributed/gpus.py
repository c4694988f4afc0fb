"""What processes do on GPUs: one a GPU with NCCL, or all on one GPU with gloo; each beside the layer alone.

All of it is one start of processes, since importing torch and starting NCCL takes longer than everything else here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.shard import ParallelConfig
from quant_moelora.distributed.layer import DistributedExperts, Exchange
from quant_moelora.distributed.mesh import ExpertMesh, Group
from quant_moelora.kernels.common.timing import graph_of
from quant_moelora.layer import MoEExperts
from quant_moelora.lora.adapter_file import LayerFactors
from quant_moelora.lora.bank import AdapterBank
from tests.adapters import attention_lora, random_factors
from tests.builders import layer, same_bits, scheme

TIMEOUT = timedelta(seconds=180)
HIDDEN, INTER, TOP_K, EXPERTS, SLOTS, LARGEST = 512, 4 * 64 + 32, 3, 6, 4, 24
DTYPE = torch.bfloat16
BACKEND = "marlin"
TOKENS = (70, 0, 300, 5)  # of each process, repeated for more of them
# Relative RMS of one rounding to bfloat16 is 2**-9 / sqrt(3) at most; parts and what they are the sums of are rounded,
# and h, where shares of v are added in another order: some four roundings, of parts as large as their sum.
ROUNDINGS = 4 * 2.0**-9
EFFECT = 10 * ROUNDINGS  # of adapters, at least


@dataclass(frozen=True)
class Case:
    """A layer in parallel; see `tests.distributed.processes.Case`."""

    dims: tuple[str, ...]
    exchange: Exchange = "none"
    rows: int | None = None
    pieces: int | None = None
    fully: bool = False


CASES = {
    "tp-plain": Case(("tp",)),
    "tp-pieces": Case(("tp",), pieces=16),
    "tp-fully": Case(("tp",), fully=True),
    "ep-none": Case(("ep",)),
    "ep-gather": Case(("ep",), "all_gather"),
    "ep-rows": Case(("ep",), "all_gather", rows=300),
    "ep-pieces": Case(("ep",), "all_gather", rows=300, pieces=64),
    "ep-all-to-all": Case(("ep",), "all_to_all"),
    "both-plain": Case(("ep", "tp"), "all_gather"),
    "both-fully": Case(("ep", "tp"), "all_to_all", fully=True),
}
SHARING = ("tp-plain", "tp-fully", "ep-gather", "both-fully")  # few: each process compiles for parts of its own
REPLAYED = ("tp-plain", "tp-fully", "ep-none", "ep-rows", "ep-pieces")


class HostGroup(Group):
    """A group that speaks through the host: torch's gloo ends the process where it should gather a GPU's tensors."""

    def arrived(self, x: Tensor) -> Tensor:
        """What came to the GPU has arrived."""
        return x if x.is_cuda else super().arrived(x)

    def start_all_reduce(self, x: Tensor) -> Tensor:
        """Start and end it."""
        return self.arrived(super().start_all_reduce(x.cpu())).to(x.device)

    def all_gather(self, x: Tensor) -> Tensor:
        """As on GPUs."""
        return super().all_gather(x.cpu()).to(x.device)

    def start_all_gather(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Start and end it."""
        device = tensors[0].device
        return [self.arrived(x).to(device) for x in super().start_all_gather([x.cpu() for x in tensors])]

    def start_reduce_scatter(self, x: Tensor) -> Tensor:
        """Start and end it."""
        return self.arrived(super().start_reduce_scatter(x.cpu())).to(x.device)

    def all_to_all(self, x: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """As on GPUs."""
        return super().all_to_all(x.cpu(), given, taken).to(x.device)


def mesh_of(case: Case, device: torch.device, *, host: bool = False) -> ExpertMesh:
    """All processes, in one dimension, or two tensor parallel ones of each part of the experts."""
    world = dist.get_world_size()
    sizes = (world,) if len(case.dims) == 1 else (world // 2, 2)
    mesh = ExpertMesh(init_device_mesh(device.type, sizes, mesh_dim_names=case.dims), fully_sharded_lora=case.fully)
    if host:
        mesh.tp, mesh.ep = (HostGroup(group.name, group.rank, group.size) for group in (mesh.tp, mesh.ep))
    return mesh


def whole_layer() -> MoEQuantInfo:
    """The same in every process."""
    torch.manual_seed(1)
    return layer(scheme(4, 32), experts=EXPERTS, hidden=HIDDEN, inter=INTER, act_order=True).info


def factors(info: MoEQuantInfo, seed: int) -> dict[str, LayerFactors]:
    """Adapters of different ranks: of everything, and of some experts and projections."""
    return {
        "a": random_factors(info, {"gate": 16, "up": 5, "down": 24}, seed=seed),
        "b": random_factors(info, {"up": 9, "down": 3}, experts=[0, 2, 5], seed=seed + 1),
    }


def bank_of(info: MoEQuantInfo, whole: MoEQuantInfo, seed: int) -> AdapterBank:
    """The whole layer's adapters, or their shares, in an arena of one size."""
    bank = AdapterBank({0: info}, DTYPE, max_adapters=SLOTS, max_rank=LARGEST)
    for name, held in factors(whole, seed).items():
        bank.add(name, {0: held})
    return bank


def batch(rank: int, count: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of a process; those of process 0 alone use slot 1."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(count, HIDDEN, generator=generator).to(DTYPE)
    ids = torch.rand(count, EXPERTS, generator=generator).topk(TOP_K).indices
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = EXPERTS + 3  # nobody's
    weights = torch.rand(count, TOP_K, generator=generator) + 0.25
    slots = torch.randint(-1, 2 if rank == 0 else 1, (count,), generator=generator, dtype=torch.int32)
    return x.to(device), ids.to(device), weights.to(device), slots.to(device)


def compared(case: Case, device: torch.device, *, host: bool = False) -> str:
    """Compute a case in parallel and alone; what is wrong with it, or ""."""
    mesh, whole = mesh_of(case, device, host=host), whole_layer()
    part = whole.part(mesh.config).to(device)
    alone = MoEExperts(whole.to(device), BACKEND)
    shared = DistributedExperts(
        part, mesh, exchange=case.exchange, rows=case.rows, microbatch_rows=case.pieces, backend=BACKEND
    )
    own = 0 if case.exchange == "none" else mesh.ep.rank
    tokens = batch(own, TOKENS[own % len(TOKENS)], device)
    base = alone(*tokens[:3])
    for module, info in ((alone, whole.to(device)), (shared, part)):
        module.attach(bank_of(info, whole, 1).contexts[0])
    found, expected = shared(*tokens), alone(*tokens)
    if not found.shape[0]:
        return ""
    off, effect = relative(found, expected), relative(base, expected)
    wrong = [f"off by {off:.2e}"] if off > ROUNDINGS else []
    wrong += [f"adapters change {effect:.2e} only"] if effect < EFFECT else []
    alike = mesh.config.world_size == 2 and not case.fully and not case.pieces  # pieces may have other tiles
    if alike and not same_bits(found, summed(whole, mesh.config, tokens)):
        wrong.append("other bits than the sum of both parts")
    return ", ".join(wrong)


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative RMS."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def summed(whole: MoEQuantInfo, config: ParallelConfig, tokens: tuple[Tensor, ...]) -> Tensor:
    """The parts of all processes, computed here, added up and rounded once; of two, whose order does not count."""
    x, ids, weights, slots = tokens
    total = torch.zeros(x.shape, device=x.device)
    for place in range(config.world_size):
        of = replace(config, tp_rank=place) if config.tp_size > 1 else replace(config, ep_rank=place)
        info = whole.part(of).to(x.device)
        assert info.shard is not None
        # A part's experts alone, as MoEExperts has no idea of parts.
        experts = MoEExperts(replace(info, shard=None), BACKEND)
        experts.attach(replace(bank_of(info, whole, 1).contexts[0], shard=None))
        total += experts(x, ids - info.shard.experts.begin, weights, slots).float()
    return total.to(x.dtype)


def replayed(case: Case, device: torch.device) -> str:
    """A graph with NCCL in it, replayed with other tokens, routings and adapters, against eager mode; "" if right."""
    mesh, whole = mesh_of(case, device), whole_layer()
    part = whole.part(mesh.config).to(device)
    options: dict[str, Any] = {"exchange": case.exchange, "rows": case.rows, "microbatch_rows": case.pieces}
    captured, eager = (DistributedExperts(part, mesh, **options, backend=BACKEND) for _ in range(2))
    own = 0 if case.exchange == "none" else mesh.ep.rank
    static, held = batch(own, 64, device), bank_of(part, whole, 1)
    captured.attach(held.contexts[0])
    kept: list[Tensor] = []
    graph = graph_of([lambda: kept.append(captured(*static))])
    out, answers, wrong = kept[-1], list[Tensor](), list[str]()
    for seed in range(3):
        for name, of in factors(whole, 10 * seed).items():
            held.replace(name, {0: of})
        for tensor, new in zip(static, batch(own, 64, device, seed), strict=True):
            tensor.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        eager.attach(bank_of(part, whole, 10 * seed).contexts[0])
        # NCCL may add up the parts of more than two processes in another order when it is captured.
        expected = eager(*static)
        alike = same_bits(out, expected) if dist.get_world_size() == 2 else relative(out, expected) < ROUNDINGS
        wrong += [] if alike else [f"replay {seed} is not what eager mode computes"]
        answers.append(out.clone())
    if same_bits(answers[0], answers[1]):
        wrong.append("nothing changed")
    return ", ".join(wrong)


def whole_models(device: torch.device, folder: Path) -> str:
    """A model whose experts are shared, and one by transformers' own plan, against one GPU's; "" if right.

    Tokens are those that `generate` makes by replaying graphs; under a plan, whose sums are rounded to float16 for each
    part, logits are compared, also with an adapter of attention, whose outputs and inputs the plan cuts.
    """
    import quant_moelora as qm
    from tests.integrations.models import GPTQ, A, B, attention_adapter, generate, load, logits, random_ids

    attention = attention_adapter(folder, more=attention_lora({"o_proj": (128, 128)}, seed=2))

    def served(**kwargs: Any) -> Any:
        model = load(GPTQ, dtype=torch.float16, **kwargs)
        qm.attach_adapters(model, {"a": A, "b": B, "attention": attention})
        return model

    def made(model: Any) -> list[Tensor]:
        names = ["a", "b", "__base__"], ["b", "__base__", "a"]
        return [generate(model, list(prompts), n, 8, cache_implementation="static").tokens for n in names]

    world, prompts = dist.get_world_size(), random_ids(3, 9)
    alone = served(device_map=device)
    one = made(alone)
    shared = served(device_map=device, device_mesh=init_device_mesh("cuda", (world,), mesh_dim_names=("ep",)))
    if not all(map(torch.equal, one, made(shared))):
        return "other tokens than one GPU's"
    if torch.equal(*one):
        return "adapters do not differ"
    if world > 2:
        return ""  # there are two heads of keys and values
    answers = [logits(model, prompts, ["a", "attention", "__base__"]) for model in (alone, served(tp_plan="auto"))]
    off = relative(answers[1], answers[0])
    return "" if off < 2.0**-8 else f"logits under a plan are off by {off:.2e}"


def run(rank: int, world: int, folder: str, share: bool) -> None:
    """One of the processes: do everything and leave what was found in ``folder``.

    Where processes ``share`` a GPU they wait on the host: no graph is captured, and `generate` would capture some.
    """
    place = 0 if share else rank
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(place), "WORLD_SIZE": str(world)}  # as torchrun does
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", world)  # pyright: ignore[reportPrivateImportUsage]
    transport = "gloo" if share else "cpu:gloo,cuda:nccl"
    dist.init_process_group(transport, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    found: dict[str, str] = {}
    with torch.no_grad():
        for name in SHARING if share else CASES:
            found[name] = compared(CASES[name], device, host=share)
        for name in () if share else REPLAYED:
            found[f"graph of {name}"] = replayed(CASES[name], device)
    if not share:
        found["models"] = whole_models(device, Path(folder) / f"attention-{rank}")
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
