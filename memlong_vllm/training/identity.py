"""What makes a fine-tuning run this run: a run with another identity is not gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from memlong_vllm.adapters.base_identity import BaseIdentity
from memlong_vllm.config import RetrieverConfig
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.retriever.embedder import embedder_digest
from memlong_vllm.training.documents import Document
from memlong_vllm.training.job import FinetuneJob
from memlong_vllm.training.settings import FinetuneSettings


def run_identity(
    job: FinetuneJob,
    settings: FinetuneSettings,
    base: BaseIdentity,
    model: MemLongForCausalLM,
    documents: Sequence[Document],
    valid: Sequence[Document],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What makes a run this run; steps may be added to a finished one, unless its rate depends on them."""
    free = ["save_every", "keep_features", *(["steps"] if settings.schedule == "constant" else [])]
    return {
        "settings": {name: value for name, value in settings.to_dict().items() if name not in free},
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "base": base.digest,
        "retriever": embedder_digest(retriever_of(job, model), str(job.model)),
        "memlong": model.config.memory.to_dict(),
        "memory_parameters": _digest_of_memory(model),
        "train": [_describe(document) for document in documents],
        "valid": [_describe(document) for document in valid],
    }


def _describe(document: Document) -> str:
    digest = hashlib.sha256(
        json.dumps([list(document.token_ids), document.loss_weights, document.questions]).encode()
    ).hexdigest()
    return f"{document.name} ({len(document.token_ids)} tokens, {digest[:12]})"


def _digest_of_memory(model: MemLongForCausalLM) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".memory_" in name:
            digest.update(name.encode() + parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def retriever_of(job: FinetuneJob, model: MemLongForCausalLM) -> RetrieverConfig:
    configured = model.config.memory.retriever
    return configured if job.retriever_path is None else replace(configured, model=job.retriever_path)
