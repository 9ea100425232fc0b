"""What a measurement asks of a model, whichever way the model is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

RANDOM_EMBEDDER = "memlong_vllm.evaluation.random_retriever:RandomEmbedder"


class EvaluationError(ValueError):
    """An evaluation cannot run as asked. The message names the option and the fix."""


@dataclass(frozen=True)
class MemoryUse:
    """How much memory one sequence has.

    Attributes:
        size: tokens of its own text that it remembers at most; 0: memory is off; None: as the
            checkpoint says. Models without memory are given None.
        top_k: chunks a retrieval takes at most; None: as the checkpoint says.
        read: named memories (:meth:`Scorer.memorize`) whose chunks join its own.
    """

    size: int | None = None
    top_k: int | None = None
    read: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A token sequence and the memory it is read with."""

    token_ids: Sequence[int]
    memory: MemoryUse = field(default_factory=MemoryUse)


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation of a prompt.

    Attributes:
        token_ids: without the prompt; ends before an end-of-text token.
        retrieved: chunks of the prompt, ascending, that the first answer token attended to; None
            if the model has no memory.
        num_named: chunks of named memories that it attended to as well.
    """

    token_ids: list[int]
    retrieved: tuple[int, ...] | None = None
    num_named: int = 0


class Scorer(Protocol):
    """A model that is evaluated. Greedy, without randomness; prompts are answered in their order.

    A scorer holds an engine or a model: use it in a ``with`` statement, one at a time.

    Attributes:
        tokenizer: the model's, a transformers one.
        end_ids: tokens that end a text.
    """

    tokenizer: Any
    end_ids: frozenset[int]

    def logprobs(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Of each prompt, the log-probability of every token but the first given those before it:
        [len(token_ids) - 1] float64, in nats. The whole prompt counts as text, without an end at
        which a question is answered."""
        ...

    def continuations(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Continuation]:
        """Continue each prompt by up to ``max_tokens`` tokens."""
        ...

    def candidates(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of each prompt, the log-probabilities that it is continued by one of ``token_ids[i]``:
        [len(token_ids[i])] float64, in nats, over the whole vocabulary."""
        ...

    def memorize(self, name: str, texts: Sequence[Sequence[int]]) -> int:
        """Make the named memory ``name`` of token sequences, one after the other; only complete
        chunks are kept. Returns its number of chunks.

        Raises:
            EvaluationError: if the model has no memory, or a text has no complete chunk.
        """
        ...

    def forget(self, name: str) -> None:
        """Delete a named memory."""
        ...

    def close(self) -> None:
        """Free what the scorer holds. May be called again."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class ScorerSettings:
    """How the models of a run are run. What a row measures does not depend on it but for rounding,
    so rows of runs with other values may stand side by side, except ``engine`` and ``dtype``.

    Attributes:
        engine: ``"vllm"`` or ``"reference"`` (plain transformers).
        dtype: of weights and computation.
        max_length: tokens of the longest sequence, what is generated included.
        memory_size, top_k: the most that any prompt asks for; None: as the checkpoints say.
        batch: prompts computed at once (vLLM only).
        piece: tokens computed in one pass. Logits are made for all of them, and the reference's
            masks take ``piece`` x (``piece`` + window) numbers a head.
        memlong: entries for ``additional_config["memlong"]``.
        scratch: folder for traces and made checkpoints.
    """

    engine: str
    dtype: str
    max_length: int
    scratch: Path
    memory_size: int | None = None
    top_k: int | None = None
    batch: int = 1
    piece: int = 512
    memlong: dict[str, Any] = field(default_factory=dict)
