"""Adapters as folders of the PEFT library (``adapter_config.json``, ``adapter_model.safetensors``).

Which tensor is which:

========================================================  =====================================
in the folder, after ``base_model.model.``                in an :class:`Adapter`
========================================================  =====================================
``<projection>.lora_A.weight``, ``.lora_B.weight``        ``<projection>.lora_A``, ``.lora_B``
a module of ``modules_to_save`` (norms, embeddings, …)    its parameters by their own names
``<projection>.base_layer.bias`` (``bias: "all"``)        ``<projection>.bias``
``model.layers.N.self_attn.memory_gate`` and the like     the same
``…self_attn.ret_gate.output_gate`` [1, heads, 1, 1]      ``…self_attn.memory_gate`` [heads]
``…rotary_emb.inv_freq``                                  nothing: it follows from the configuration
========================================================  =====================================

The last but one are the gates of the authors' released script; see :mod:`.released_script`. Other
tensors are refused by name. ``rank_pattern``, ``alpha_pattern`` and ``use_rslora`` come out as one
rank and one alpha of the same effect. What changes the base or adds other parameters (DoRA, PiSSA,
trainable tokens, …) is refused by the field's name.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memlong_vllm.adapters.adapter import Adapter, LoraSettings
from memlong_vllm.adapters.adapter_file import dump_blocks, load_adapter, parse_blocks
from memlong_vllm.adapters.errors import AdapterError
from memlong_vllm.adapters.released_script import GATE, gate_name, memlong_block

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_WRAPPED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)|\.base_layer(?=\.)")
# Fields of adapter_config.json that say nothing more about the weights.
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "modules_to_save", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config", "bias",
}  # fmt: skip
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
# Initialisations that leave the base as it is; others move part of its weights into the pairs.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter(path: str | Path) -> Adapter:
    """An adapter file, or a folder of the PEFT library. Raises AdapterError."""
    path = Path(path)
    if not path.exists():
        raise AdapterError(f"{path}: no such file or folder")
    return read_peft(path) if path.is_dir() else load_adapter(path)


def read_peft(folder: str | Path) -> Adapter:
    """Read a LoRA adapter of the PEFT library.

    One that :func:`write_peft` wrote comes back whole. Others know neither their base model nor the
    ``memlong`` block: ``base`` is None and ``memlong`` what the gates, or the ``config.json`` that
    the authors' script leaves in the folder, tell of it.

    Raises:
        AdapterError: naming file and field, or the tensor, that cannot be used.
    """
    folder = Path(folder)
    try:
        config = _read_config(folder / CONFIG)
        weights, metadata = _read_weights(folder)
        tensors, lora = _uniform(_named(weights), config)
        if "memlong" in metadata:
            return Adapter(**parse_blocks(metadata) | {"tensors": tensors, "lora": lora})
        has_gates = any(key.endswith(GATE) for key in weights)
        block, notes = memlong_block(folder / "config.json", has_gates)
        training = {"source": "PEFT", "adapter_config": {name: config[name] for name in sorted(config)}, **notes}
        return Adapter(tensors, lora, block, None, training)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from error


def write_peft(adapter: Adapter, folder: str | Path) -> None:
    """Write an adapter as the PEFT library does: ``PeftModel.from_pretrained(model, folder)`` loads
    it over the reference model, or over a plain Llama, for which gates and the like are left out.

    What PEFT has no place for (base, ``memlong`` block, training) is in the weights' metadata.

    Raises:
        AdapterError: if there are no LoRA pairs, which PEFT needs, or the folder is not empty.
    """
    folder = Path(folder)
    if adapter.lora is None:
        raise AdapterError("PEFT has no adapter without LoRA pairs: this one was trained without them")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(f"{folder} exists and is not an empty folder: choose another or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in adapter.tensors.items():
        key = f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name
        tensors[PREFIX + key] = tensor.detach().cpu().clone().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"} | dump_blocks(adapter))
    (folder / WEIGHTS).chmod(0o644)
    (folder / CONFIG).write_text(json.dumps(_config(adapter, adapter.lora), indent=2) + "\n")


def _config(adapter: Adapter, lora: LoraSettings) -> dict[str, Any]:
    whole = adapter.whole_parameters()
    # Modules that hold this parameter alone. The rest PEFT loads into the model itself, by name; the
    # embeddings too, since a saved module is a copy, which would leave a tied lm_head behind.
    saved = [name.removesuffix(".weight") for name in whole if name.endswith(("norm.weight", "lm_head.weight"))]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "target_modules": adapter.lora_modules(), "modules_to_save": saved or None,
    }  # fmt: skip


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"no readable {path.name}, as a PEFT adapter has: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterError(f"{path.name}: peft_type = {kind!r}: only 'LORA' can be merged")
    for name, value in config.items():
        if name not in _HARMLESS | _READ and value:
            raise AdapterError(f"{path.name}: {name} = {value!r} is not supported: only plain LoRA can be merged")
    initial = config.get("init_lora_weights")
    if initial not in _INITIALISATIONS:
        rule = "takes part of the base's weights into the pairs; convert it to plain LoRA with PEFT first"
        raise AdapterError(f"{path.name}: init_lora_weights = {initial!r} {rule}")
    return config


def _read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The folder's tensors as they are named there, and the file's metadata."""
    try:
        if (folder / WEIGHTS).is_file():
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                metadata = {name: text for name, text in (file.metadata() or {}).items() if name != "format"}
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
        if (folder / OLD_WEIGHTS).is_file():
            return torch.load(folder / OLD_WEIGHTS, map_location="cpu", weights_only=True), {}
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise AdapterError(f"the weights cannot be read: {error}") from error
    raise AdapterError(f"neither {WEIGHTS} nor {OLD_WEIGHTS} is there")


