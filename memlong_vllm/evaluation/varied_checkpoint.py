"""A checkpoint with other settings, without a copy of its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from memlong_vllm.conversion import fresh_value

MEMORY_PARAMETER = re.compile(r"model\.layers\.(\d+)\.self_attn\.(memory_\w+)")

Tensors = dict[str, torch.Tensor]


def varied_checkpoint(checkpoint: Path, output: Path, config: dict[str, Any]) -> Path:
    """Write a folder with ``config`` that links to everything else of a MemLong checkpoint.

    With other retrieval layers, files with memory parameters are written anew: parameters of layers
    that retrieve no more would not be accepted, and layers that do now need fresh ones.

    Args:
        output: folder to make.
        config: of ``config.json``.

    Returns:
        ``output``.
    """
    output.mkdir(parents=True)
    before = json.loads((checkpoint / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config, indent=2))
    layers = config["memlong"]["retrieval_layers"]
    written = set()
    if layers != before["memlong"]["retrieval_layers"]:
        written = _write_for_layers(checkpoint, output, layers)
    for file in checkpoint.iterdir():
        if file.name not in {"config.json", *written}:
            (output / file.name).symlink_to(file.resolve())
    return output


def layers_with_trained_gates(checkpoint: Path) -> set[int]:
    """The layers of a MemLong checkpoint whose ``memory_gate`` is not zero, as conversion leaves it."""
    trained = set()
    for name, file in _places(checkpoint).items():
        match = MEMORY_PARAMETER.fullmatch(name)
        if match is None or match[2] != "memory_gate":
            continue
        with safe_open(checkpoint / file, framework="pt") as tensors:
            trained |= {int(match[1])} if tensors.get_tensor(name).any() else set()
    return trained


def _write_for_layers(checkpoint: Path, output: Path, layers: Iterable[int]) -> set[str]:
    """Write the weights that change, and the index if there is one. Returns the files' names."""
    places = _places(checkpoint)
    examples = {match[2]: name for name in places if (match := MEMORY_PARAMETER.fullmatch(name))}
    wanted = {f"model.layers.{layer}.self_attn.{leaf}": name for layer in layers for leaf, name in examples.items()}
    dropped = {name for name in places if MEMORY_PARAMETER.fullmatch(name) and name not in wanted}
    added = {name: example for name, example in wanted.items() if name not in places}
    # New ones go beside those that they are like.
    after = {name: file for name, file in places.items() if name not in dropped}
    after |= {name: places[example] for name, example in added.items()}
    changed = {places[name] for name in dropped} | {after[name] for name in added}
    for file in changed:
        tensors = _read(checkpoint / file)
        fresh = {name: fresh_value(name, tensors[added[name]]) for name in added if after[name] == file}
        kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
        save_file(kept | fresh, output / file, metadata={"format": "pt"})
    if (checkpoint / SAFE_WEIGHTS_INDEX_NAME).exists():
        index = json.loads((checkpoint / SAFE_WEIGHTS_INDEX_NAME).read_text())
        (output / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index | {"weight_map": after}))
        changed |= {SAFE_WEIGHTS_INDEX_NAME}
    return changed


def _places(checkpoint: Path) -> dict[str, str]:
    """The file that each tensor is in."""
    places: dict[str, str] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file.name)
    return places


def _read(file: Path) -> Tensors:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
