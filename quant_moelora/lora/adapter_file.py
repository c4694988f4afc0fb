"""Adapter files: per-expert modules or target_parameters of the fused experts, as PEFT writes them, or stacked experts.

Stacked files are what vLLM's ``enable_moe_shared_loras`` and SGLang's ``experts_shared_outer_loras`` read:
``experts.w1|w2|w3.lora_A`` [E, r, K] and ``lora_B`` [E, N, r], with 1 for E where all experts share a factor
("shared outer": A of w1 and w3, B of w2).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.weights import DENSE_DTYPES
from quant_moelora.loaders.expert_keys import parse_expert_module
from quant_moelora.loaders.families import PARAMETERS, ExpertsSpec, Projection
from quant_moelora.lora.fused_form import ROLES_FIXED_IN, FusedForm

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
_SUFFIX = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# base_layer is the inner wrapper of PEFT's nesting: the first of the targeted parameters
_FUSED_MODULE = re.compile(r"(?P<experts>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts)(?P<inner>\.base_layer)?")
_STACKED: dict[str, Projection] = {
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
_STACKED_MODULE = re.compile(rf"(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts\.(?P<stored>{'|'.join(_STACKED)})")
# Settings of LoraConfig that are read here, or that say nothing of what the saved factors mean.
_UNDERSTOOD = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "target_parameters"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type", "peft_type"),
    *("base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version", "runtime_config"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
# Initialisations that leave the base weights alone; PiSSA, OLoRA and others subtract the factors from them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, eq=False)
class Factor:
    """LoRA of one linear: delta W = scaling * b a.

    Factors that are one and the same tensor are held once: ``a`` of gate and up of one expert in a fused file, or what
    all experts share in a stacked one.
    """

    a: Tensor  # (r, K)
    b: Tensor  # (N, r)
    scaling: float


LayerFactors = dict[tuple[int, Projection], Factor]  # by expert and projection


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, in the library's terms.

    Attributes:
        path: its folder.
        config: PEFT's config.
        layers: factors of the routed experts, by layer.
        linears: factors of all other modules (attention, other linear layers and routers), by module.
        tensors: the file's own, of which the factors are views.
    """

    path: Path
    config: LoraConfig
    layers: dict[int, LayerFactors] = field(default_factory=dict)
    linears: dict[str, Factor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def load_adapter(path: str | Path, specs: list[ExpertsSpec]) -> Adapter:
    """Read an adapter folder for a model whose experts are ``specs``.

    Raises:
        AdapterError: files are missing, a feature is not served, a tensor is unknown or misshapen, or the adapter
            has no tensor at all.
    """
    folder = Path(path)
    config, tensors = _read(folder)
    # From the file, since PEFT fills in its own version where there is none.
    written_by = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("peft_version")
    return parse_adapter(config, tensors, specs, folder, str(written_by))


def parse_adapter(
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    specs: list[ExpertsSpec],
    folder: Path,
    written_by: str,
) -> Adapter:
    """An adapter from what is in its files.

    Args:
        config: PEFT's config.
        tensors: in host memory, by key.
        specs: the experts of the model.
        folder: what the adapter is called in errors.
        written_by: version of PEFT that wrote the files.

    Raises:
        AdapterError: as `load_adapter`.
    """
    _refuse(config, folder)
    adapter = Adapter(folder, config, tensors=tensors)
    layers, pairs = {spec.layer: spec for spec in specs}, _pairs(tensors, folder)
    adapter.layers.update(_fused(config, pairs, layers, folder, written_by))
    for module, pair in pairs.items():
        expert = parse_expert_module(module)
        if expert is not None:
            spec = _spec_of(layers, expert[0], module, folder)
            factor = _per_expert(config, spec, module, expert[1:], pair, folder)
            adapter.layers.setdefault(expert[0], {})[expert[1:]] = factor
        elif match := _STACKED_MODULE.fullmatch(module):
            number = int(match["layer"])
            spec, projection = _spec_of(layers, number, module, folder), _STACKED[match["stored"]]
            adapter.layers.setdefault(number, {}).update(_stacked(config, spec, module, projection, pair, folder))
        elif _FUSED_MODULE.fullmatch(module) is None:
            name = f"{module}.weight" if targets_weight(config, module) else module
            adapter.linears[module] = Factor(pair["A"], pair["B"], _scaling(config, name, pair["A"].shape[0]))
    if not adapter.layers and not adapter.linears:
        raise AdapterError(
            f"adapter {folder}",
            got=f"no LoRA tensor in {WEIGHTS_FILE}",
            rule="at least one",
            remedy="save the adapter again with PEFT's save_pretrained",
        )
    return adapter


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftConfig

    try:
        if not (folder / CONFIG_FILE).is_file():
            raise OSError(f"no {CONFIG_FILE}")
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise AdapterError(
            f"adapter {folder}",
            got=f"{type(error).__name__}: {error}",
            rule=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            remedy="save the adapter with PEFT's save_pretrained",
        ) from error
    if not isinstance(config, PeftLoraConfig):
        raise AdapterError(
            f"adapter {folder}", got=f"peft_type {config.peft_type}", rule="LORA", remedy="train a LoRA adapter"
        )
    return config, tensors


def _refuse(config: LoraConfig, folder: Path) -> None:
    """Raise AdapterError for every setting that could change what A and B mean, unless it is known not to."""
    found: list[str] = []
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        made = setting.default_factory
        default = setting.default if made is dataclasses.MISSING else made()
        harmless = setting.name in _UNDERSTOOD or value in (default, None, False, [])
        if setting.name == "init_lora_weights":
            harmless = value in _PLAIN_INITS
        if not harmless:
            found.append(f"{setting.name}={value}")
    if found:
        raise AdapterError(
            f"adapter {folder}",
            got=", ".join(found),
            rule="plain LoRA or rsLoRA on linear layers and experts",
            remedy="train the adapter without it",
        )


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """A and B of every module.

    Raises:
        AdapterError: a tensor that is neither, or one without the other.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):  # a file has no order of its own, and errors name the first
        match = _SUFFIX.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise _unknown(folder, key, "not a lora_A or lora_B weight")
        _check_factor(folder, key, tensor)
        pairs.setdefault(match["module"], {})[match["factor"]] = tensor
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise _unknown(folder, f"{module}.lora_{next(iter(pair))}.weight", "its counterpart is missing")
    return pairs


def _check_factor(
    folder: Path,
    key: str,
    tensor: Tensor,  # (...)
) -> None:
    """Raise AdapterError for a tensor that can be no factor of a LoRA, whatever its module."""
    stacked = _STACKED_MODULE.fullmatch(key.removeprefix(PREFIX).rpartition(".lora_")[0]) is not None
    if tensor.dtype not in DENSE_DTYPES or tensor.ndim != 2 + stacked or not tensor.numel():
        got = f"{tensor.dtype} {list(tensor.shape)}"
    elif not bool(tensor.isfinite().all()):
        got = "values that are not finite"
    else:
        return
    raise AdapterError(
        f"{key} in {folder / WEIGHTS_FILE}",
        got=got,
        rule=f"{'matrices' if stacked else 'a matrix'} of finite float32, bfloat16 or float16, of rank 1 at least",
        remedy="save the adapter again, or train it again if it diverged",
    )


def targets_weight(config: LoraConfig, module: str) -> bool:
    """Whether PEFT targeted a module's weight as a parameter, and not the module; the keys are the same."""
    name = f"{module}.weight"
    return any(name == target or name.endswith(f".{target}") for target in config.target_parameters or ())


def _unknown(folder: Path, key: str, why: str) -> AdapterError:
    return AdapterError(
        f"adapter {folder}",
        got=f"{key} in {WEIGHTS_FILE}: {why}",
        rule="tensors that all belong to a module of the model",
        remedy="attach the adapter to the model it was trained on",
    )


def _scaling(config: LoraConfig, name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; alpha_pattern matches as in PEFT."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, int] = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _per_expert(
    config: LoraConfig,
    spec: ExpertsSpec,
    module: str,
    slot: tuple[int, Projection],
    pair: Mapping[str, Tensor],
    folder: Path,
) -> Factor:
    """LoRA on one projection of one expert: A [r, K], B [N, r]."""
    expert, projection = slot
    if expert >= spec.num_experts:
        raise _unknown(folder, module, f"the model has experts 0 to {spec.num_experts - 1}")
    a, b = pair["A"], pair["B"]
    linear = spec.linear(module, projection)
    rank = a.shape[0]
    if a.shape != (rank, linear.k) or b.shape != (linear.n, rank):
        raise AdapterError(
            f"{module} in {folder / WEIGHTS_FILE}",
            got=f"A {list(a.shape)}, B {list(b.shape)}",
            rule=f"A [r, {linear.k}] and B [{linear.n}, r]",
            remedy="attach the adapter to the model it was trained on",
        )
    return Factor(a, b, _scaling(config, module, rank))


def _stacked(
    config: LoraConfig,
    spec: ExpertsSpec,
    module: str,
    projection: Projection,
    pair: Mapping[str, Tensor],
    folder: Path,
) -> LayerFactors:
    """LoRA on one projection of all experts: A [E or 1, r, K], B [E or 1, N, r]."""
    experts, a, b = spec.num_experts, pair["A"], pair["B"]
    linear, rank = spec.linear(module, projection), a.shape[1]
    if (
        not {len(a), len(b)} <= {1, experts}
        or a.shape[1:] != (rank, linear.k)
        or b.shape[1:] != (linear.n, rank)
        or (projection == "gate" and not spec.activation.gated)
    ):
        raise AdapterError(
            f"{module} in {folder / WEIGHTS_FILE}",
            got=f"A {list(a.shape)}, B {list(b.shape)}",
            rule=f"A [{experts} or 1, r, {linear.k}] and B [{experts} or 1, {linear.n}, r]",
            remedy="attach the adapter to the model it was trained on",
        )
    scaling = _scaling(config, module, rank)
    each_a, each_b = (list(t.unbind()) * (experts // len(t)) for t in (a, b))
    return {(e, projection): Factor(each_a[e], each_b[e], scaling) for e in range(experts)}


def _fused(
    config: LoraConfig,
    pairs: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[int, ExpertsSpec],
    folder: Path,
    written_by: str,
) -> dict[int, LayerFactors]:
    """Factors, by layer, of the fused modules among ``pairs``."""
    found: list[tuple[FusedForm, Tensor, Tensor, set[bool]]] = []
    for module, pair in pairs.items():
        match = _FUSED_MODULE.fullmatch(module)
        if match is None:
            continue
        form = FusedForm(_spec_of(layers, int(match["layer"]), module, folder), _target(config, match, folder))
        a, b = pair["A"], pair["B"]
        fitting = form.fitting(a, b)
        if not fitting:
            experts = form.spec.num_experts
            raise AdapterError(
                f"LoRA of {form.name} in {folder / WEIGHTS_FILE}",
                got=f"A {list(a.shape)}, B {list(b.shape)}",
                rule=f"A [{experts}*r, {form.k}] and B [{form.n}, r*{experts}]",
                remedy="attach the adapter to the model it was trained on",
            )
        found.append((form, a, b, fitting))
    # One PEFT wrote all of them: where a square parameter does not tell which roles A and B have, another one does.
    told = {next(iter(fitting)) for _, _, _, fitting in found if len(fitting) == 1}
    factors: dict[int, LayerFactors] = {}
    for form, a, b, fitting in found:
        known = fitting if len(fitting) == 1 else told
        swapped = next(iter(known)) if len(known) == 1 else _roles_swapped(form, folder, written_by)
        a_experts, b_experts = form.unfold(a, b, swapped)
        _check_rank(config, form, a_experts.shape[1], folder)
        scaling = _scaling(config, form.name, a_experts.shape[1])
        layer, blocks = factors.setdefault(form.spec.layer, {}), form.blocks(b_experts)
        for expert in range(form.spec.num_experts):
            a_one, b_one = a_experts[expert], b_experts[expert]
            if len(blocks) == 1:  # the projections share the same tensor
                layer |= {(expert, p): Factor(a_one, b_one[form.rows(p)], scaling) for p in form.projections}
                continue
            for p, ranks in zip(form.projections, blocks, strict=True):
                layer[expert, p] = Factor(a_one[ranks], b_one[form.rows(p), ranks], scaling)
    return factors


def _check_rank(config: LoraConfig, form: FusedForm, rank: int, folder: Path) -> None:
    """Raise AdapterError unless a fused parameter has the config's rank: others divide its rows by E just as well."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, int] = config.rank_pattern or {}
    expected = patterns.get(get_pattern_key(list(patterns), form.name), config.r)
    if rank != expected:
        raise AdapterError(
            f"LoRA of {form.name} in {folder / WEIGHTS_FILE}",
            got=f"factors of {rank * form.spec.num_experts} ranks for {form.spec.num_experts} experts",
            rule=f"rank {expected} for each, as {CONFIG_FILE} says",
            remedy="restore the config; per-expert LoRA of some of the experts only, which PEFT converts to this, "
            "is served by quant_moelora.attach_adapters",
        )


def _spec_of(layers: Mapping[int, ExpertsSpec], number: int, module: str, folder: Path) -> ExpertsSpec:
    if number not in layers:
        raise _unknown(folder, module, f"no routed experts in layer {number}")
    return layers[number]


def _target(config: LoraConfig, match: re.Match[str], folder: Path) -> str:
    """Which parameter a fused key means: PEFT nests the wrappers of one module and writes no parameter's name."""
    targets = config.target_parameters or []
    targeted = [name for name in PARAMETERS if any(t.rpartition(".")[2] == name for t in targets)]
    if len(targeted) == 2:
        return targeted[0] if match["inner"] else targeted[1]
    if len(targeted) == 1 and not match["inner"]:
        return targeted[0]
    raise AdapterError(
        f"adapter {folder}",
        got=f"{match[0]} with target_parameters {targets}",
        rule="target_parameters that name gate_up_proj, down_proj or both",
        remedy=f"restore target_parameters in {CONFIG_FILE}",
    )


def _roles_swapped(form: FusedForm, folder: Path, written_by: str) -> bool:
    """Whether the version of PEFT that wrote a square parameter, whose shapes do not tell, swapped A and B."""
    from packaging.version import InvalidVersion, Version

    try:
        return form.swapped_by(Version(written_by.partition("@")[0]))  # a development version ends in @commit
    except InvalidVersion as error:
        if form.swapped_by(Version("0")) == form.swapped_by(Version(ROLES_FIXED_IN)):
            return form.swapped_by(Version(ROLES_FIXED_IN))
        raise AdapterError(
            f"LoRA of {form.name} in {folder}",
            got=f"a square parameter and peft_version {written_by}",
            rule=f"peft_version in {CONFIG_FILE}, since PEFT before {ROLES_FIXED_IN} swapped A and B",
            remedy="write the version of PEFT that saved the adapter into its config",
        ) from error
