"""MemLong the way its authors' scripts run it: plain transformers, one sequence, a Python loop.

The model is this project's reference (``memlong_vllm.reference``). Like the authors' code, it
decodes text, embeds and searches inside the forward pass, and does so again in *every* step of
decoding, where the engine embeds once a chunk. Nothing is kept from one sequence to the next. Of a
checkpoint with ``memory_adapter`` the maps are left out: theirs have none, and what would be computed
anew at every step is no cost of theirs. (Only the speed is of interest, and answers are not read.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from example_text import ExampleText, Piece
from token_times import TokenTimes

from memlong_vllm.config import MemLongConfig
from memlong_vllm.reference.modeling_memlong import MemLongCache, MemLongForCausalLM
from memlong_vllm.reference.retrieval import AttendedSpan, SequenceMemory
from memlong_vllm.retriever.embedder import load_embedder


class EveryStepMemory(SequenceMemory):
    """Retrieves for every generated token, with the text of the tokens before it."""

    def extend(self, token_ids: Sequence[int]) -> list[AttendedSpan]:
        spans = super().extend(token_ids)
        position = len(self.token_ids) - 1
        if self.prompt_len is None or position < self.prompt_len:
            return spans
        self._retrieve(position, (max(0, position - self.config.query_tokens), position))
        if not self.retrieved:
            return []
        return [AttendedSpan(position, position + 1, self.retrieved, self.origin)]


def load(model: Path, settings: dict[str, Any]) -> AuthorsLoop:
    """Args: settings: ``dtype``; ``piece``, the tokens of a prompt that are computed at once;
    ``max_model_len``, how far positions reach."""
    return AuthorsLoop(model, getattr(torch, settings["dtype"]), settings["piece"], settings["max_model_len"])


class AuthorsLoop:
    def __init__(self, checkpoint: Path, dtype: torch.dtype, piece: int, max_model_len: int) -> None:
        from transformers import AutoTokenizer

        config = MemLongConfig.from_pretrained(checkpoint)
        config.max_position_embeddings = max(config.max_position_embeddings, max_model_len)
        config.memlong = config.memlong | {"memory_adapter": None, "memory_adapter_width": 1}
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = MemLongForCausalLM.from_pretrained(checkpoint, config=config, dtype=dtype).eval()
        self._model.to(self._device)
        self._memory, self._piece = config.memory, piece
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, config=config)
        self._embedder = load_embedder(config.memory.retriever, str(checkpoint), self._device)
        self._text = ExampleText(self._tokenizer, config.vocab_size)
        self._num_embedded, self._embed_seconds = 0, 0.0

    def describe(self) -> dict[str, Any]:
        return {"shares_prefixes": False, "piece": self._piece}

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[Sequence[Piece]],
        max_tokens: int,
        salts: Sequence[str],
        forget_prefixes: bool = False,
        with_steps: bool = False,
    ) -> dict[str, Any]:
        """As :meth:`vllm_engine.VllmEngine.answer`, for one prompt. Nothing is shared or noted, so
        the last three arguments mean nothing here."""
        if len(prompts) != 1:
            raise ValueError("the loop takes one sequence at a time")
        token_ids = self._text.prompt(prompts[0])
        self._num_embedded, self._embed_seconds = 0, 0.0
        began, times = time.perf_counter(), []
        memory = EveryStepMemory(self._memory, self._embed, len(token_ids))
        cache = MemLongCache(self._model.config.num_hidden_layers, self._memory.local_window, memory)
        for first in range(0, len(token_ids), self._piece):
            logits = self._forward(token_ids[first : first + self._piece], cache)
        while True:
            token = int(logits.argmax())
            times.append(time.perf_counter() - began)
            if len(times) == max_tokens:
                break
            logits = self._forward([token], cache)
        counters = {"embedded_texts": self._num_embedded, "embed_seconds": self._embed_seconds}
        noted = {"peak_bytes": cache_bytes(cache), "counters": counters}
        return TokenTimes([len(token_ids)], [0], [times], total_s=times[-1], **noted).as_dict()

    def _forward(self, token_ids: list[int], cache: MemLongCache) -> torch.Tensor:
        """[vocabulary], of the last token."""
        output = self._model(torch.tensor([token_ids], device=self._device), past_key_values=cache, logits_to_keep=1)
        return output.logits[0, -1]

    def _embed(self, token_ids: list[int]) -> torch.Tensor:
        """Nothing is kept: equal texts are embedded again."""
        began = time.perf_counter()
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        instruction = self._memory.retriever.query_instruction or ""
        vector = torch.as_tensor(self._embedder.embed([instruction + (text or " ")])[0])
        self._num_embedded += 1
        self._embed_seconds += time.perf_counter() - began
        return vector if text else torch.zeros_like(vector)


def cache_bytes(cache: MemLongCache) -> dict[str, int]:
    """Of a sequence at its end, by kind."""
    windows = [tensor for window in cache.windows if window is not None for tensor in window]
    assert cache.memory is not None
    return {
        "KV": sum(tensor.nbytes for tensor in windows),
        "bank": sum(tensor.nbytes for tensor in cache.stored or ()),
        "index": sum(vector.nbytes for vector in cache.memory.embeddings),
    }