def _named(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names of an :class:`Adapter`, which refuses those it does not know."""
    tensors = {}
    for key, tensor in weights.items():
        if not key.startswith(PREFIX):
            raise AdapterError(f"the tensor {key!r} does not begin with {PREFIX!r}: not of a causal language model")
        name = _WRAPPED.sub("", key.removeprefix(PREFIX))
        if name.endswith("rotary_emb.inv_freq") or ".original_module." in name:
            continue
        if name.endswith(GATE):
            name, tensor = gate_name(name), tensor.reshape(-1)
            if not tensor.any():
                continue  # As converted: also the memory layer has one, though it may not retrieve.
        elif (match := _LORA_KEY.fullmatch(name)) is not None:
            name = f"{match[1]}.lora_{match[2]}"
        tensors[name] = tensor.clone()
    return tensors


@dataclass(frozen=True)
class _Pair:
    """A module's rank and the factor of ``B @ A``, by ``adapter_config.json``."""

    rank: int
    scale: float


def _uniform(
    tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], LoraSettings | None]:
    """Pairs of one rank and one scale: lower ranks padded with zeros, other scales moved into B."""
    modules = {name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")}
    if not modules:
        return tensors, None
    pairs = {module: _pair(module, config) for module in modules}
    rank = max(pair.rank for pair in pairs.values())
    usual = _pair("", config)
    is_plain = rank == usual.rank and not config.get("use_rslora")
    lora = LoraSettings(rank, config["lora_alpha"] if is_plain else usual.scale * rank)
    result = dict(tensors)
    for module, pair in pairs.items():
        for half, dimension in (("A", 0), ("B", 1)):
            name = f"{module}.lora_{half}"
            if name not in tensors:
                continue  # Said when the adapter is made.
            if tensors[name].dim() != 2 or tensors[name].shape[dimension] != pair.rank:
                shape = list(tensors[name].shape)
                raise AdapterError(f"{name} has shape {shape}, but {CONFIG} says rank {pair.rank} (r, rank_pattern)")
            factor = pair.scale / usual.scale if half == "B" else 1.0
            result[name] = _padded(tensors[name], dimension, rank, factor)
    return result, lora


def _pair(module: str, config: dict[str, Any]) -> _Pair:
    rank = _by_pattern(module, config.get("rank_pattern"), config.get("r"))
    alpha = _by_pattern(module, config.get("alpha_pattern"), config.get("lora_alpha"))
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"{CONFIG}: r = {rank!r}: must be a positive integer")
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha == 0:
        raise AdapterError(f"{CONFIG}: lora_alpha = {alpha!r}: must be a number other than 0")
    return _Pair(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(module: str, patterns: dict[str, Any] | None, default: Any) -> Any:
    """As PEFT looks patterns up: the first one that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _padded(tensor: torch.Tensor, dimension: int, rank: int, factor: float) -> torch.Tensor:
    if factor != 1.0:
        tensor = tensor.float() * factor
    if tensor.shape[dimension] == rank:
        return tensor
    shape = list(tensor.shape)
    shape[dimension] = rank - shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dimension)
