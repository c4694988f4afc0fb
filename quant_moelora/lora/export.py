"""export_adapter: write an adapter in one of PEFT's two forms, as PEFT 0.21 writes them."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor

from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.loaders.expert_keys import expert_modules
from quant_moelora.loaders.families import PARAMETERS, ExpertsSpec, projections_of
from quant_moelora.lora.adapter_file import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Adapter, Factor, targets_weight
from quant_moelora.lora.fused_form import ROLES_FIXED_IN, FusedForm

if TYPE_CHECKING:
    from peft import LoraConfig

Form = Literal["fused", "per_expert"]


def export_adapter(adapter: Adapter, specs: list[ExpertsSpec], folder: str | Path, form: Form, model_type: str) -> None:
    """Write the adapter, bit for bit, into a new folder.

    ``per_expert`` has a pair of factors for each projection of each expert; where a fused file shares A between gate
    and up, both get it. ``fused`` has one pair for each of the experts' two parameters (`FusedForm`). There gate and up
    share A if they have the same one; if not, the parameter has rank 2r, the two A one below the other, and B
    block-diagonal, at the same scaling (PEFT's own conversion). What is beside the experts is written as it was read,
    but for routers in the fused form: there they are parameters, as in transformers 5.

    Args:
        adapter: from `load_adapter`.
        specs: the experts of the model that it was loaded for.
        folder: where to write; it must not hold an adapter.
        form: ``fused`` or ``per_expert``.
        model_type: of the model, for the names of its per-expert modules.

    Raises:
        AdapterError: ``fused`` cannot hold the adapter, or the folder holds one.
        UnsupportedError: another form.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists() or (folder / WEIGHTS_FILE).exists():
        raise AdapterError(
            f"folder {folder}", got="an adapter in it", rule="a folder without one", remedy="choose another folder"
        )
    config, tensors = adapter_tensors(adapter, specs, form, model_type)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config.save_pretrained(str(folder))


def adapter_tensors(
    adapter: Adapter, specs: list[ExpertsSpec], form: Form, model_type: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """What `export_adapter` writes: PEFT's config, and tensors of their own by key.

    Raises:
        AdapterError: ``fused`` cannot hold the adapter.
        UnsupportedError: another form.
    """
    if form not in get_args(Form):
        raise UnsupportedError("form", got=repr(form), rule=" or ".join(get_args(Form)), remedy="correct the caller")
    layers = {spec.layer: spec for spec in specs}
    tensors: dict[str, Tensor] = {}
    weights = _targeted_weights(adapter, layers, form, model_type)
    targets = sorted(adapter.linears.keys() - weights)
    parameters = [f"{name}.weight" for name in adapter.linears if name in weights]
    written = {name: (factor.a, factor.b) for name, factor in adapter.linears.items()}
    factors = {f"{name}.weight" if name in weights else name: factor for name, factor in adapter.linears.items()}
    if form == "per_expert":
        for number, held in sorted(adapter.layers.items()):
            modules = expert_modules(layers[number], model_type)
            factors |= {modules[slot]: factor for slot, factor in held.items()}
            written |= {modules[slot]: (factor.a, factor.b) for slot, factor in held.items()}
            targets += sorted({modules[slot].rpartition(".")[2] for slot in held} - set(targets))
    else:
        for name, key, factor, folded in _fused(adapter, layers):
            factors[name], written[key] = factor, folded
            parameters.append(name)
    for key, pair in written.items():
        for letter, tensor in zip("AB", pair, strict=True):
            # A copy: safetensors writes no memory twice, and A may stand for gate and up.
            copied = tensor.clone(memory_format=torch.contiguous_format)
            tensors[f"{PREFIX}{key}.lora_{letter}.weight"] = copied
    config = _config(adapter, factors)
    config.target_modules = targets
    config.target_parameters = _shortened(parameters, specs) or None
    return config, tensors


def _targeted_weights(adapter: Adapter, layers: Mapping[int, ExpertsSpec], form: Form, model_type: str) -> set[str]:
    """Modules beside the experts that are written as parameters, by the name of their weight.

    Those that the adapter's own file has so; and, in the fused form, every router, which is no linear layer in
    transformers 5.

    Raises:
        AdapterError: a router has the name of transformers 4, and the fused form is asked for.
    """
    found = {name for name in adapter.linears if targets_weight(adapter.config, name)}
    if form == "per_expert":
        return found
    for spec in layers.values():
        block = spec.module.rpartition(".")[0]
        former = expert_modules(spec, model_type)[0, "up"].partition(".experts.")[0]
        for name, factor in adapter.linears.items():
            is_router = (factor.b.shape[0], factor.a.shape[1]) == (spec.num_experts, spec.hidden_size)
            if not is_router or not name.startswith((f"{block}.", f"{former}.")) or name in found:
                continue
            if name.rpartition(".")[0] != block:
                raise _cannot(adapter, f"a router under the name {name}", f"a router of {block}, as transformers 5 has")
            found.add(name)
    return found


def _fused(
    adapter: Adapter, layers: Mapping[int, ExpertsSpec]
) -> Iterator[tuple[str, str, Factor, tuple[Tensor, Tensor]]]:
    """Of every parameter touched: its name, the module it is written as, rank and scaling as a factor, and A and B."""
    touched = {
        n: [p for p, of in PARAMETERS.items() if any(q in projections_of(of) for _, q in f)]
        for n, f in adapter.layers.items()
    }
    first = next(iter(touched.values()), [])
    for number, factors in sorted(adapter.layers.items()):
        spec, parameters = layers[number], touched[number]
        if parameters != first:
            # A key names no parameter; that only one is targeted is said for all layers together.
            raise _cannot(adapter, f"{', '.join(parameters)} in layer {number}", f"{', '.join(first)} in every layer")
        for parameter in parameters:
            form = FusedForm(spec, parameter)
            name = form.name
            parts = [
                _expert(adapter, name, expert, [factors.get((expert, p)) for p in form.projections])
                for expert in range(spec.num_experts)
            ]
            widest = max(len(a) for a, _, _ in parts)  # where any expert has two A, all have
            parts = [(a * (widest // len(a)), b, scaling) for a, b, scaling in parts]
            facts = {(sum(x.shape[0] for x in a), scaling) for a, _, scaling in parts}
            if len(facts) > 1:
                found = ", ".join(f"rank {rank} scaling {scaling:g}" for rank, scaling in sorted(facts))
                raise _cannot(adapter, f"experts of {name} with {found}", "one rank and one scaling for all experts")
            a = torch.stack([torch.cat(a) for a, _, _ in parts])  # (E, r, K)
            b = torch.stack([form.joined(_columns(a, b)) for a, b, _ in parts])  # (E, N, r)
            inner = ".base_layer" if parameter != parameters[-1] else ""
            folded = form.fold(a, b, form.swapped_by(Version(ROLES_FIXED_IN)))
            yield name, f"{spec.module}{inner}", Factor(a[0], b[0], parts[0][2]), folded


def _expert(
    adapter: Adapter, name: str, expert: int, factors: list[Factor | None]
) -> tuple[list[Tensor], list[Tensor], float]:
    """A (one, if the projections share it), B and the scaling of one expert's part of a fused parameter."""
    held = [factor for factor in factors if factor is not None]
    if len(held) < len(factors):
        raise _cannot(adapter, f"nothing for a projection of expert {expert} in {name}", "factors for every expert")
    facts = [(factor.a.shape[0], factor.scaling) for factor in held]
    if len(set(facts)) > 1:
        found = ", ".join(f"rank {rank} scaling {scaling:g}" for rank, scaling in facts)
        raise _cannot(adapter, f"gate and up of expert {expert} in {name} with {found}", "one rank and one scaling")
    shared = all(factor.a is held[0].a or torch.equal(factor.a, held[0].a) for factor in held)
    a = [held[0].a] if shared else [factor.a for factor in held]
    return a, [factor.b for factor in held], held[0].scaling


def _columns(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:  # (N of the projection, r) each
    """B of the projections as they are for a shared A; otherwise each over columns of its own, block-diagonal."""
    if len(a) == 1:
        return b
    return list(torch.block_diag(*b).split([len(part) for part in b]))


def _cannot(adapter: Adapter, got: str, rule: str) -> AdapterError:
    return AdapterError(
        f"adapter {adapter.path} in the fused form", got=got, rule=rule, remedy="export it in the per_expert form"
    )


def _config(adapter: Adapter, factors: Mapping[str, Factor]) -> LoraConfig:
    """PEFT's config with ranks and alphas that give every factor's scaling exactly.

    Raises:
        AdapterError: no alpha gives a scaling.
    """
    import peft

    config = copy.deepcopy(adapter.config)
    facts: dict[str, tuple[int, int | float | None]] = {}
    # rsLoRA is kept if it can be: alpha / sqrt(2r) does not always hit what alpha / sqrt(r) was.
    for rslora in dict.fromkeys((config.use_rslora, False)):
        facts = {name: (f.a.shape[0], _alpha(f, rslora)) for name, f in factors.items()}
        if None not in {alpha for _, alpha in facts.values()}:
            break
    else:
        name, factor = next((name, factors[name]) for name, (_, alpha) in facts.items() if alpha is None)
        raise AdapterError(
            f"adapter {adapter.path}",
            got=f"scaling {factor.scaling!r} of {name}, which no alpha gives at rank {factor.a.shape[0]}",
            rule="alpha / r, or alpha / sqrt(r) for all modules, to the last bit",
            remedy="export it in the per_expert form, which keeps its ranks",
        )
    usual = Counter(facts.values()).most_common(1)[0][0]
    config.use_rslora, config.r = rslora, usual[0]
    config.lora_alpha = usual[1]  # pyright: ignore[reportAttributeAccessIssue] - PEFT divides it and takes any number
    patterns = _patterns(facts)
    config.rank_pattern = {name: rank for name, (rank, _) in patterns.items() if rank != usual[0]}
    config.alpha_pattern = {name: alpha for name, (_, alpha) in patterns.items() if alpha != usual[1]}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.lora_dropout = 0.0  # of training; PEFT refuses any on fused parameters
    config.init_lora_weights = True
    config.peft_version = peft.__version__  # says that A and B have the roles they have here
    return config


def _alpha(factor: Factor, rslora: bool) -> int | float | None:
    """The alpha that gives exactly the factor's scaling, as an integer if there is one."""
    divisor = math.sqrt(factor.a.shape[0]) if rslora else factor.a.shape[0]
    about = factor.scaling * divisor
    for alpha in (round(about), about, math.nextafter(about, math.inf), math.nextafter(about, -math.inf)):
        if alpha / divisor == factor.scaling:
            return alpha
    return None


def _patterns(
    facts: Mapping[str, tuple[int, int | float | None]],
) -> dict[str, tuple[int, int | float | None]]:
    """Rank and alpha by pattern: the last part of a name where all names that end so agree, else the whole name."""
    by_ending: dict[str, set[tuple[int, int | float | None]]] = {}
    for name, fact in facts.items():
        by_ending.setdefault(name.rpartition(".")[2], set()).add(fact)
    return {
        ending if len(by_ending[ending := name.rpartition(".")[2]]) == 1 else re.escape(name): fact
        for name, fact in facts.items()
    }


def _shortened(parameters: list[str], specs: list[ExpertsSpec]) -> list[str]:
    """Names of parameters from the block on, as PEFT's users write them, if every layer has them; else in full."""
    short = dict.fromkeys(".".join(name.split(".")[-3:]) for name in parameters)
    return list(short) if len(parameters) == len(short) * len(specs) else parameters
