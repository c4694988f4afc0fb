"""What four processes do together, each on its own: layers in parallel, beside the same layer in one process.

All of it is one start of four processes, since importing torch takes longer than everything else here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from quant_moelora.core.errors import QuantMoELoRAError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.distributed import layer as layer_module
from quant_moelora.distributed.agreement import adapter_facts, agree, layer_facts
from quant_moelora.distributed.layer import DistributedExperts, Exchange
from quant_moelora.distributed.mesh import ExpertMesh
from quant_moelora.layer import MoEExperts
from quant_moelora.lora.adapter_file import LayerFactors
from quant_moelora.lora.bank import AdapterBank
from tests.adapters import random_factors
from tests.builders import layer, scheme

WORLD = 4
TIMEOUT = timedelta(seconds=300)  # of every collective: a busy machine is slow
SHORT = timedelta(seconds=2)  # within which a process that is gone is missed
HIDDEN, TOP_K, EXPERTS = 256, 3, 6
UNEVEN = (5, 0, 3, 1)  # tokens of each process
U = 2.0**-24  # largest relative error of one rounding to float32


@dataclass(frozen=True)
class Case:
    """A layer in parallel. Processes that are no part of a mesh dimension each do the same as their neighbours.

    Attributes:
        dims: names of the dimensions of a mesh of 4, or of 2 x 2, that the layer is shared over.
        exchange: as of `DistributedExperts`.
        rows: as of `DistributedExperts`.
        pieces: its ``microbatch_rows``.
        fully: whether LoRA is fully sharded.
        lora: whether adapters are attached.
        quant: the scheme, or a dtype.
        layer: options of `tests.builders.layer`.
    """

    dims: tuple[str, ...]
    exchange: Exchange = "none"
    rows: int | None = None
    pieces: int | None = None
    fully: bool = False
    lora: bool = True
    quant: QuantScheme | torch.dtype = scheme(4, 32)  # noqa: RUF009  # frozen
    layer: tuple[tuple[str, Any], ...] = ()


FOUR_TP, FOUR_EP, TWO_TP, TWO_EP, BOTH = ("tp4",), ("ep4",), ("tp",), ("ep",), ("ep", "tp")
ACT_ORDER, INPUT = (("act_order", True),), (("router_weight", "input"), ("bias", True))
CASES: dict[str, Case] = {
    "tp2-base": Case(TWO_TP, lora=False),
    "tp2-plain": Case(TWO_TP, layer=ACT_ORDER),
    "tp2-fully": Case(TWO_TP, fully=True, quant=scheme(8, None, symmetric=False), layer=INPUT),
    "tp4-plain": Case(FOUR_TP, quant=torch.float32, layer=INPUT),
    "tp4-fully": Case(FOUR_TP, fully=True, layer=ACT_ORDER),
    "tp2-pieces": Case(TWO_TP, pieces=2),
    "ep2-none": Case(TWO_EP, layer=INPUT),
    "ep4-base": Case(FOUR_EP, "all_to_all", lora=False),
    "ep4-gather": Case(FOUR_EP, "all_gather", layer=ACT_ORDER),
    "ep4-rows": Case(FOUR_EP, "all_gather", rows=7),
    "ep4-pieces": Case(FOUR_EP, "all_gather", rows=7, pieces=2),
    "ep4-all-to-all": Case(FOUR_EP, "all_to_all", quant=torch.float32, layer=INPUT),
    "both-none": Case(BOTH, fully=True),
    "both-pieces": Case(BOTH, fully=True, pieces=1),
    "both-plain": Case(BOTH, "all_to_all", layer=ACT_ORDER),
    "both-fully-gather": Case(BOTH, "all_gather", fully=True, layer=ACT_ORDER),
    "both-fully-all-to-all": Case(BOTH, "all_to_all", fully=True, layer=INPUT),
}


@dataclass(frozen=True)
class Meshes:
    """One line of four processes under two names, and a square of them."""

    tp4: DeviceMesh
    ep4: DeviceMesh
    square: DeviceMesh

    def of(self, dims: tuple[str, ...]) -> DeviceMesh:
        """The mesh that a case names."""
        if dims in (FOUR_TP, FOUR_EP):
            return getattr(self, dims[0])
        return self.square if len(dims) == 2 else self.square[dims[0]]


def whole_layer(case: Case) -> MoEQuantInfo:
    """The layer of a case, the same in every process."""
    torch.manual_seed(1)
    return layer(case.quant, experts=EXPERTS, hidden=HIDDEN, inter=4 * 64 + 32, **dict(case.layer)).info


def adapters(info: MoEQuantInfo) -> dict[str, LayerFactors]:
    """Adapters of different ranks: of everything, of some experts with one A for two, and of little."""
    return {
        "a": random_factors(info, {"gate": 3, "up": 5, "down": 2}, seed=1),
        "b": random_factors(info, {"gate": 4, "up": 4, "down": 4}, experts=[0, 3, 5], shared=True, seed=2),
        "c": random_factors(info, {"up": 1, "down": 1}, experts=[1, 2, 4], seed=3),
    }


def batch(rank: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of a process; those of process 0 alone use adapter 2, and process 3's use none."""
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(count, HIDDEN, generator=generator)
    ids = torch.rand(count, EXPERTS, generator=generator).topk(TOP_K).indices
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = EXPERTS + 3  # nobody's
    weights = torch.rand(count, TOP_K, generator=generator) + 0.25
    slots = torch.randint(-1, 2, (count,), generator=generator)
    slots = torch.where(torch.arange(count) % 2 == 0, 2, slots) if rank == 0 else slots
    return x, ids, weights, slots if rank != 3 else torch.full_like(slots, -1)


