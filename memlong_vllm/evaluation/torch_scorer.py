"""What scorers of plain torch models share: sequences one at a time, computed piece by piece."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from memlong_vllm.evaluation.models import ModelSpec, end_ids_of, load_tokenizer
from memlong_vllm.evaluation.scoring import Continuation, MemoryUse, Prompt, ScorerSettings


class TorchScorer(ABC):
    """A :class:`~memlong_vllm.evaluation.scoring.Scorer`, but for named memories.

    In pieces, because dense masks take memory quadratic in a piece and what it sees.
    """

    def __init__(self, spec: ModelSpec, settings: ScorerSettings) -> None:
        self._spec, self._piece = spec, settings.piece
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = self._load(spec, getattr(torch, settings.dtype)).to(self._device).eval()
        self.tokenizer: Any = load_tokenizer(spec.source)
        self.end_ids = end_ids_of(spec.source, self.tokenizer)

    @abstractmethod
    def _load(self, spec: ModelSpec, dtype: torch.dtype) -> Any:
        """The model, with an ``lm_head``."""

    @abstractmethod
    def _start(self, memory: MemoryUse, prompt_len: int | None) -> Any:
        """The cache of a new sequence. ``prompt_len``: None for a text without a prompt's end."""

    @abstractmethod
    def _extend(self, cache: Any, token_ids: torch.Tensor) -> torch.Tensor:
        """Compute the next tokens, [tokens], of a sequence. Returns [tokens, hidden_size]."""

    @abstractmethod
    def _retrieved(self, cache: Any) -> tuple[tuple[int, ...] | None, int]:
        """What the last token attended to: own chunks, and the number of named memories' ones."""

    def _pieces(self, cache: Any, token_ids: Sequence[int]) -> Iterator[torch.Tensor]:
        for start in range(0, len(token_ids), self._piece):
            piece = torch.tensor(token_ids[start : start + self._piece], device=self._device)
            yield self._extend(cache, piece)

    def _next_logits(self, cache: Any, token_ids: Sequence[int]) -> torch.Tensor:
        """Extend a sequence. Returns the logits of the token after it, [vocabulary] float32."""
        last = torch.empty(0)
        for hidden in self._pieces(cache, token_ids):
            last = hidden[-1]
        logits: torch.Tensor = self._model.lm_head(last).float()
        return logits

    @torch.inference_mode()
    def logprobs(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        results = []
        for prompt in prompts:
            cache, done, parts = self._start(prompt.memory, None), 0, []
            following = torch.tensor(prompt.token_ids[1:], device=self._device)
            for hidden in self._pieces(cache, prompt.token_ids):
                targets = following[done : done + len(hidden)]
                logprobs = self._model.lm_head(hidden[: len(targets)]).float().log_softmax(-1)
                parts.append(logprobs[torch.arange(len(targets), device=self._device), targets])
                done += len(hidden)
            results.append(torch.cat(parts).double().cpu().numpy())
        return results

    @torch.inference_mode()
    def continuations(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Continuation]:
        results = []
        for prompt in prompts:
            cache = self._start(prompt.memory, len(prompt.token_ids))
            logits = self._next_logits(cache, prompt.token_ids)
            retrieved, num_named = self._retrieved(cache)
            answer: list[int] = []
            while (token := int(logits.argmax())) not in self.end_ids:
                answer.append(token)
                if len(answer) == max_tokens:
                    break
                logits = self._next_logits(cache, [token])
            results.append(Continuation(answer, retrieved, num_named))
        return results

    @torch.inference_mode()
    def candidates(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        results = []
        for prompt, ids in zip(prompts, token_ids, strict=True):
            logits = self._next_logits(self._start(prompt.memory, len(prompt.token_ids)), prompt.token_ids)
            results.append(logits.log_softmax(-1)[list(ids)].double().cpu().numpy())
        return results

    def close(self) -> None:
        self._model = None
        gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
