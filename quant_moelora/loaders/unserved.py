"""Formats that are recognised, so that they can be refused by name: nothing here is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.loaders.checkpoint import TensorHeader

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Unserved:
    """A format that is not served.

    Attributes:
        name: what it is called.
        names: regex of the end of a tensor's name.
        dtypes: the tensor's dtypes, if the name alone does not tell.
    """

    name: str
    names: str
    dtypes: tuple[torch.dtype, ...] = ()

    def matches(self, header: TensorHeader) -> bool:
        """Whether a tensor can only be of this format."""
        return bool(re.search(rf"[._](?:{self.names})$", header.key)) and (
            not self.dtypes or header.dtype in self.dtypes
        )


# The first that a tensor matches counts: the more special stand first. Names and dtypes are those that the formats'
# own tools write: transformers (mxfp4, bitsandbytes, finegrained fp8), compressed-tensors, NVIDIA ModelOpt, AutoAWQ,
# llm-awq, AutoGPTQ's and gptqmodel's marlin, exllama, vLLM's GGUF, HQQ, AQLM.
UNSERVED = (
    Unserved("MXFP4", r"proj_blocks"),
    Unserved("NVFP4", r"weight_scale_2|(?:weight|proj|input)_global_scale"),
    Unserved("bitsandbytes 4-bit", r"absmax|quant_map|quant_state\.bitsandbytes__\w+"),
    Unserved("bitsandbytes int8", r"SCB|weight_format"),
    Unserved("Marlin 2:4 (marlin_24)", r"B_24|B_meta|scale_packed|meta"),
    Unserved("Marlin", r"B|workspace", (torch.int32,)),
    Unserved("EXL2", r"q_weight|q_scale|q_invperm"),
    Unserved("EXL3", r"trellis|suh|svh"),
    Unserved("GGUF", r"qweight_type"),
    Unserved("HQQ", r"W_q"),
    Unserved("AQLM", r"codebooks"),
    Unserved("sparse compressed-tensors", r"bitmask"),
    Unserved("llm-awq", r"scaled_zeros"),
    Unserved("AWQ GEMV_FAST", r"qweight", (torch.int16,)),
    Unserved("FP8 with a scale for each block", r"(?:weight|proj)_scale_inv"),
    Unserved("MXFP4", r"weight_packed|proj_packed|weight_scale", (torch.uint8,)),
    Unserved("FP8", r"weight|gate_up_proj|down_proj", FLOAT8),
    Unserved("packed bytes, such as bitsandbytes 4-bit", r"weight", (torch.uint8,)),
)


def refuse_unserved(what: str, headers: Iterable[TensorHeader]) -> None:
    """Raise UnsupportedError if one of the tensors can only be of a format that is known and not served."""
    held = list(headers)
    for unserved in UNSERVED:
        for header in held:
            if unserved.matches(header):
                suffix = header.key.rpartition(".")[2]
                raise UnsupportedError(
                    f"format of {what}",
                    got=f"{unserved.name}: {suffix} {header.dtype} {list(header.shape)} ({header.where})",
                    rule="GPTQ, AWQ or compressed-tensors in int4 or int8, or float32, bfloat16, float16",
                    remedy="this format is not served: take another checkpoint of the model",
                )
