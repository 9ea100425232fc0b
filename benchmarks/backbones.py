"""A checkpoint that benchmarks make: a MemLong one with open gates."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


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
