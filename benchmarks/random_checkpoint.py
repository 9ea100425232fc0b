"""A MemLong checkpoint of any shape with random weights, written layer by layer.

For speed and memory the values do not matter, so they are pieces of one block of noise.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from memlong_vllm.config import MemLongConfig
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM

NOISE = 1 << 24
STD = 0.02
NOT_COPIED = ("config.json", "model.safetensors", "model.safetensors.index.json")


def random_checkpoint(config: MemLongConfig, donor: Path, output: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write it. At no time is more than one layer in memory.

    Args:
        donor: a MemLong checkpoint whose tokenizer and retriever are linked to.

    Returns:
        ``output``.
    """
    output.mkdir(parents=True)
    for file in donor.iterdir():
        if file.name not in NOT_COPIED:
            (output / file.name).symlink_to(file.resolve())
    config.architectures, config.dtype = ["MemLongForCausalLM"], dtype
    config.save_pretrained(output)
    with torch.device("meta"):
        model = MemLongForCausalLM(config)
    shards: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        shards[_shard(name)][name] = parameter.shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NOISE, generator=generator).to(dtype) * STD
    weight_map: dict[str, str] = {}
    for shard, shapes in shards.items():
        tensors = {name: _values(name, shape, noise, generator) for name, shape in shapes.items()}
        save_file(tensors, output / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    return output


def _shard(name: str) -> str:
    """One file a layer, one for each of the others."""
    parts = name.split(".")
    return f"model-layer-{parts[2]}.safetensors" if parts[1] == "layers" else f"model-{parts[-2]}.safetensors"


def _values(name: str, shape: torch.Size, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=noise.dtype)
    start = int(torch.randint(len(noise), (1,), generator=generator))
    count = shape.numel()
    rolled = torch.cat([noise[start:], noise[:start]])
    return rolled.repeat(-(-count // len(rolled)))[:count].reshape(shape).clone()
