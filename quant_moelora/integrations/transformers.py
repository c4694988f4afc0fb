"""from_pretrained: a transformers model whose experts are ours.

The quantizer swaps the experts modules while the model is on the meta device and fills them from the checkpoint with
the library's own loader after transformers has loaded everything else. There is no WeightConverter of ours: one
loading path serves the library and transformers.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quant_moelora.core.backend import ExpertsBackend
from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError
from quant_moelora.core.workspace import Workspace
from quant_moelora.distributed.agreement import agree, layer_facts
from quant_moelora.distributed.layer import DistributedExperts
from quant_moelora.distributed.mesh import ExpertMesh
from quant_moelora.experts.registry import AUTO, select_backend
from quant_moelora.integrations.attention import register_attention
from quant_moelora.integrations.decode_graphs import DecodeGraphs
from quant_moelora.integrations.parallel_plan import leave_out_experts, mesh_of_plan, part_of
from quant_moelora.integrations.session import AdapterSession, with_adapter_names, with_adapter_rows
from quant_moelora.kernels.grouped_gemm.table import tuned_folder
from quant_moelora.layer import MoEExperts
from quant_moelora.loaders.checkpoint import Checkpoint, resolve_checkpoint
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.families import PARAMETERS, ExpertsSpec, require_experts
from quant_moelora.loaders.layer_format import LayerFormat, describe_layers
from quant_moelora.loaders.linears import dequantize_linear, describe_linears
from quant_moelora.loaders.packed_form import METHOD
from quant_moelora.loaders.registry import QUANTIZED_SUFFIXES, StoredLinear

logger = logging.getLogger(__name__)

# Checkpoint keys that our own loader reads, so that transformers need not report them.
_EXPERT_KEYS = rf"\.experts\.(\d+\.|({'|'.join(PARAMETERS)})([._]\w+)?$|(w13|w2)\.\w+$|inter_perm$)"
_QUANTIZED_KEYS = rf"\.({'|'.join(sorted(QUANTIZED_SUFFIXES))})$"
# Arguments of transformers' from_pretrained that say where a checkpoint is; those of `resolve_checkpoint`.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
# Strategies of accelerate for spreading a model over devices.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_EXPERTS_TARGET = re.compile(r"(^|\.)experts\.")


class FusedExperts(nn.Module):
    """Stands where a family's experts module stood, with its signature.

    Attributes:
        spec: what the family's module was.
        session: adapters of the model and those of the running forward.
        moe: the experts; None until they are loaded.
    """

    def __init__(self, spec: ExpertsSpec, session: AdapterSession) -> None:
        super().__init__()
        self.spec = spec
        self.session = session
        self.moe: MoEExperts | None = None

    def forward(
        self,
        hidden_states: Tensor,  # (tokens, H)
        top_k_index: Tensor,  # (tokens, k)
        top_k_weights: Tensor,  # (tokens, k)
    ) -> Tensor:  # (tokens, H)
        """Weighted sum of each token's experts, with the adapter of the token's row.

        Raises:
            UnsupportedError: the model is being trained.
        """
        if self.training and torch.is_grad_enabled():
            raise UnsupportedError(
                "training",
                got="a forward of packed experts in training mode",
                rule="model.eval(), or torch.no_grad()",
                remedy="train the adapter on another copy of the model, and attach it here",
            )
        assert self.moe is not None  # the quantizer fills every module or raises
        slots = self.session.token_slots(hidden_states.shape[0], hidden_states.device)
        if self.moe.injection.ctx is None:
            slots = None  # no adapter touches this layer
        return self.moe(hidden_states, top_k_index, top_k_weights, slots)


class QuantMoELoRAConfig(QuantizationConfigMixin):
    """What transformers carries in ``config.quantization_config`` of a model loaded by `from_pretrained`.

    Args:
        backend: experts backend.
        tuned_configs: folder of tuned tiles, or None.
        mesh: processes that share the experts, or None; it is this process's own, and no part of what is saved.
    """

    def __init__(
        self, backend: str = AUTO, tuned_configs: str | None = None, mesh: ExpertMesh | None = None, **_: Any
    ) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue] - an enum of built-in methods
        self.backend = backend
        self.tuned_configs = tuned_configs
        self.mesh = mesh

    def to_dict(self) -> dict[str, Any]:
        """What a saved model's config.json says: what the experts are is in the files, the rest of one machine."""
        return {"quant_method": METHOD}


