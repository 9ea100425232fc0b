"""A small fine-tuning run over a tiny checkpoint, as the command makes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from memlong_vllm.adapters.adapter import Adapter
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.retriever.embedder import load_embedder
from memlong_vllm.training.documents import Document
from memlong_vllm.training.features import FrozenHalf
from memlong_vllm.training.finetune import finetune
from memlong_vllm.training.job import FinetuneJob
from memlong_vllm.training.settings import FinetuneSettings
from memlong_vllm.training.trainable import TrainedParts

# Memory that learns maps and biases.
JOINT: dict[str, Any] = {"fusion": "joint", "memory_bias": True, "memory_adapter": "linear"}
PARTS = TrainedParts(rank=2, alpha=4.0)
SETTINGS: dict[str, Any] = {
    "parts": PARTS,
    "steps": 4,
    "rows": 2,
    "segment_tokens": 64,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "calibrate_tokens": 0,
    "precision": "fp32",
    "validate_every": 2,
    "save_every": 2,
}


def documents(tokens: Sequence[int], sizes: Sequence[int]) -> list[Document]:
    """Consecutive pieces of ``tokens`` of these sizes."""
    made, first = [], 0
    for idx, size in enumerate(sizes):
        made.append(Document(f"text {idx}", tuple(tokens[first : first + size])))
        first += size
    return made


def train(
    model: Path,
    output: Path,
    tokens: Sequence[int],
    cache: Path,
    restart: bool = False,
    start: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
    **settings: Any,
) -> Adapter:
    """Fine-tune on three documents, validate on a fourth."""
    *train, valid = documents(tokens, (400, 330, 270, 300))
    job = FinetuneJob(model, output, cache, start=start, cpu=True, restart=restart)
    return finetune(job, FinetuneSettings(**(SETTINGS | settings)), lambda *_: (train, [valid]), say)


def frozen_half(folder: Path, model: MemLongForCausalLM, cache: Path) -> FrozenHalf:
    """In float32, with the checkpoint's own retriever."""
    tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config)
    embedder = load_embedder(model.config.memory.retriever, str(folder), "cpu")

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    autocast = Accelerator(cpu=True, mixed_precision="no").autocast
    return FrozenHalf(folder, model, embedder.embed, decode, cache, torch.float32, autocast, "the checkpoint's own")


def log_of(output: Path) -> list[dict[str, Any]]:
    """Lines of a run's log."""
    folder = FinetuneJob(output, output, output).folder
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
