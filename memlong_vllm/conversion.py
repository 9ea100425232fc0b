"""A MemLong checkpoint from any local Llama-architecture model, and adapters merged into it."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from memlong_vllm.adapters import Adapter, merge_adapter
from memlong_vllm.config import ARCHITECTURE, UNSUPPORTED_ROPE, MemLongConfig, MemoryConfig
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM

SHIPPED_CODE = ("configuration_memlong.py", "modeling_memlong.py", "retrieval.py")
AUTO_MAP = {
    "AutoConfig": "configuration_memlong.MemLongConfig",
    "AutoModelForCausalLM": f"modeling_memlong.{ARCHITECTURE}",
}
# What gives trained parameters their shape or meaning: an adapter works only as it was trained.
TRAINED_WITH = (
    "memory_layer", "retrieval_layers", "fusion", "memory_softmax", "memory_bias", "memory_adapter",
    "memory_adapter_width",
)  # fmt: skip


class ConversionError(ValueError):
    """The base model cannot become a MemLong checkpoint. The message says why and what to do."""


def preset(name: str, num_layers: int, trained_length: int) -> dict[str, Any]:
    """A ``memlong`` block for a backbone of any depth.

    Args:
        name: ``"paper"`` (memory layer 13th of 26, 1-based), ``"released"`` (the authors' script:
            the layer above it, itself a retrieval layer, ``joint`` fusion) or ``"small"`` (the
            layer of ``"released"`` and a window of at most 1024, for backbones of up to ~1B).
        trained_length: tokens the backbone was trained on.
    """
    window = min(2048, trained_length)
    memory_layer = max(0, min(num_layers - 1, (num_layers * 12) // 26 + (name != "paper")))
    first = memory_layer if name == "released" else memory_layer + 1
    # Every fourth layer, counted from the last one down, as 13, 17, 21, 25 are of 26.
    layers = [layer for layer in range(num_layers - 1, -1, -4) if layer >= min(first, num_layers - 1)]
    block = {
        "memory_layer": memory_layer,
        "retrieval_layers": sorted(layers),
        "chunk_size": 128,
        "top_k": 8,
        "memory_size": 32768,
        "local_window": window // 128 * 128,
        "retrieval_stride": 128,
        "query_tokens": 128,
        "query_scope": "preceding",
        "fusion": "joint" if name == "released" else "gated",
        "memory_softmax": "all",
        "retriever": {"model": "BAAI/bge-m3", "pooling": "cls", "max_length": 512, "query_instruction": None},
    }
    if name == "small":
        block["local_window"] = min(1024, window) // 128 * 128
    return block


def apply_settings(block: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """``block`` with dotted keys such as ``retriever.model`` set. Validation comes later."""
    result = json.loads(json.dumps(block))
    for key, value in settings.items():
        target = result
        *parents, leaf = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConversionError(f"--set {key}: {parent!r} is set to {target!r}, which has no fields")
        target[leaf] = value
    return result


def memlong_config(base: PreTrainedConfig, block: dict[str, Any], max_length: int | None) -> MemLongConfig:
    """The configuration of the converted checkpoint, validated.

    Args:
        max_length: how far sequences may reach; by default memory and window together, or what
            the backbone was trained on if that is more.

    Raises:
        ConversionError, MemoryConfigError: if the backbone or the block cannot be used.
    """
    if not isinstance(base, LlamaConfig):
        raise ConversionError(
            f"model_type {base.model_type!r} is not of the Llama architecture; supported is model_type 'llama'"
        )
    rope_type = (base.rope_parameters or {}).get("rope_type", "default")
    if rope_type in UNSUPPORTED_ROPE:
        raise ConversionError(f"RoPE scaling {rope_type!r} rotates keys anew as a sequence grows; it cannot be stored")
    trained = base.max_position_embeddings
    if isinstance(base, MemLongConfig) and base.backbone_max_position_embeddings is not None:
        trained = base.backbone_max_position_embeddings
    memory = MemoryConfig.from_dict(block, base.num_hidden_layers)
    # That of a MemLong base stays, also without memory, as a control is: it is measured beside the base.
    reached = base.max_position_embeddings if isinstance(base, MemLongConfig) else trained
    reach = max_length or max(reached, memory.memory_size + memory.local_window)
    values = base.to_dict() | {
        "memlong": memory.to_dict(),
        "max_position_embeddings": reach,
        "backbone_max_position_embeddings": trained,
        "architectures": [ARCHITECTURE],
        "auto_map": AUTO_MAP,
    }
    for name in ("model_type", "transformers_version", "quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(name, None)
    return MemLongConfig(**values)


def adapted_block(block: dict[str, Any], adapter: Adapter, settings: dict[str, Any]) -> dict[str, Any]:
    """``block`` with what the adapter was trained with, then ``settings``.

    Raises:
        ConversionError: if the settings contradict the adapter; see TRAINED_WITH.
        MemoryConfigError: if a field is invalid.
    """
    fixed = {name: value for name, value in adapter.memlong.items() if name in TRAINED_WITH}
    if {"memory_layer", "retrieval_layers"} <= fixed.keys():  # The whole block: what it leaves out is at its default.
        memory = MemoryConfig.from_dict(adapter.memlong, 1 + max(adapter.memlong["retrieval_layers"]))
        fixed = {name: value for name, value in memory.to_dict().items() if name in TRAINED_WITH}
    # A control has not learned to read: what it would retrieve only disturbs.
    off = {"memory_size": 0} if is_control(adapter) else {}
    result = apply_settings(block | adapter.memlong | fixed | off, settings)
    for name, value in fixed.items():
        if result[name] != value:
            wanted = f"--set {name}={json.dumps(result[name])}"
            raise ConversionError(
                f"{wanted} contradicts the adapter, which was trained with {json.dumps(value)}: leave it out"
            )
    return result


def is_control(adapter: Adapter) -> bool:
    """Whether it was trained without memory."""
    settings = adapter.training.get("settings")
    return isinstance(settings, dict) and settings.get("with_memory") is False


def load_base(base: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Model and tokenizer of a safetensors folder (Llama or MemLong) or a GGUF file (dequantised)."""
    if not base.exists():
        raise ConversionError(f"{base}: no such folder or file; the base model must be on this machine")
    is_gguf = base.suffix == ".gguf"
    folder = base.parent if is_gguf else base
    options: dict[str, Any] = {"gguf_file": base.name} if is_gguf else {}
    quantization = {"quantization_config": GgufConfig(dequantize=True)} if is_gguf else {}
    try:
        if is_memlong(base):
            model = MemLongForCausalLM.from_pretrained(base, dtype=dtype)
            return model, AutoTokenizer.from_pretrained(base, config=model.config)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options, **quantization), tokenizer
    except (OSError, ValueError) as error:
        raise ConversionError(f"{base} cannot be loaded as a model with tokenizer: {error}") from error


