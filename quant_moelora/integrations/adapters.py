"""attach_adapters, detach_adapters: LoRA on a loaded model, chosen row by row with ``adapter_names``.

Factors of routed experts go into a bank, those of routers into hooks behind them. PEFT serves the plain
linear layers (attention and others) with its own mixed-batch forward, which takes the same names.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.core.routing import BASE_SLOT
from quant_moelora.distributed.agreement import adapter_facts, agree
from quant_moelora.distributed.layer import DistributedExperts
from quant_moelora.integrations.linears import check_linears, eject_linears, find_module, inject_linears, lead
from quant_moelora.integrations.routers import attach_routers, detach_routers, on_device, routers_of
from quant_moelora.integrations.session import BASE_NAME, AdapterSession
from quant_moelora.integrations.transformers import FusedExperts, experts_of
from quant_moelora.layer import MoEExperts
from quant_moelora.loaders.checkpoint import resolve_checkpoint
from quant_moelora.loaders.families import ExpertsSpec
from quant_moelora.loaders.names import model_names
from quant_moelora.lora.adapter_file import Adapter, Factor, LayerFactors, load_adapter
from quant_moelora.lora.bank import AdapterBank
from quant_moelora.lora.combine import combine

Factors = dict[int, LayerFactors]  # of an adapter, by layer


def attach_adapters(
    model: nn.Module,
    adapters: Mapping[str, str | Path],
    *,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    capacity_bytes: int | None = None,
) -> None:
    """Attach adapters to a model of `from_pretrained`, in addition to those it has.

    Afterwards ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` take one name a row,
    ``__base__`` for none. Without ``adapter_names`` every row uses the active adapters, of which there are none unless
    ``set_adapter`` makes some: else the base model.

    The experts' adapters stand in an `AdapterBank`. It has just the room that they need, and others that are attached
    later get a new one; unless the first call, which may attach none, says how much room there is to be. Then what is
    attached and detached later changes no address, and a captured CUDA graph serves it.

    Args:
        model: the model; it must be where it is to stay.
        adapters: folder (or hub repository) of each adapter, by the name to give it.
        max_adapters: how many adapters may have factors of experts at one time.
        max_rank: the largest rank of these factors.
        capacity_bytes: of all these factors together; None for ``max_adapters`` of ``max_rank`` on everything.

    Raises:
        AdapterError: a name is taken, an adapter does not fit the model, or there is no room for it; then none of them
            is attached. Or the bank's size is given in part, or not by the first call.
        BackendError: a CUDA graph was captured without adapters; then none is attached either.
        UnsupportedError: the model is not one of `from_pretrained`.
        DistributedError: processes that share the model's experts do not attach the same.
    """
    held = adapters_of(model)
    size = held.size(max_adapters, max_rank, capacity_bytes)
    loaded: dict[str, Adapter] = {}
    for name, path in adapters.items():
        held.check_name(name)
        loaded[name] = load_adapter(resolve_checkpoint(path), held.specs)
    held.attach(loaded, size)
    held.agree()


def detach_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Detach adapters from a model. Their names and their room are free again; the addresses of others stay.

    Args:
        model: the model.
        names: attached adapters.

    Raises:
        AdapterError: one is not attached; then none of them is detached.
        UnsupportedError: the model is not one of `from_pretrained`.
    """
    held, names = adapters_of(model), list(dict.fromkeys(names))
    held.check_attached("detaching adapters", names)
    for name in names:
        eject_linears(held.model, name)
        held.drop(name)
    held.agree()


@contextmanager
def adapter_context(
    model: nn.Module, adapter_names: Sequence[str], lengths: Sequence[int] | Tensor | None = None
) -> Generator[None]:
    """Choose adapters for all forwards within the context, also where several sequences are packed into one row.

    With ``lengths`` a forward takes one row, which holds the sequences one after the other, and each has a name.
    Experts, routers and linear layers follow. That the sequences do not see one another is the caller's care:
    transformers keeps them apart by position ids that begin at 0 with each, without an attention mask and with
    ``use_cache=False``.

    Args:
        model: a model of `from_pretrained`, or PEFT's model around it.
        adapter_names: one a row, or one a sequence; ``__base__`` for none.
        lengths: (sequences,) int, tokens of each sequence, whose sum is that of the row; they are read on the host.

    Raises:
        AdapterError: an unknown name, or not as many names as lengths; in a forward, lengths that are not its row's, or
            other names besides.
        UnsupportedError: the model is not one of `from_pretrained`.
    """
    held = adapters_of(model)
    if isinstance(lengths, Tensor):
        lengths = [int(length) for length in lengths.tolist()]
    with held.session.use(adapter_names, lengths):
        yield


def adapters_of(model: nn.Module) -> MoEAdapters:
    """The adapters of a model of `from_pretrained`, or of PEFT's model around it; UnsupportedError if it is none."""
    for module in model.modules():
        if isinstance(module, MoEAdapters):
            return module
    raise UnsupportedError(
        f"model {type(model).__name__}",
        got="no experts of this library",
        rule="a model loaded by quant_moelora.from_pretrained",
        remedy="load the model with it",
    )


class MoEAdapters(nn.Module, BaseTunerLayer):
    """The adapters of a model: for PEFT and transformers, one more layer of LoRA, which they switch as all others.

    It is a module of the model, without parameters: factors of experts are in the bank, those of routers with these.

    Attributes:
        session: which of them the rows of a forward use.
        held: the attached adapters, in host memory, by name.
        expected: adapters that PEFT has announced and not yet brought, and whether each is to be active then.
    """

    adapter_layer_names = ("lora_A",)  # where PEFT looks for names

    def __init__(self, model: PreTrainedModel, session: AdapterSession) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict()
        self._active_adapter = []
        self.session = session
        self.held: dict[str, Adapter] = {}
        self.expected: dict[str, bool] = {}
        self._model = (model,)  # no submodule
        self._bank: AdapterBank | None = None
        self._fixed = False  # whether the bank was made for adapters to come; else it is made anew for each attachment
        self._combined: dict[str, Factors] = {}  # of the active adapters together, under the names of all of them

    @property
    def model(self) -> PreTrainedModel:
        """The model whose adapters these are."""
        return self._model[0]

    @property
    def bank(self) -> AdapterBank | None:
        """Where the factors of experts stand; None if there are none."""
        return self._bank

    @property
    def experts(self) -> list[FusedExperts]:
        """The model's experts, layer by layer."""
        return list(experts_of(self.model).values())

    @property
    def specs(self) -> list[ExpertsSpec]:
        """What they are."""
        return [module.spec for module in self.experts]

    def agree(self) -> None:
        """Raise DistributedError unless all processes that share the experts have the same adapters."""
        moe = self.experts[0].moe
        if isinstance(moe, DistributedExperts) and self._bank is not None:
            agree(moe.mesh, adapter_facts(self._bank))

    def check_name(self, name: str) -> None:
        """Raise AdapterError unless an adapter can have this name."""
        # PEFT holds adapters in ModuleDicts, which have attributes of their own. Dots join names of a combination.
        if name in self.held or name == BASE_NAME or not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise AdapterError(
                "adapter name",
                got=repr(name),
                rule=f"a new name without dots, other than {BASE_NAME} (attached: {', '.join(self.held) or 'none'}) "
                "and the attributes of a torch module",
                remedy="choose another name",
            )

    def check_attached(self, what: str, names: Iterable[str]) -> None:
        """Raise AdapterError if one of the names is not attached."""
        unknown = [name for name in names if name not in self.held]
        if unknown:
            raise AdapterError(
                what,
                got=f"unknown {', '.join(unknown)}",
                rule=f"attached ones: {', '.join(self.held) or 'none is'}",
                remedy="correct the name",
            )

    def size(self, max_adapters: int | None, max_rank: int | None, capacity_bytes: int | None) -> dict[str, int | None]:
        """Arguments for a bank of the size that the caller asks for; none if no size is given.

        Raises:
            AdapterError: it is given in part, or the model has its bank.
        """
        given = {"max_adapters": max_adapters, "max_rank": max_rank, "capacity_bytes": capacity_bytes}
        named = [f"{name}={value}" for name, value in given.items() if value is not None]
        if named and (max_adapters is None or max_rank is None or self._bank is not None):
            raise AdapterError(
                "size of the adapter bank",
                got=", ".join(named) + ("" if self._bank is None else " for a model that has its bank"),
                rule="max_adapters and max_rank, at the first attach_adapters of a model",
                remedy="give both at first, or neither",
            )
        return given if named else {}

    def attach(self, adapters: Mapping[str, Adapter], size: Mapping[str, int | None] | None = None) -> None:
        """Attach adapters; no other ones become active by that.

        Args:
            adapters: by name, as they are in their files.
            size: of `size`.

        Raises:
            AdapterError, BackendError: see `attach_adapters`; then none is attached.
        """
        routers = routers_of(self.model, self.specs)
        adapters = {name: _as_in_model(adapter, self.model) for name, adapter in adapters.items()}
        for name, adapter in adapters.items():
            self.check_name(name)
            check_linears(self.model, adapter, routers)
        factors = {name: adapter.layers for name, adapter in adapters.items()}
        with ExitStack() as undo:
            if self._fixed or size:
                self._add_to_fixed(factors, size or {}, undo)
            elif factors:
                self._replace_bank({**self._factors(), **factors}, undo)
            try:
                for name, adapter in adapters.items():
                    undo.callback(eject_linears, self.model, name)
                    linears = {n: f for n, f in adapter.linears.items() if n not in routers}
                    inject_linears(self.model, name, adapter, linears)
            finally:
                lead(self.model, self.session)  # PEFT makes its newest adapter active, also where it then fails
            undo.pop_all()
        routed = {name: _on_routers(adapter.linears, routers) for name, adapter in adapters.items()}
        attach_routers(routers, routed, self.session)
        if any(adapter.linears for adapter in adapters.values()):
            self.session.modules = object()
        self.held |= adapters
        self.lora_A.update({name: nn.Identity() for name in adapters})
        self._follow()

    def drop(self, name: str) -> None:
        """Take an attached adapter away from experts and routers, and out of the active ones."""
        if name in self.session.active:
            self.set_adapter([active for active in self.session.active if active != name], inference_mode=True)
        if self.session.slots[name] != BASE_SLOT:
            assert self._bank is not None  # which gave the slot
            self._bank.remove(name)
        if self.held.pop(name).linears:
            self.session.modules = object()
        if name in self.lora_A:
            del self.lora_A[name]
        detach_routers(routers_of(self.model, self.specs), [name])
        self._follow()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Let rows without a name use these adapters, all of them at once.

        Raises:
            AdapterError: one is not attached; or together they do not fit into a bank of a fixed size. Then those that
                were active stay it.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_attached("active adapters", names)
        self._add_up(names)
        self.session.active = tuple(names)
        super().set_adapter(names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Use adapters, or the base model for every row."""
        super().enable_adapters(enabled)
        self.session.enabled = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Detach an adapter; if no other one is active, PEFT makes one so."""
        if adapter_name in self.held:
            was_active = list(self.active_adapters)
            self.drop(adapter_name)
            super().set_adapter(was_active, inference_mode=True)  # from which PEFT takes it out itself
            super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: codes of the experts would have to be made anew.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "merging adapters",
            got="packed experts",
            rule="no merging, since a delta is smaller than the steps of quantised weights",
            remedy="serve the adapter unmerged, or merge it into the dense model",
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _add_up(self, names: list[str]) -> None:
        """Let bank and routers hold the sum of adapters that are to be active, if several are, and no other sum."""
        together, before = [".".join(names)] if len(names) > 1 else [], list(self.session.active)
        if together == list(self._combined):
            return
        self._separate()
        try:
            for name in together:
                self._combine(name, names)
        except AdapterError:
            if len(before) > 1:
                self._combine(".".join(before), before)  # which fitted
            raise

    def _separate(self) -> None:
        """Take the sum of adapters out of bank and routers, if there is one."""
        detach_routers(routers_of(self.model, self.specs), self._combined)
        for name, slot in self.session.combined.items():
            if slot != BASE_SLOT:
                assert self._bank is not None  # which gave the slot
                self._bank.remove(name)
        self._combined = {}
        self.session.modules = object()
        self._follow()

    def _combine(self, together: str, names: Sequence[str]) -> None:
        """Put the sum of adapters into bank and routers, under a name of its own."""
        layers, linears = combine({name: self.held[name] for name in names}, [1.0] * len(names), "cat")
        routers = routers_of(self.model, self.specs)
        with ExitStack() as undo:
            if self._fixed:
                self._add_to_fixed({together: layers}, {}, undo)
            else:
                self._replace_bank({**self._factors(), together: layers}, undo)
            undo.pop_all()
        self._combined = {together: layers}
        self.session.modules = object()
        attach_routers(routers, {together: _on_routers(linears, routers)}, self.session)
        self._follow()

    def _follow(self) -> None:
        """Take slots from the bank as it is now."""
        slots = {} if self._bank is None else {n: one.slot for n, one in self._bank.report().adapters.items()}
        self.session.slots = {name: slots.get(name, BASE_SLOT) for name in self.held}
        self.session.combined = {name: slots.get(name, BASE_SLOT) for name in self._combined}

    def _factors(self) -> dict[str, Factors]:
        return {**{name: adapter.layers for name, adapter in self.held.items()}, **self._combined}

    def _add_to_fixed(self, adapters: Mapping[str, Factors], size: Mapping[str, Any], undo: ExitStack) -> None:
        """New adapters in the model's bank, which is made if it has none; with what undoes it."""
        bank = self._bank
        if bank is None:
            bank = AdapterBank({m.spec.layer: _moe(m).info for m in self.experts}, self.model.dtype, **size)
            self._put_bank(bank, True, undo)
        for name, factors in adapters.items():
            if any(factors.values()):
                bank.add(name, factors)
                undo.callback(bank.remove, name)

    def _replace_bank(self, adapters: dict[str, Factors], undo: ExitStack) -> None:
        """All adapters in a bank of just their size, for the layers that one of them touches; with what undoes it."""
        touched = {layer for factors in adapters.values() for layer, held in factors.items() if held}
        infos = {m.spec.layer: _moe(m).info for m in self.experts if m.spec.layer in touched}
        bank = AdapterBank.sized_to(infos, adapters, self.model.dtype) if infos else None
        self._put_bank(bank, False, undo)

    def _put_bank(self, bank: AdapterBank | None, fixed: bool, undo: ExitStack) -> None:
        """Let every layer serve its context, or the base if it has none."""
        contexts = {} if bank is None else bank.contexts
        for module in self.experts:
            moe = _moe(module)
            before = moe.injection.ctx
            moe.attach(contexts.get(module.spec.layer))
            undo.callback(moe.attach, before)
        undo.callback(setattr, self, "_bank", self._bank)
        undo.callback(setattr, self, "_fixed", self._fixed)
        self._bank, self._fixed = bank, fixed


def _on_routers(linears: Mapping[str, Factor], routers: Mapping[str, nn.Module]) -> dict[str, Factor]:
    return {name: on_device(factor, routers[name]) for name, factor in linears.items() if name in routers}


def _moe(module: FusedExperts) -> MoEExperts:
    assert module.moe is not None  # from_pretrained
    return module.moe


def _as_in_model(adapter: Adapter, model: PreTrainedModel) -> Adapter:
    """The adapter with the model's own names of its linear layers and routers.

    Those of transformers 4, such as ``block_sparse_moe.gate``, go through transformers' renamings.

    Raises:
        AdapterError: two of its names mean one module.
    """
    name_of = model_names(model)
    linears: dict[str, Factor] = {}
    for name, factor in adapter.linears.items():
        key, converted = name_of(f"{name}.weight")
        own = name if converted or find_module(model, name) is not None else key.removesuffix(".weight")
        if own in linears:
            raise AdapterError(
                f"adapter {adapter.path}",
                got=f"LoRA on {name} and under another name on {own}, which is the same module",
                rule="one pair of factors for a module",
                remedy="remove one of the two",
            )
        linears[own] = factor
    return replace(adapter, linears=linears)
