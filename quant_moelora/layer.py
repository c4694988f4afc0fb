"""MoEExperts: a backend, an info and an injection."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quant_moelora.core.backend import ExpertsBackend, Prepared
from quant_moelora.core.errors import AdapterError, BackendError, PrecisionWarning, ShapeError
from quant_moelora.core.injection import Injection
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts.base_injection import BaseInjection
from quant_moelora.experts.registry import AUTO, select_backend
from quant_moelora.kernels.grouped_gemm.table import tuned_folder
from quant_moelora.lora.injection import LoRAInjection
from quant_moelora.probe import check_adapters

logger = logging.getLogger(__name__)


class MoEExperts(nn.Module):
    """The routed experts of one layer.

    The info's tensors are held as non-persistent buffers. Moving the module moves them bit for bit; ``.to(dtype)``
    leaves them alone, since packed codes and raw scales have no other dtype to be in.

    Args:
        info: the experts' weights.
        backend: name of a registered backend; ``auto`` for what QUANT_MOELORA_BACKEND names, or else the first one that
            serves; or a backend of one's own, which is tried on a small layer first (`check_adapters`).
        tuned_configs: folder with tables of `quant-moelora tune`, which a backend with tiles reads on its first
            forward, before those that are shipped; None for what QUANT_MOELORA_TUNED_CONFIGS names, if it does.
        workspace: buffers that other layers on its device use too, one after the other; otherwise it has its own.

    Raises:
        ShapeError: the info is a part of a layer.
        FormatError: there is no such folder; on the first forward, a file in it is no table.
        BackendError: on the first forward in a dtype that the backend does not serve.
    """

    def __init__(
        self,
        info: MoEQuantInfo,
        backend: str | ExpertsBackend = AUTO,
        tuned_configs: str | os.PathLike[str] | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__()
        self._choice = backend
        self._shared = workspace
        self.tuned_configs = tuned_folder(tuned_configs)
        self._captured_without_lora = False
        self._set_info(info)

    def _check_shard(self, info: MoEQuantInfo) -> None:
        """Raise unless the output of this layer is that of ``info``'s layer."""
        if info.shard is not None and info.shard.config.world_size > 1:
            raise ShapeError(
                "layer of experts",
                got=f"a part of one, {info.shard}",
                rule="a whole layer, since the sum over all parts is the layer's output",
                remedy="use DistributedExperts, which sums them up",
            )

    def _set_info(self, info: MoEQuantInfo) -> None:
        self._check_shard(info)
        self.info = info
        for name, tensor in info.tensors().items():
            self.register_buffer(name.replace(".", "_"), tensor, persistent=False)
        self._base: Injection = BaseInjection(info)
        self.injection: Injection = self._base
        self._backend: ExpertsBackend | None = None
        self._prepared: Prepared | None = None
        self._workspace: Workspace | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEExperts:
        """Follow a move to another device and rebuild the info there; dtype casts do not apply."""
        device = fn(torch.empty(0, dtype=torch.int32, device=self.info.device)).device
        if device != self.info.device:
            if self.injection.ctx is not None:
                raise AdapterError(
                    "moving experts",
                    got="adapters attached",
                    rule="none, since the adapters' addresses must not change",
                    remedy="move the model first and attach adapters afterwards",
                )
            self._set_info(self.info.to(device))
        return self

    def attach(self, ctx: MoELoRAContext | None) -> None:
        """Serve the adapters of ``ctx`` from now on (None: none). The injection is built here, once.

        Compiled code follows, since it is made anew for another injection. A CUDA graph that was captured by hand
        around compiled code does not, and is not known here.

        Raises:
            AdapterError: the context is of other dimensions or on another device.
            BackendError: a CUDA graph was captured without LoRA and would go on without it.
        """
        if ctx is None:
            self.injection = self._base
            return
        info = self.info
        got = (ctx.num_experts, ctx.hidden_size, ctx.inter_pad, ctx.shard, ctx.arena.device)
        expected = (info.num_experts, info.hidden_size, info.inter_pad, info.shard, info.device)
        if got != expected:
            raise AdapterError(
                "LoRA context (E, H, inter_pad, shard, device)",
                got=got,
                rule=f"the layer's {expected}",
                remedy="build the context from this layer's info",
            )
        if self._captured_without_lora:
            raise BackendError(
                "attaching adapters",
                got="a CUDA graph captured without LoRA",
                rule="adapters attached before the capture",
                remedy="attach an adapter first, then capture; adapters can change between replays",
            )
        _stays(ctx.tensors().values())
        self.injection = LoRAInjection(self._base, ctx, info)

    def forget_captures(self) -> None:
        """Say that no CUDA graph of a forward so far will be replayed once adapters are attached."""
        self._captured_without_lora = False

    @property
    def backend(self) -> ExpertsBackend | None:
        """The backend chosen, once a forward has needed one."""
        return self._backend

    def prepare(self, dtype: torch.dtype) -> None:
        """Choose the backend and make its view of the info in ``dtype``; otherwise the first forward in a dtype does.

        Compiled code leaves its graph for it, once. With ``fullgraph=True`` that is an error: call this before. What a
        cast to the dtype loses is said by a `PrecisionWarning`.

        Raises:
            BackendError: no backend serves the dtype, or one of one's own does not serve adapters.
        """
        info, choice = self.info, self._choice
        selection = select_backend(choice, info, info.device, dtype)
        logger.log(logging.INFO if choice == AUTO else logging.DEBUG, "%s", selection.report)
        if not isinstance(choice, str):
            check_adapters(choice, info, dtype)
        self._backend = selection.backend
        self._prepared = selection.backend.prepare(info, dtype, self.tuned_configs)
        _stays([*info.tensors().values(), *self._prepared.tensors.values()])
        shared = self._shared if self._shared is not None and self._shared.device == info.device else None
        self._workspace = shared or selection.backend.workspace(info)
        if self._prepared.lossy:
            # Python shows a warning of the same words once: the layers of a model mostly lose the same.
            warnings.warn(f"experts in {dtype}: {self._prepared.lossy}", PrecisionWarning, stacklevel=2)

    def forward(
        self,
        x: Tensor,  # (M, H) float
        topk_ids: Tensor,  # (M, k) int, ids outside 0..E-1 = no expert here
        topk_weights: Tensor,  # (M, k) float
        adapter_ids: Tensor | None = None,  # (M,) int, slot of each token's adapter, -1 = base
    ) -> Tensor:  # (M, H) of x's dtype
        """Weighted sum of each token's experts, with each token's adapter.

        Raises:
            ShapeError: x is not [M, H], or the routing is of other tokens.
            AdapterError: adapter ids are given and no adapter is attached.
            BackendError: no backend serves x's dtype.
        """
        self._check_tokens(x, topk_ids, adapter_ids)
        # Compiled code is checked against the injection it was made for, each time it runs.
        if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            self._captured_without_lora |= self.injection.ctx is None
        slots = None if adapter_ids is None else adapter_ids.to(torch.int32)
        ctx = self.injection.ctx
        given = {} if ctx is None else {"num_slots": ctx.num_slots}
        routing = Routing(topk_ids, topk_weights.to(torch.float32), slots, **given)
        if self._prepared is None or self._prepared.dtype != x.dtype:
            if torch.compiler.is_compiling():
                apart: Any = torch.compiler.disable(self.prepare, reason="call MoEExperts.prepare before compiling")
                apart(x.dtype)
            else:
                self.prepare(x.dtype)
        assert self._backend is not None and self._prepared is not None and self._workspace is not None  # prepare
        return self._backend.apply(x, self._prepared, routing, self.injection, self._workspace)

    def _check_tokens(
        self,
        x: Tensor,  # (M, H)
        topk_ids: Tensor,  # (M, k)
        adapter_ids: Tensor | None,  # (M,)
    ) -> None:
        """Raise what `forward` raises."""
        if x.ndim != 2 or x.shape[1] != self.info.hidden_size:
            raise ShapeError(
                "x",
                got=f"shape {list(x.shape)}",
                rule=f"[tokens, {self.info.hidden_size}]",
                remedy="flatten batch and sequence into one dimension of tokens",
            )
        if topk_ids.shape[:1] != x.shape[:1]:
            raise ShapeError(
                "topk_ids",
                got=f"{topk_ids.shape[0]} tokens",
                rule=f"{x.shape[0]} tokens, those of x",
                remedy="route the tokens that are passed",
            )
        if adapter_ids is not None and self.injection.ctx is None:
            raise AdapterError(
                "adapter_ids", got="ids", rule="None while no adapter is attached", remedy="attach the adapters first"
            )

    def extra_repr(self) -> str:
        """Dimensions, scheme and activation, for `print(model)`."""
        info = self.info
        return (
            f"experts={info.num_experts}, hidden={info.hidden_size}, intermediate={info.intermediate_size}, "
            f"scheme={info.scheme_name}, activation={info.activation.name}"
        )


def _stays(tensors: Iterable[Tensor]) -> None:
    """Tell torch.compile that tensors keep their addresses: its CUDA graphs would copy them before each replay."""
    for tensor in tensors:
        if tensor.is_cuda:  # only there are graphs, and this imports the compiler
            torch._dynamo.mark_static_address(tensor)  # pyright: ignore[reportPrivateUsage] - documented so
