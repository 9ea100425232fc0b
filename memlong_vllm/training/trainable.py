"""Which parameters learn, and what they have learned as an adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from memlong_vllm.adapters.adapter import Adapter, LoraSettings
from memlong_vllm.adapters.base_identity import BaseIdentity
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_FULL = {
    "norms": re.compile(r"(?:input_layernorm|post_attention_layernorm)\.weight$|^model\.norm\.weight$"),
    "embeddings": re.compile(r"^(?:model\.embed_tokens|lm_head)\.weight$"),
}


class SettingsError(ValueError):
    """A setting is invalid. The message names it, its value and the rule."""


@dataclass(frozen=True)
class TrainedParts:
    """What learns beside the parameters of memory.

    Attributes:
        rank, alpha: of LoRA; its effect is scaled by alpha / rank. Rank 0: no LoRA.
        dropout: of LoRA's input.
        targets: linear layers that get LoRA, of all layers above the memory layer, and of the
            memory layer if it also reads. Its keys and values never do: they are what is stored.
        full: ``"norms"`` of these layers, ``"embeddings"``: trained whole. Of embeddings it is the
            head's: those of the input are frozen, or the bank's contents would change. A model that
            ties the two cannot train them.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION
    full: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in (*ATTENTION, *MLP)]
        if unknown:
            raise SettingsError(f"LoRA targets {unknown} are unknown; there are {[*ATTENTION, *MLP]}")
        unknown = [name for name in self.full if name not in _FULL]
        if unknown:
            raise SettingsError(f"parts to train whole {unknown} are unknown; there are {sorted(_FULL)}")
        if not 0 <= self.dropout < 1:
            raise SettingsError(f"lora_dropout = {self.dropout}: must be at least 0 and less than 1")
        if self.rank > 0 and not self.targets:
            raise SettingsError("LoRA targets are none: name layers, or set its rank to 0")
        if self.rank < 0 or (self.rank > 0 and self.alpha <= 0):
            raise SettingsError(f"LoRA rank {self.rank} and alpha {self.alpha} must be positive (rank 0: no LoRA)")


def select_trained(model: MemLongForCausalLM, parts: TrainedParts, with_memory: bool) -> dict[str, nn.Parameter]:
    """Give ``model`` its LoRA layers and freeze everything else. Returns what learns, by name.

    Args:
        with_memory: whether gates, biases and adapters of memory learn.
    """
    if "embeddings" in parts.full and model.config.tie_word_embeddings:
        raise SettingsError(
            "train_whole = 'embeddings': must be left out, the model ties them and the frozen half reads them"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if parts.rank > 0:
        wanted = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and _gets_lora(name, parts.targets, model)
        ]
        pattern = "|".join(re.escape(name) for name in wanted)
        alpha: Any = parts.alpha  # Declared int, used as a number.
        config = LoraConfig(r=parts.rank, lora_alpha=alpha, lora_dropout=parts.dropout, target_modules=pattern)
        inject_adapter_in_model(config, model)
    trained = {name: parameter for name, parameter in model.named_parameters() if _learns(name, model, parts)}
    if not with_memory:
        trained = {name: parameter for name, parameter in trained.items() if ".memory_" not in name}
    if not trained:
        raise SettingsError(f"lora_rank = {parts.rank}: leaves nothing that learns, this memory has no parameters")
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return trained


def _learns(name: str, model: MemLongForCausalLM, parts: TrainedParts) -> bool:
    if ".memory_" in name:
        return _used(name, model)
    return ".lora_" in name or any(_FULL[part].search(name) and _may_change(name, model) for part in parts.full)


def _layer(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _gets_lora(name: str, targets: tuple[str, ...], model: MemLongForCausalLM) -> bool:
    layer, leaf = _layer(name), name.rpartition(".")[2]
    if layer is None or layer < _first_trained(model) or leaf not in targets:
        return False
    return layer > model.config.memory.memory_layer or leaf not in ("k_proj", "v_proj")


def _first_trained(model: MemLongForCausalLM) -> int:
    """The memory layer, where it reads as well as stores, else the one above it (section 3.1)."""
    memory = model.config.memory
    return memory.memory_layer + (memory.memory_layer not in memory.retrieval_layers)


def _used(name: str, model: MemLongForCausalLM) -> bool:
    """Whether a parameter of memory has any effect with the model's fusion."""
    memory = model.config.memory
    if name.endswith("memory_gate"):
        return memory.fusion != "joint"
    if name.endswith("memory_bias"):
        return memory.fusion != "gated"
    # What the memory layer stored is what it wants to read; its adapter stays the identity.
    return _layer(name) != memory.memory_layer


def _may_change(name: str, model: MemLongForCausalLM) -> bool:
    """False for what the frozen half, or what it stores, is made of."""
    layer, memory_layer = _layer(name), model.config.memory.memory_layer
    if layer is not None:
        return layer >= _first_trained(model) and not (layer == memory_layer and "input_layernorm" in name)
    return not name.startswith("model.embed_tokens")


def learned_tensors(model: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """What was learned, on the CPU, by the names of an adapter file: LoRA's halves as
    ``….q_proj.lora_A`` and ``.lora_B``, everything else by its checkpoint name."""
    return {_in_file(name): parameter.detach().cpu().clone() for name, parameter in trained.items()}


def _in_file(name: str) -> str:
    return re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)


def start_from(adapter: Adapter, base: BaseIdentity, parts: TrainedParts, trained: dict[str, nn.Parameter]) -> None:
    """Give the parameters that learn what ``adapter`` learned, in place.

    Raises:
        SettingsError: if it is another model's, or holds another selection of parameters.
    """
    if adapter.base is not None and (differences := adapter.base.differences(base)):
        raise SettingsError(f"start: the adapter is another base model's: {'; '.join(differences)}")
    lora = LoraSettings(parts.rank, parts.alpha) if parts.rank else None
    if adapter.lora != lora:
        raise SettingsError(f"start: the adapter has {adapter.lora}, this run {lora}: give the same rank and alpha")
    differing = sorted(adapter.tensors.keys() ^ {_in_file(name) for name in trained})
    if differing:
        raise SettingsError(
            f"start: {len(differing)} parameters learn in one of adapter and run only, the first {differing[0]}: "
            "train the same parts of the same retrieval layers"
        )
    for name, parameter in trained.items():
        learned = adapter.tensors[_in_file(name)]
        if learned.shape != parameter.shape:
            raise SettingsError(f"start: {name} is {list(learned.shape)} in the adapter, {list(parameter.shape)} here")
        parameter.data.copy_(learned)


def half_precision(model: MemLongForCausalLM, dtype: torch.dtype) -> None:
    """Keep frozen matrices in ``dtype``; norms, and whatever learns, stay in float32."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dim() == 2:
            parameter.data = parameter.data.to(dtype)
