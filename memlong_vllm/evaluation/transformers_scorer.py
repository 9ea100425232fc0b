"""Llama models without memory run by transformers itself, with full attention or a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from memlong_vllm.evaluation.models import ModelSpec
from memlong_vllm.evaluation.scoring import EvaluationError, MemoryUse
from memlong_vllm.evaluation.torch_scorer import TorchScorer


class TransformersScorer(TorchScorer):
    """A :class:`~memlong_vllm.evaluation.scoring.Scorer` of transformers' own Llama."""

    def _load(self, spec: ModelSpec, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(spec.path, dtype=dtype, attn_implementation="sdpa")

    def _start(self, memory: MemoryUse, prompt_len: int | None) -> DynamicCache:
        if memory != MemoryUse():
            raise EvaluationError(f"the model '{self._spec.label}' has no memory, but a prompt asks for {memory}")
        return DynamicCache()

    def _extend(self, cache: DynamicCache, token_ids: torch.Tensor) -> torch.Tensor:
        first, total = cache.get_seq_length(), cache.get_seq_length() + len(token_ids)
        positions = torch.arange(first, total, device=self._device)
        distance = positions[:, None] - torch.arange(total, device=self._device)
        visible = distance >= 0 if self._spec.window is None else (distance >= 0) & (distance < self._spec.window)
        output = self._model.model(
            input_ids=token_ids[None],
            attention_mask=visible[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _retrieved(self, cache: DynamicCache) -> tuple[None, int]:
        return None, 0

    def memorize(self, name: str, texts: Sequence[Sequence[int]]) -> int:
        raise EvaluationError(f"the model '{self._spec.label}' has no memory to write '{name}' to")

    def forget(self, name: str) -> None:
        raise EvaluationError(f"the model '{self._spec.label}' has no memory '{name}'")