def compared(case: Case, mesh: DeviceMesh, *, wrong: bool = False) -> str:
    """Compute a case in parallel and alone; what is wrong with it, or "".

    Args:
        case: the case.
        mesh: its processes.
        wrong: give the layer alone other adapters, which has to be seen.
    """
    whole, of = whole_layer(case), ExpertMesh(mesh, fully_sharded_lora=case.fully)
    part = whole.part(of.config)
    torch.manual_seed(dist.get_rank())  # nobody relies on the others' random numbers
    alone = MoEExperts(whole, backend="reference")
    shared = DistributedExperts(
        part, of, exchange=case.exchange, rows=case.rows, microbatch_rows=case.pieces, backend="reference"
    )
    if case.lora:
        held = adapters(whole)
        banks = [AdapterBank({0: info}, torch.float32, max_adapters=4, max_rank=5) for info in (whole, part)]
        for name in held:
            banks[1].add(name, {0: held[name]})
            banks[0].add(name, {0: held["b" if wrong and name == "c" else name]})
        for module, bank in zip((alone, shared), banks, strict=True):
            module.attach(bank.contexts[0])
    # Without an exchange all have the same tokens, and so have the processes of a tensor parallel group.
    own = 0 if case.exchange == "none" else of.ep.rank
    x, ids, weights, slots = batch(own, UNEVEN[own])
    given = slots if case.lora and own != 3 else None  # None for no adapters
    with torch.no_grad():
        found, expected = shared(x, ids, weights, given), alone(x, ids, weights, given)
        bound = bounds(whole, adapters(whole) if case.lora else {}, (x, ids, weights, slots), of)
    over = (found.double() - expected.double()).abs() > bound
    return f"{int(over.sum())} of {over.numel()} outputs are off" if bool(over.any()) else ""


def compared_by_exchange(meshes: Meshes, spared: int) -> tuple[str, bool]:
    """`compared` where all-to-all has to spare so many bytes, and whether it was what ``auto`` took."""
    with (
        patch.object(layer_module, "_SPARED_BYTES", spared),
        patch.object(layer_module, "deliver", side_effect=layer_module.deliver) as deliver,
    ):
        return compared(Case(FOUR_EP, "auto"), meshes.ep4), deliver.called


def gathered(mesh: DeviceMesh) -> list[bool]:
    """Whether tensors that are gathered at once, each of a dtype of its own, are those of all processes."""
    group = ExpertMesh(mesh).ep

    def held(rank: int) -> list[Tensor]:
        """A process's; the integers are in no float32."""
        generator = torch.Generator().manual_seed(rank)
        floats = torch.randn(2, 5, generator=generator)
        return [floats.bfloat16(), torch.tensor([[2**24 + 1 + 2 * rank] * 3] * 2, dtype=torch.int32), floats.exp()]

    found = [group.arrived(x) for x in group.start_all_gather(held(group.rank))]
    expected = [torch.cat(parts) for parts in zip(*map(held, range(group.size)), strict=True)]
    return [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]