def is_memlong(base: Path) -> bool:
    """Whether this is the folder of a MemLong checkpoint."""
    try:
        values = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MemLongConfig.model_type


def convert(
    base: Path,
    output: Path,
    preset_name: str = "paper",
    settings: dict[str, Any] | None = None,
    max_length: int | None = None,
    dtype: str = "auto",
    adapter: Adapter | None = None,
    force: bool = False,
) -> MemLongConfig:
    """Write a MemLong checkpoint of ``base`` to ``output``: its weights, fresh (zero) gates,
    tokenizer, configuration and the reference model's code.

    Args:
        adapter: is merged into the weights; its ``memlong`` block takes the preset's place.
        force: merge it also into another base than it was trained on.

    Raises:
        ConversionError, MemoryConfigError, AdapterError: before anything is written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists and is not an empty folder: choose another or remove it")
    if max_length is not None and max_length < 1:
        raise ConversionError(f"--max-length {max_length}: must be positive")
    if adapter is None and is_memlong(base):
        raise ConversionError(f"{base} is a MemLong checkpoint already; what can be done to it is --adapter")
    # An adapter is merged into the weights as they are: rounding them first would make another base,
    # and rounding sums to the base's type would lose what an adapter changes little.
    model, tokenizer = load_base(base, dtype if adapter is None or dtype == "float32" else "auto")
    block = preset(preset_name, model.config.num_hidden_layers, model.config.max_position_embeddings)
    if isinstance(model.config, MemLongConfig):
        block |= model.config.memory.to_dict()
    settings = settings or {}
    block = apply_settings(block, settings) if adapter is None else adapted_block(block, adapter, settings)
    config = memlong_config(model.config, block, max_length)
    converted = converted_model(model, config)
    if adapter is not None:
        merge(adapter, converted, model, force)
        converted = converted if dtype == "auto" else converted.to(getattr(torch, dtype))
    write_checkpoint(converted, tokenizer, output)
    copy_retriever(base, config.memory.retriever.model, output)
    return config


def converted_model(base: PreTrainedModel, config: MemLongConfig) -> MemLongForCausalLM:
    """A MemLong model of the base's backbone, with fresh memory parameters."""
    with torch.device("meta"):
        converted = MemLongForCausalLM(config)
    converted = converted.to_empty(device="cpu").to(base.dtype)
    backbone = {name: tensor for name, tensor in base.state_dict().items() if ".memory_" not in name}
    missing, unexpected = converted.load_state_dict(backbone, strict=False, assign=True)
    if unexpected or any(".memory_" not in name and name != "lm_head.weight" for name in missing):
        raise ConversionError(f"the base model's weights do not fit: missing {missing}, unexpected {unexpected}")
    reset_memory_parameters(converted)
    converted.tie_weights()
    converted.generation_config = base.generation_config
    return converted


