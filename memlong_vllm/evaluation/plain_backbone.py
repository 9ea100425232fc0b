"""The plain Llama model inside a MemLong checkpoint, as a checkpoint of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

# Of MemLong; popped where they are, so that a folder with a plain Llama model is taken as well.
OUR_FIELDS = ("memlong", "auto_map", "backbone_max_position_embeddings")


def plain_backbone(checkpoint: Path, output: Path, window: int | None = None) -> Path:
    """Write a checkpoint's backbone as an ordinary Llama model, without memory parameters.

    Args:
        checkpoint: of MemLong or of a plain Llama model, in safetensors.
        output: folder to make; it links to what need not change.
        window: tokens of the sliding window in every layer, or None for full attention.

    Returns:
        ``output``.
    """
    output.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    is_memlong = "memlong" in config
    for name in OUR_FIELDS:
        config.pop(name, None)
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if window is not None:
        config |= {"sliding_window": window, "layer_types": ["sliding_attention"] * config["num_hidden_layers"]}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    for file in checkpoint.iterdir():
        if not file.is_file() or file.name == "config.json" or file.suffix == ".py":
            continue
        if is_memlong and (file.suffix == ".safetensors" or file.name == SAFE_WEIGHTS_INDEX_NAME):
            _without_memory(file, output / file.name)
        else:
            (output / file.name).symlink_to(file.resolve())
    return output


def _without_memory(source: Path, target: Path) -> None:
    if source.name == SAFE_WEIGHTS_INDEX_NAME:
        index: dict[str, Any] = json.loads(source.read_text())
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if ".memory_" not in name}
        target.write_text(json.dumps(index))
        return
    with safe_open(source, framework="pt") as tensors:
        names = [name for name in tensors.keys() if ".memory_" not in name]  # noqa: SIM118
        save_file({name: tensors.get_tensor(name) for name in names}, target, metadata={"format": "pt"})
