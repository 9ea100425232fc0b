"""MemLong checkpoints run by the reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from memlong_vllm.config import MemLongConfig, resolve
from memlong_vllm.evaluation.models import ModelSpec
from memlong_vllm.evaluation.scoring import RANDOM_EMBEDDER, EvaluationError, MemoryUse, ScorerSettings
from memlong_vllm.evaluation.torch_scorer import TorchScorer
from memlong_vllm.reference.modeling_memlong import MemLongCache, MemLongForCausalLM, text_embedder
from memlong_vllm.reference.retrieval import NamedMemory, SequenceMemory
from memlong_vllm.retriever.embedder import load_embedder


class ReferenceScorer(TorchScorer):
    """A :class:`~memlong_vllm.evaluation.scoring.Scorer` with the model that the engine is tested against.

    Raises:
        EvaluationError: if the checkpoint's parameters are not those of the settings.
        RetrieverLoadError: if there is no such retriever.
    """

    def __init__(self, spec: ModelSpec, settings: ScorerSettings) -> None:
        checkpoint = MemLongConfig.from_pretrained(spec.path)
        self._config, deployment = resolve(checkpoint, {"memlong": settings.memlong})
        super().__init__(spec, settings)
        # Whole segments a piece: with query_scope "current", one that is cut would be queried with
        # the text before it.
        stride = self._config.retrieval_stride
        self._piece = max(stride, self._piece // stride * stride)
        retriever = self._config.retriever
        if spec.random_retrieval:
            retriever = replace(retriever, model=RANDOM_EMBEDDER)
        embedder = load_embedder(retriever, str(spec.path), deployment.retriever_device)
        self._embed = text_embedder(self.tokenizer, embedder.embed, retriever.query_instruction)
        self._named: dict[str, NamedMemory] = {}

    def _load(self, spec: ModelSpec, dtype: torch.dtype) -> Any:
        config = MemLongConfig.from_pretrained(spec.path)
        config.memlong = self._config.to_dict()
        model, report = MemLongForCausalLM.from_pretrained(
            spec.path, config=config, dtype=dtype, output_loading_info=True
        )
        found = {*report["missing_keys"], *report["unexpected_keys"]}
        if other := sorted(name for name in found if ".memory_" in name):
            raise EvaluationError(
                f"'{spec.label}' ({spec.source}) has other memory parameters than --memlong asks for ({other[0]}, …): "
                "it was not made for these retrieval_layers and fusion settings"
            )
        return model

    def _start(self, memory: MemoryUse, prompt_len: int | None) -> MemLongCache:
        size = self._config.memory_size if memory.size is None else memory.size
        config = replace(self._config, memory_size=size, top_k=memory.top_k or self._config.top_k)
        named = [self._named[name] for name in memory.read]
        # Without anything to retrieve, no text need be embedded.
        is_off = size == 0 and not named
        held = None if is_off else SequenceMemory(config, self._embed, prompt_len, named)
        return MemLongCache(self._model.config.num_hidden_layers, config.local_window, held)

    def _extend(self, cache: MemLongCache, token_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self._model.model(token_ids, cache)
        return hidden

    def _retrieved(self, cache: MemLongCache) -> tuple[tuple[int, ...], int]:
        if cache.memory is None:
            return (), 0
        return cache.memory.retrieved, len(cache.memory.retrieved_named)

    @torch.inference_mode()
    def memorize(self, name: str, texts: Sequence[Sequence[int]]) -> int:
        size = self._config.chunk_size
        parts = [] if name not in self._named else [self._named[name]]
        for token_ids in texts:
            kept = list(token_ids[: len(token_ids) // size * size])
            if not kept:
                raise EvaluationError(f"memory '{name}': a text of {len(token_ids)} tokens has no chunk of {size}")
            cache = self._start(MemoryUse(0), None)
            for _ in self._pieces(cache, kept):
                pass
            chunks = [kept[first : first + size] for first in range(0, len(kept), size)]
            parts.append(NamedMemory([self._embed(chunk) for chunk in chunks], *cache.stored))
        self._named[name] = NamedMemory(
            [embedding for part in parts for embedding in part.embeddings],
            torch.cat([part.keys for part in parts], dim=1),
            torch.cat([part.values for part in parts], dim=1),
        )
        return len(self._named[name].embeddings)

    def forget(self, name: str) -> None:
        del self._named[name]