@dataclass(frozen=True)
class _Load:
    """What one load knows of its checkpoint and model before anything is read.

    Attributes:
        checkpoint: the files.
        layers: the layers' experts.
        backends: name of each layer's backend.
        linears: quantised linear layers beside the experts, by name in the model.
        shapes: of the model's parameters.
    """

    checkpoint: Checkpoint
    layers: list[LayerFormat]
    backends: list[str]
    linears: dict[str, StoredLinear]
    shapes: dict[str, torch.Size]

    def check_shapes(self, model: PreTrainedModel) -> None:
        """Raise for parameters of another shape than the model's: transformers 5.17 takes what the checkpoint has.

        Raises:
            FormatError: a parameter took the checkpoint's shape.
        """
        for name, parameter in model.named_parameters():
            expected = self.shapes.get(name, parameter.shape)
            if parameter.shape != expected:
                raise FormatError(
                    name,
                    got=f"shape {list(parameter.shape)} in {self.checkpoint.path}",
                    rule=f"{list(expected)}, as config.json says",
                    remedy="download the checkpoint again, or use the config that belongs to it",
                )


class QuantMoELoRAQuantizer(HfQuantizer):
    """Puts `FusedExperts` into a model and fills them."""

    def __init__(self, quantization_config: QuantMoELoRAConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # What transformers itself loads is not quantised. Told so, it casts to the model's dtype as for any model;
        # transformers 5.17 would otherwise leave every renamed key in the checkpoint's dtype.
        self.pre_quantized = False
        self.backend = quantization_config.backend
        self.tuned_configs = quantization_config.tuned_configs
        self.mesh = quantization_config.mesh
        self.session = AdapterSession()
        self.load: _Load | None = None
        self.compileable = False

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        device_map: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Find every expert tensor and its format, and a backend for it, before anything is read."""
        if not checkpoint_files:
            raise FormatError(
                "checkpoint",
                got="no files",
                rule="safetensors files",
                remedy="load from a checkpoint, not a state dict",
            )
        checkpoint = Checkpoint(Path(checkpoint_files[0]).parent)
        specs = require_experts(model)
        layers = describe_layers(checkpoint, specs, model)
        device = torch.device(next(iter(device_map.values())) if device_map else "cpu")
        backends = self._select_backends(layers, device, dtype or model.dtype)
        self.load = _Load(
            checkpoint=checkpoint,
            layers=layers,
            backends=[backend.name for backend in backends],
            linears=describe_linears(checkpoint, model, layers),
            shapes={name: parameter.shape for name, parameter in model.named_parameters()},
        )
        self.compileable = all(backend.capturable for backend in backends)
        for spec in specs:
            _place(model, spec, FusedExperts(spec, self.session))
        leave_out_experts(model, specs)
        missing = {rf"^{re.escape(name)}\.weight$" for name in self.load.linears}
        _ignore_keys(model, "missing", missing)
        _ignore_keys(model, "unexpected", {_EXPERT_KEYS, _QUANTIZED_KEYS})
        return model

    def _select_backends(
        self, layers: list[LayerFormat], device: torch.device, dtype: torch.dtype
    ) -> list[ExpertsBackend]:
        """The layers' backends; each choice is logged once."""
        infos = [layer.meta_info() for layer in layers]
        selections = [select_backend(self.backend, info, device, dtype) for info in infos]
        lines = [f"{info.scheme_name}: {s.report}" for info, s in zip(infos, selections, strict=True)]
        for line in dict.fromkeys(lines):
            logger.info("%s", line)
        return [selection.backend for selection in selections]

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Drop the family's converters of expert weights: their targets are no parameters of the model any more."""
        return [
            conversion
            for conversion in weight_conversions
            if not isinstance(conversion, WeightConverter)
            or not any(_EXPERTS_TARGET.search(target) for target in conversion.target_patterns)
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Read, pack and place the experts, one layer at a time, and the quantised linear layers."""
        assert self.load is not None  # _process_model_before_weight_loading
        load, self.load = self.load, None  # the quantizer lives as long as the model, what it read need not
        load.check_shapes(model)
        if self.mesh is None:
            self.mesh = mesh_of_plan(model)
        pairs = zip(load.layers, load.backends, strict=True)
        workspaces: dict[torch.device, Workspace] = {}
        for layer, backend in tqdm(pairs, desc="Loading experts", unit="layer", total=len(load.layers), disable=None):
            experts = model.get_submodule(layer.spec.module)
            block = model.get_submodule(layer.spec.module.rpartition(".")[0])
            assert isinstance(experts, FusedExperts)
            device = next(block.parameters()).device  # the router stands beside the experts
            info = load_layer(load.checkpoint, layer, device, None if self.mesh is None else self.mesh.config)
            shared = workspaces.setdefault(info.device, Workspace(info.device))
            options: dict[str, Any] = {"tuned_configs": self.tuned_configs, "workspace": shared, "backend": backend}
            if self.mesh is None:
                experts.moe = MoEExperts(info, **options)
            else:
                experts.moe = DistributedExperts(info, self.mesh, exchange="none", **options)
        if self.mesh is not None:
            agree(self.mesh, layer_facts({n: e.moe.info for n, e in experts_of(model).items() if e.moe is not None}))
        with torch.no_grad():
            for name, linear in load.linears.items():
                weight = model.get_submodule(name).get_parameter("weight")
                weight.copy_(part_of(dequantize_linear(load.checkpoint, linear, weight.device), weight))
        if load.linears:
            logger.info("%d quantised linear layers beside the experts were dequantised", len(load.linears))
        model.forward = with_adapter_names(model.forward, self.session)
        from quant_moelora.integrations.peft import prepare  # which needs this module

        prepare(model, self.session)
        self._generate_from(model)
        return model

    def _generate_from(self, model: PreTrainedModel) -> None:
        """Let `generate` put names on the device before a step, and replay its steps as CUDA graphs on a GPU."""
        prepare: Any = model.prepare_inputs_for_generation
        held: Any = model
        held.prepare_inputs_for_generation = with_adapter_rows(prepare, self.session)
        layers = [module.moe for module in experts_of(model).values() if module.moe is not None]
        compiled: Any = model.get_compiled_call
        graphs = DecodeGraphs(model, layers, self.session, compiled)

        def get_compiled_call(compile_config: Any) -> Callable[..., Any]:
            """Graphs where they can be captured and nobody asked for compiled code."""
            return graphs if compile_config is None and model.device.type == "cuda" else compiled(compile_config)

        held.get_compiled_call = get_compiled_call

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - untyped there
        """``save_pretrained`` writes the packed form."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """What ``save_pretrained`` writes, and the metadata of its files."""
        from quant_moelora.integrations.saving import packed_state  # which needs this module

        return packed_state(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Make ``model`` its family's own, in place, for ``model.dequantize()``."""
        from quant_moelora.integrations.dequantize import dequantize_in_place  # which needs this module

        return dequantize_in_place(model, dtype)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile or capture its steps with a static cache."""
        return self.compileable

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - untyped there
        """True: Trainer would not evaluate otherwise. That experts cannot be trained yet, their forward says."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """As `is_trainable`; Trainer asks it for a model without adapters."""
        return True


# transformers keeps a table of methods of its own; as decorators these two would hide the classes from type checkers.
register_attention()
register_quantization_config(METHOD)(QuantMoELoRAConfig)
register_quantizer(METHOD)(QuantMoELoRAQuantizer)


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: str | int | torch.device | dict[str, Any] | None = None,
    backend: str = AUTO,
    tuned_configs: str | os.PathLike[str] | None = None,
    device_mesh: DeviceMesh | ExpertMesh | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a Mixture-of-Experts model with packed experts that can carry adapters.

    Args:
        path: folder of a checkpoint, or a repository of the hub.
        dtype: activation dtype and that of everything but the experts' codes and scales; None takes the checkpoint's.
        device_map: one device for the whole model, as a device or ``{"": device}``; None is the CPU, and "auto" (or
            another strategy of accelerate) the GPU if there is one, else the CPU.
        backend: experts backend, or ``auto``.
        tuned_configs: folder of tuned tiles; see `MoEExperts`.
        device_mesh: processes that share the experts of each layer; a `DeviceMesh` as of `ExpertMesh`, or one. Each
            reads and holds its part of the experts, and all of the rest; all of them are given the same inputs. None
            for those of a plan among ``kwargs``, or for this process alone.
        revision: revision of a hub repository.
        token: token for a hub repository.
        cache_dir: where the hub's snapshots are kept.
        local_files_only: take the repository from that cache, as HF_HUB_OFFLINE in the environment does.
        subfolder: folder of the checkpoint within ``path``.
        kwargs: passed to transformers. A ``config`` among them takes the place of config.json. By ``tp_plan`` or
            ``distributed_config`` transformers shards the rest of the model, as its plan says.

    Raises:
        FormatError: a tensor is missing, misshapen or in contradiction to the config; nothing is returned half-loaded.
            Or there is no such checkpoint, or folder of tuned tiles.
        UnsupportedError: a format, family, device map or parallel plan that is not served.
        BackendError: no backend serves the model.
        DistributedError: processes do not load the same experts.
    """
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub |= {"local_files_only": local_files_only, "subfolder": subfolder}
    ours: dict[str, Any] = {"backend": backend, "tuned_configs": tuned_configs, "device_mesh": device_mesh}
    model, _ = load_with_info(path, dtype=dtype, device_map=device_map, **ours, **hub, **kwargs)
    return model


def load_with_info(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: str | int | torch.device | dict[str, Any] | None = None,
    backend: str = AUTO,
    tuned_configs: str | os.PathLike[str] | None = None,
    device_mesh: DeviceMesh | ExpertMesh | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`from_pretrained`, with what transformers says of the keys it loaded."""
    mesh = ExpertMesh(device_mesh) if isinstance(device_mesh, DeviceMesh) else device_mesh
    tuned = tuned_folder(tuned_configs)
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    folder = resolve_checkpoint(path, **{name: value for name, value in hub.items() if value is not None})
    device_map = _single_device(device_map)
    Checkpoint(folder)  # a damaged file is reported by us, in one way, before transformers opens it
    config = copy.deepcopy(kwargs.pop("config", None))
    if config is None:
        remote = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
        config = AutoConfig.from_pretrained(folder, **remote)
    own = {"quant_method": METHOD, "backend": backend, "tuned_configs": tuned, "mesh": mesh}
    config.quantization_config = own  # of which transformers makes a QuantMoELoRAConfig
    kwargs["ignore_mismatched_sizes"] = True  # _check_loaded raises, in the library's words
    if dtype is not None:
        kwargs["dtype"] = dtype
    if device_map is not None:
        kwargs["device_map"] = device_map
    result: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
    model, loaded = result
    _check_loaded(folder, loaded)
    return model, loaded


def experts_of(model: nn.Module) -> dict[str, FusedExperts]:
    """The experts modules of a loaded model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedExperts)}


def _place(model: PreTrainedModel, spec: ExpertsSpec, experts: FusedExperts) -> None:
    """Put experts where the family's module stands; a block that would not tell them the routing is replaced too."""
    model.set_submodule(spec.module, experts)
    if spec.router_weight == "input":
        from quant_moelora.integrations.llama4 import route_in_block

        route_in_block(model, spec.module.rpartition(".")[0])


def _ignore_keys(model: PreTrainedModel, kind: str, patterns: set[str]) -> None:
    """Add to the keys that transformers does not report; the attribute is the class's until it is set here."""
    name = f"_keys_to_ignore_on_load_{kind}"
    setattr(model, name, {*(getattr(model, name) or ()), *patterns})


def _single_device(device_map: str | int | torch.device | dict[str, Any] | None) -> dict[str, Any] | None:
    """A device map of one device.

    Raises:
        UnsupportedError: several devices, or a strategy where there are several GPUs.
    """
    if device_map is None:
        return None
    if isinstance(device_map, dict):
        if len(set(device_map.values())) == 1 and "disk" not in device_map.values():
            return device_map
        found = f"{device_map}"
    elif device_map in STRATEGIES:
        gpus = torch.cuda.device_count()
        if gpus <= 1:
            return {"": torch.device("cuda", 0) if gpus else torch.device("cpu")}
        found = f"{device_map!r} and {gpus} GPUs"
    else:
        try:
            return {"": torch.device(device_map)}
        except RuntimeError:
            found = repr(device_map)
    raise UnsupportedError(
        "device_map",
        got=found,
        rule="one device: experts are neither spread over several nor offloaded to cpu or disk",
        remedy="name the device, for instance device_map='cuda:0', or set CUDA_VISIBLE_DEVICES",
    )


def _check_loaded(folder: Path, loaded: dict[str, Any]) -> None:
    """Raise for parameters that transformers left at random values or did not fit; log what was left over."""
    problems: tuple[tuple[str, Callable[..., FormatError]], ...] = (
        ("missing_keys", MissingTensorError),
        ("mismatched_keys", FormatError),
    )
    for kind, error in problems:
        keys = sorted(str(key) for key in loaded.get(kind) or ())
        if keys:
            raise error(
                f"{len(keys)} {kind.replace('_', ' ')} of {folder}",
                got=", ".join(keys[:5]) + (", ..." if len(keys) > 5 else ""),
                rule="every parameter of the model in the checkpoint, in its shape",
                remedy="download the checkpoint again, or use the config that belongs to it",
            )
    unexpected = sorted(loaded.get("unexpected_keys") or ())
    if unexpected:
        logger.warning("%d tensors of %s belong to nothing in the model: %s", len(unexpected), folder, unexpected[:5])