def bounds(
    info: MoEQuantInfo,
    held: Mapping[str, LayerFactors],
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    mesh: ExpertMesh,
) -> Tensor:  # (M, H) float64
    """What one more reduction in float32 may change of each output.

    The reference backend sums products in float64 and rounds once, so that parts of y differ from y by a rounding each
    and their sum by one more for each part, of values that are at most S, the sum of all products' sizes. Adapters'
    shrinks and expands are float32 sums of n terms, which their order may change by 2 n U of their terms' sizes; what
    it changes of gate and up goes on to h, since |silu'| <= 1.1, and from h to y.
    """
    gate, up, down = info.dequantize()
    assert gate is not None
    biases = [torch.zeros(()) if bias is None else bias for bias in info.biases()]
    names, config = list(held), mesh.config
    parts = TOP_K + config.tp_size * config.ep_size + 3
    out = torch.zeros(tokens[0].shape, dtype=torch.float64)
    for i, (x, ids, weights, slot) in enumerate(zip(*tokens, strict=True)):
        for expert, weight in zip(ids.tolist(), weights.double(), strict=True):
            if expert >= EXPERTS:
                continue
            factors = held[names[int(slot)]] if int(slot) >= 0 and held else {}
            x64 = x.double()
            values, sizes = [], []
            for which, (projection, w) in enumerate((("gate", gate), ("up", up))):
                bias = biases[0][expert, which].double() if biases[0].ndim else 0.0
                value, size = w[expert].double() @ x64 + bias, torch.zeros(w.shape[1], dtype=torch.float64)
                factor: Any = factors.get((expert, projection))  # pyright: ignore[reportArgumentType]
                if factor is not None:
                    a, b = factor.a.double(), factor.b.double() * factor.scaling
                    value, size = value + b @ (a @ x64), b.abs() @ (a.abs() @ x64.abs())
                values.append(value * (weight if info.router_weight == "input" else 1.0))
                sizes.append(size * (weight if info.router_weight == "input" else 1.0))
            silu = torch.nn.functional.silu(values[0])
            h = silu * values[1]
            moved = (1.1 * values[1].abs() * sizes[0] + silu.abs() * sizes[1]) * 2 * (HIDDEN + 10) * U
            # One rounding of h to float32 may go the other way, where gate or up moved.
            moved = torch.where(moved > 0, moved + 2 * U * h.abs(), moved)
            absolute = down[expert].double().abs()
            size = absolute @ h.abs() + (biases[1][expert].double().abs() if biases[1].ndim else 0.0)
            change = absolute @ moved
            factor = factors.get((expert, "down"))
            if factor is not None:
                a, b = factor.a.double().abs(), factor.b.double().abs() * factor.scaling
                delta = b @ (a @ h.abs())
                size, change = size + delta, change + b @ (a @ moved) + delta * 2 * (h.numel() + 10) * U
            scale = 1.0 if info.router_weight == "input" else weight
            out[i] += scale * (change + parts * U * size)
    return out


def whole_models(meshes: Meshes) -> dict[str, str]:
    """A model that real tools wrote, loaded by two processes and attached to, beside one process's."""
    if dist.get_rank() > 1:
        return {}
    import quant_moelora as qm

    golden = Path(__file__).parents[1] / "golden"
    path = golden / "checkpoints/base-mixtral-h128-i128"
    held = {"a": golden / "adapters/lora-tp-mixtral-r4"}
    ids = torch.arange(24).view(2, 12) * 7 % 200
    logits: list[Tensor] = []
    for mesh in (None, meshes.square["tp"]):
        model: Any = qm.from_pretrained(path, dtype=torch.float32, device_mesh=mesh, backend="reference")
        qm.attach_adapters(model, held)
        with torch.no_grad():
            logits += [model(ids).logits, model(ids, adapter_names=["a", "__base__"]).logits]
    alone, shared = logits[:2], logits[2:]
    # Sums of 128 columns in two parts, each rounded to float32, through two layers and a norm each.
    off = [float((one - two).abs().max() / two.abs().max()) for one, two in zip(shared, alone, strict=True)]
    changed = float((alone[1][0] - alone[0][0]).abs().max() / alone[0].abs().max())
    return {"off": "" if max(off) < 100 * U else str(off), "changed": "" if changed > 1e-3 else str(changed)}


