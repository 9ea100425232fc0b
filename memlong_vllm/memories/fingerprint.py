"""What identifies the part of a model that computes the stored keys and values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from memlong_vllm.config import MemLongConfig, MemoryConfigError
from memlong_vllm.memories.errors import FingerprintError

NUM_SAMPLES = 16
SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000
_CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "vocab_size",
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")
_EMBEDDING = re.compile(r"(?:^|\.)embed_tokens\.")
_MADE_FROM = re.compile(r"input_layernorm\.|self_attn\.(?:k_proj|v_proj|qkv_proj)\.")
_MEMORY_PARAMETER = re.compile(r"(?:^|\.)memory_[^.]*$")


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int  # Offset in the file, in bytes.
    num_bytes: int


def model_fingerprint(checkpoint_dir: str | Path, memory_layer: int, local_window: int | None = None) -> str:
    """Hash what determines the keys and values of the memory layer.

    That is the settings of the layers, the window they attend to, the token embeddings, all of
    the layers below ``memory_layer`` and, of that layer, what makes keys and values. Layers above
    and what attends to memory do not count, so fine-tuned gates keep their memories.

    Of each tensor, name, dtype, shape and 16 evenly spaced pieces of 4 KiB count, not every byte:
    that is 64 KiB a tensor for any size of model. Training changes nearly all of a tensor; an edit
    that lies wholly between the pieces goes unseen.

    Args:
        checkpoint_dir: a folder, or the hub name of a checkpoint that was downloaded.
        local_window: tokens a token attends to; by default as the checkpoint says.

    Returns:
        64 hexadecimal digits.

    Raises:
        FingerprintError: if there are no local safetensors, or layers are missing in them.
    """
    folder = _local_folder(checkpoint_dir)
    digest = hashlib.sha256()
    digest.update(json.dumps(_settings(folder, memory_layer, local_window), sort_keys=True).encode())
    tensors = sorted(_counting(folder, memory_layer), key=lambda tensor: tensor.name)
    _require_layers(folder, tensors, memory_layer)
    for tensor in tensors:
        digest.update(f"\n{tensor.name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for piece in _samples(tensor):
            digest.update(piece)
    return digest.hexdigest()


def _local_folder(checkpoint: str | Path) -> Path:
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(str(checkpoint), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = "neither a folder nor a model that the hub's cache holds"
        wanted = "the checkpoint's files must be here, to tell weights apart"
        raise FingerprintError(f"{wanted}: {checkpoint} is {reason}") from error


def _settings(folder: Path, memory_layer: int, local_window: int | None) -> dict[str, object]:
    try:
        config = MemLongConfig.from_pretrained(folder)
        window = config.memory.local_window if local_window is None else local_window
    except (MemoryConfigError, ValueError, OSError) as error:
        raise FingerprintError(f"{folder}: {error}") from error
    values = {name: getattr(config, name) for name in _CONFIG_FIELDS}
    return values | {"memory_layer": memory_layer, "local_window": window}


def _counting(folder: Path, memory_layer: int) -> Iterator[_Tensor]:
    for tensor in _tensors(folder):
        layer = _LAYER.search(tensor.name)
        if layer is None:
            counts = _EMBEDDING.search(tensor.name) is not None
        elif int(layer[1]) == memory_layer:
            counts = _MADE_FROM.match(layer[2]) is not None
        else:
            counts = int(layer[1]) < memory_layer
        if counts and not _MEMORY_PARAMETER.search(tensor.name):
            yield tensor


def _require_layers(folder: Path, tensors: list[_Tensor], memory_layer: int) -> None:
    found = {int(match[1]) for tensor in tensors if (match := _LAYER.search(tensor.name))}
    missing = [f"layer {n}" for n in range(memory_layer + 1) if n not in found]
    if not any(_EMBEDDING.search(tensor.name) for tensor in tensors):
        missing.append("embed_tokens")
    if missing:
        raise FingerprintError(f"{folder}: no safetensors file holds {', '.join(missing)}")


def _tensors(folder: Path) -> Iterator[_Tensor]:
    """All tensors of a checkpoint, from the headers of its files."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = sorted({folder / Path(file).name for file in json.loads(index.read_bytes())["weight_map"].values()})
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FingerprintError(f"its safetensors must be here, to tell weights apart: {folder} has none")
        for file in files:
            yield from _header(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FingerprintError):
            raise
        raise FingerprintError(f"{folder}: cannot read the weights' headers: {error}") from error


def _header(file: Path) -> Iterator[_Tensor]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise FingerprintError(f"{file}: not a safetensors file")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield _Tensor(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + start, end - start)


def _samples(tensor: _Tensor) -> Iterator[bytes]:
    """Evenly spaced pieces of a tensor's bytes, the first and the last among them."""
    span = max(0, tensor.num_bytes - SAMPLE_BYTES)
    offsets = dict.fromkeys(span * i // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES))
    with tensor.file.open("rb") as opened:
        for offset in offsets:
            size = min(SAMPLE_BYTES, tensor.num_bytes - offset)
            opened.seek(tensor.start + offset)
            piece = opened.read(size)
            if len(piece) != size:
                raise FingerprintError(f"{tensor.file}: cut short within {tensor.name}")
            yield piece