def merge(adapter: Adapter, model: MemLongForCausalLM, base: PreTrainedModel, force: bool) -> None:
    """Merge an adapter into the converted model and say so in its configuration.

    Raises:
        AdapterError: if it does not fit.
        ConversionError: if the base is a MemLong checkpoint of which trained parameters would get lost.
    """
    fresh = model.state_dict()
    for name, tensor in base.state_dict().items():
        is_unused = name.endswith(".memory_gate") and model.config.memory.fusion == "joint"
        if ".memory_" not in name or name in adapter.tensors or is_unused:
            continue
        if not torch.equal(tensor, fresh_value(name, tensor)):
            raise ConversionError(
                f"the checkpoint has a trained {name}, which the adapter does not: take the plain model it was made of"
            )
    model.load_state_dict(merge_adapter(adapter, fresh, model.config, force=force), assign=True)
    model.tie_weights()
    before = base.config.to_dict().get("memlong_adapter")
    made_from = {"digest": adapter.digest(), "training": adapter.training}
    model.config.memlong_adapter = made_from if before is None else made_from | {"merged_before": before}


def write_checkpoint(converted: MemLongForCausalLM, tokenizer: Any, output: Path) -> None:
    """Save a checkpoint folder that vLLM and transformers both load."""
    converted.save_pretrained(output)
    for weights in output.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes 0600: a service's account could not read it.
    tokenizer.save_pretrained(output)
    for name in SHIPPED_CODE:
        shutil.copyfile(str(files("memlong_vllm.reference") / name), output / name)
    saved = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(saved | {"auto_map": AUTO_MAP}, indent=2) + "\n")


def copy_retriever(base: Path, retriever: str, output: Path) -> None:
    """Copy the retriever that lies within the base's folder, if it is that which is configured."""
    source = base / retriever
    is_inside = base.resolve() in source.resolve().parents and not Path(retriever).is_absolute()
    if is_inside and source.is_dir():
        shutil.copytree(source, output / retriever, copy_function=shutil.copyfile, dirs_exist_ok=True)


def reset_memory_parameters(model: MemLongForCausalLM) -> None:
    """Give memory parameters what they begin with: the model is then exactly its window-only backbone."""
    for name, parameter in model.named_parameters():
        if ".memory_" in name:
            parameter.data.copy_(fresh_value(name, parameter))


def fresh_value(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """What a memory parameter begins with: gates and biases 0; adapters identity."""
    if not name.endswith(("memory_k_adapter", "memory_v_adapter")):
        return torch.zeros_like(parameter)
    identity = torch.eye(2 * parameter.shape[0], parameter.shape[1], dtype=parameter.dtype)
    first = 0 if name.endswith("memory_k_adapter") else parameter.shape[0]
    return identity[first : first + parameter.shape[0]]