def planned_models(rank: int, folder: Path) -> dict[str, Any]:
    """Models spread by transformers' plans, which are for all processes that there are: two, before the others come."""
    if rank > 1:
        return {}
    from tests.distributed import plans

    return {"plans": plans.run(rank, folder, TIMEOUT)}


def disagreements(meshes: Meshes) -> dict[str, str]:
    """What `agree` says of processes that differ, by what they differ in."""
    rank, line = dist.get_rank(), ExpertMesh(meshes.ep4)
    case = Case(FOUR_EP)
    whole = whole_layer(case)
    part = whole.part(line.config)
    facts = layer_facts({0: part})

    def said(mesh: ExpertMesh, told: Mapping[str, str]) -> str:
        try:
            agree(mesh, told, TIMEOUT)
        except QuantMoELoRAError as error:
            return str(error)
        return ""

    found = {"none": said(line, facts)}
    other = replace(whole, router_weight="input") if rank == 2 else whole
    found["layer"] = said(line, layer_facts({0: other.part(line.config)}))
    found["mesh"] = said(ExpertMesh(meshes.ep4, fully_sharded_lora=rank == 1), facts)
    bank = AdapterBank({0: part}, torch.float32, max_adapters=4, max_rank=5)
    held = adapters(whole)
    bank.add("a", {0: held["a"]})
    found["same adapters"] = said(line, facts | adapter_facts(bank))
    if rank != 3:
        bank.add("c", {0: held["c"]})  # of which not every process holds a factor
    found["missing adapter"] = said(line, facts | adapter_facts(bank))
    if rank == 3:
        bank.add("c", {0: random_factors(whole, {"up": 1, "down": 1}, experts=[1, 2, 4], seed=4)})
    found["other factors"] = said(line, facts | adapter_facts(bank))
    found["again"] = said(line, facts)
    return found


def deaths(meshes: Meshes) -> dict[str, str]:
    """What the others say when process 1 is gone: of agreement, and in a forward."""
    line = ExpertMesh(meshes.ep4)
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(0)
    found: dict[str, str] = {}
    case = Case(FOUR_EP, "all_gather", lora=False)
    layer = DistributedExperts(whole_layer(case).part(line.config), line, exchange="all_gather", backend="reference")

    def said(what: str, work: Callable[[], object]) -> None:
        try:
            work()
        except (QuantMoELoRAError, RuntimeError) as error:
            found[what] = f"{type(error).__name__}: {error}"

    group = dist.group.WORLD
    assert group is not None
    store: Any = group.get_group_store()
    store.set(f"alive/{dist.get_rank()}", "yes")  # so that all come at one time, also on a busy machine
    store.wait([f"alive/{rank}" for rank in (0, 2, 3)], TIMEOUT)
    said("agree", lambda: agree(line, {}, SHORT))
    said("forward", lambda: layer(*batch(0, 2)[:3]))
    return found


def run(rank: int, folder: str) -> None:
    """One of the processes: do everything and leave what was found in ``folder``."""
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers would spread a model over GPUs that are there
    found = planned_models(rank, Path(folder))
    store = dist.FileStore(f"{folder}/store", WORLD)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    line = {name: init_device_mesh("cpu", (WORLD,), mesh_dim_names=(name[:2],)) for name in ("tp4", "ep4")}
    meshes = Meshes(**line, square=init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp")))
    found |= {name: compared(case, meshes.of(case.dims)) for name, case in CASES.items()}
    found["auto"] = [compared_by_exchange(meshes, spared) for spared in (0, layer_module._SPARED_BYTES)]
    found["gathered"] = gathered(meshes.ep4)
    found["wrong"] = {
        name: compared(CASES[name], meshes.of(CASES[name].dims), wrong=True) for name in ("ep4-gather", "tp2-plain")
    }
    found["models"] = whole_models(meshes)
    found["disagreements"] = disagreements(meshes)
    torch.save(found, Path(folder) / f"{rank}.pt")
    found["deaths"] = deaths(meshes)
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)  # the others' sockets are gone, for which a process group would wait
