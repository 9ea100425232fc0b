"""The checkpoints that benchmarks make: a MemLong one with open gates, and its plain backbone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def plain_backbone(checkpoint: Path, output: Path, window: int | None = None) -> Path:
    """Write the checkpoint's backbone as an ordinary Llama model.

    Args:
        window: tokens of the sliding window in every layer, or None for full attention.

    Returns:
        ``output``.
    """
    output.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    for name in ("memlong", "auto_map", "backbone_max_position_embeddings"):
        config.pop(name)
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if window is not None:
        config |= {"sliding_window": window, "layer_types": ["sliding_attention"] * config["num_hidden_layers"]}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".memory_" not in name}
    save_file(kept, output / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        if (checkpoint / name).exists():
            (output / name).symlink_to((checkpoint / name).resolve())
    return output


def gated_copy(checkpoint: Path, output: Path, scale: float = 0.3) -> Path:
    """A MemLong checkpoint with random gates: conversion leaves them zero, and then what is
    retrieved shows in no result.

    Returns:
        ``output``.
    """
    output.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name != "model.safetensors":
            (output / file.name).symlink_to(file.resolve())
    weights = load_file(checkpoint / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in sorted(weights):
        if name.endswith(".memory_gate"):
            weights[name] = torch.randn(weights[name].shape, generator=generator) * scale
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    return output
