"""What fine-tuning learns, in memory."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from memlong_vllm.adapters.base_identity import BaseIdentity
from memlong_vllm.adapters.errors import AdapterError
from memlong_vllm.config import MemoryConfig, MemoryConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LORA_TARGETS = "(?:self_attn\\.[qkvo]_proj|mlp\\.(?:gate|up|down)_proj)"
_LORA = re.compile(rf"(model\.layers\.\d+\.{LORA_TARGETS})\.lora_([AB])")
_PARAMETER = re.compile(
    rf"model\.layers\.\d+\.(?:{LORA_TARGETS}\.(?:weight|bias)|(?:input|post_attention)_layernorm\.weight)"
    r"|model\.(?:norm|embed_tokens)\.weight|lm_head\.weight"
)
_MEMORY_PARAMETER = re.compile(r"model\.layers\.(\d+)\.self_attn\.(memory_(?:gate|bias|k_adapter|v_adapter))")
_DIMENSIONS = {"memory_gate": 1, "memory_bias": 1, "memory_k_adapter": 2, "memory_v_adapter": 2}


@dataclass(frozen=True)
class LoraSettings:
    """Of all LoRA pairs of an adapter. What they add is ``alpha / rank * B @ A``."""

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise AdapterError(f"lora.rank = {self.rank!r}: must be a positive integer")
        if type(self.alpha) not in (int, float) or not math.isfinite(self.alpha):
            raise AdapterError(f"lora.alpha = {self.alpha!r}: must be a finite number")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """What fine-tuning learned for one base model.

    Attributes:
        tensors: of float32, bfloat16 or float16. ``<module>.lora_A`` [rank, in] and
            ``<module>.lora_B`` [out, rank] for the attention's and the MLP's projections
            (``model.layers.18.self_attn.q_proj.lora_A``); whatever was trained whole under its
            name in the checkpoint: ``model.layers.N.self_attn.memory_gate`` [heads],
            ``model.layers.N.input_layernorm.weight`` [hidden], …
        lora: None if there are no LoRA pairs.
        memlong: the checkpoint's ``memlong`` block, or the part of it that is known.
        base: the base model; None if that is unknown, as with an imported PEFT adapter.
        training: how it was trained and how well it does; free, as long as JSON holds it.

    Raises:
        AdapterError: if a tensor's name, shape, dtype or values cannot be, or it contradicts the block.
    """

    tensors: dict[str, torch.Tensor]
    lora: LoraSettings | None
    memlong: dict[str, Any]
    base: BaseIdentity | None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tensors:
            raise AdapterError("the adapter has no tensors: nothing was learned")
        for name, tensor in self.tensors.items():
            _check_tensor(name, tensor, self.lora)
        _check_pairs(self.tensors, self.lora)
        memory = _check_block(self.memlong, self.base)
        for name, tensor in self.tensors.items():
            _check_memory_parameter(name, tensor, memory, self.memlong)
        try:
            json.dumps(self.training, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"training cannot be written as JSON: {error}") from error

    def lora_modules(self) -> list[str]:
        """The modules with LoRA pairs, such as ``model.layers.18.self_attn.q_proj``, sorted."""
        return sorted({match[1] for name in self.tensors if (match := _LORA.fullmatch(name))})

    def whole_parameters(self) -> list[str]:
        """The names of what was trained whole, sorted."""
        return sorted(name for name in self.tensors if not _LORA.fullmatch(name))

    def metadata(self) -> dict[str, Any]:
        """All but the tensors, as JSON holds it."""
        lora = None if self.lora is None else {"rank": self.lora.rank, "alpha": self.lora.alpha}
        base = None if self.base is None else self.base.to_dict()
        return {"lora": lora, "memlong": self.memlong, "base": base, "training": self.training}

    def digest(self) -> str:
        """64 hexadecimal digits of all there is in it."""
        digest = hashlib.sha256(json.dumps(self.metadata(), sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _check_tensor(name: str, tensor: torch.Tensor, lora: LoraSettings | None) -> None:
    pair, memory = _LORA.fullmatch(name), _MEMORY_PARAMETER.fullmatch(name)
    if not (pair or memory or _PARAMETER.fullmatch(name)):
        raise AdapterError(
            f"{name!r} is not a parameter an adapter can hold: LoRA pairs of projections "
            "(model.layers.N.self_attn.q_proj.lora_A), or a parameter by its name in the checkpoint"
        )
    if tensor.dtype not in DTYPES:
        raise AdapterError(f"{name} is of {tensor.dtype}: must be float32, bfloat16 or float16")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{name} has values that are not finite: the training went wrong")
    if memory and tensor.dim() != _DIMENSIONS[memory[2]]:
        raise AdapterError(f"{name} has shape {list(tensor.shape)}: must have {_DIMENSIONS[memory[2]]} dimensions")
    if pair is None:
        return
    if lora is None:
        raise AdapterError(f"{name} is there without LoRA settings: rank and alpha must be given")
    if tensor.dim() != 2 or tensor.shape[0 if pair[2] == "A" else 1] != lora.rank:
        form = "[rank, in]" if pair[2] == "A" else "[out, rank]"
        raise AdapterError(f"{name} has shape {list(tensor.shape)}: must be {form} with rank {lora.rank}")


def _check_pairs(tensors: dict[str, torch.Tensor], lora: LoraSettings | None) -> None:
    pairs = [match for name in tensors if (match := _LORA.fullmatch(name))]
    for match in pairs:
        other = f"{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}"
        if other not in tensors:
            raise AdapterError(f"{other} is missing: {match[0]} is one half of a LoRA pair")
    if lora is not None and not pairs:
        raise AdapterError("there are LoRA settings but no LoRA pairs: leave them out")


def _check_block(block: object, base: BaseIdentity | None) -> MemoryConfig:
    """The block validated; what it leaves out is filled in for that."""
    if not isinstance(block, dict):
        raise AdapterError(f"memlong = {block!r}: must be an object")
    layers = block.get("retrieval_layers") or [block.get("memory_layer", 0)]
    known = {"memory_layer": layers[0], "retrieval_layers": layers} if isinstance(layers, list | tuple) else {}
    try:
        json.dumps(block)
        return MemoryConfig.from_dict(known | block, base.num_hidden_layers if base else 1 << 20)
    except (MemoryConfigError, TypeError) as error:
        raise AdapterError(str(error)) from error


def _check_memory_parameter(name: str, tensor: torch.Tensor, memory: MemoryConfig, block: dict[str, Any]) -> None:
    match = _MEMORY_PARAMETER.fullmatch(name)
    if match is None:
        return
    if "retrieval_layers" in block and int(match[1]) not in memory.retrieval_layers:
        raise AdapterError(f"{name}: memlong.retrieval_layers is {list(memory.retrieval_layers)}, without that layer")
    if match[2] == "memory_bias" and block.get("memory_bias") is False:
        raise AdapterError(f"{name}: memlong.memory_bias is false")
    if match[2].endswith("_adapter") and "memory_adapter" in block and memory.memory_adapter is None:
        raise AdapterError(f"{name}: memlong.memory_adapter is null")
    if match[2].endswith("_adapter") and tensor.shape[1] != memory.memory_adapter_width * 2 * tensor.shape[0]:
        raise AdapterError(
            f"{name} has shape {list(tensor.shape)}: must have {memory.memory_adapter_width} x 2 times as many columns "
            "as rows (memlong.memory_adapter_width, and 1 without it)"
        )
