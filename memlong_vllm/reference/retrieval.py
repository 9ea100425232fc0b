"""Which chunks each token attends to, in the simplest code that says it. Shipped in checkpoints.

This is an implementation of its own, not the engine's: tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

Embed = Callable[[list[int]], torch.Tensor]
"""Token ids of a span -> the embedding of its text, [dimension], L2-normalised; zeros if empty."""


@dataclass(frozen=True)
class NamedMemory:
    """Chunks of another text, kept: embeddings, one a chunk, and un-rotated keys and values of the
    memory layer, [heads, chunks * chunk_size, d] each."""

    embeddings: list[torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class AttendedSpan:
    """Tokens [start, end) attend to ``named`` chunks, (memory, chunk) each, and to the sequence's
    own ``chunk_ids``; token t at local position ``t - origin``."""

    start: int
    end: int
    chunk_ids: tuple[int, ...]
    origin: int
    named: tuple[tuple[int, int], ...] = ()


class SequenceMemory:
    """The memory of one sequence: chunks, counters and the set retrieved last.

    Args:
        config: the ``memlong`` block as a :class:`MemoryConfig`.
        embed: the retriever.
        prompt_len: tokens of the prompt, or None while all tokens are one text without a prompt's
            end (training, perplexity of a text).
        named: memories whose chunks can be retrieved beside the sequence's own.
    """

    def __init__(self, config, embed: Embed, prompt_len: int | None = None, named: Sequence[NamedMemory] = ()) -> None:
        self.named = named
        self.retrieved_named: tuple[tuple[int, int], ...] = ()
        self.config = config
        self.embed = embed
        self.prompt_len = prompt_len
        self.token_ids: list[int] = []
        self.embeddings: list[torch.Tensor] = []
        self.counts: dict[int, int] = {}
        self.retrieved: tuple[int, ...] = ()
        self.origin = -1

    def extend(self, token_ids: Sequence[int]) -> list[AttendedSpan]:
        """Append tokens and say what each of them attends to (no span: nothing)."""
        start = len(self.token_ids)
        self.token_ids += token_ids
        spans: list[AttendedSpan] = []
        for position in range(start, len(self.token_ids)):
            if position > 0 and position % self.config.chunk_size == 0:
                self._store(position // self.config.chunk_size - 1)
            if position % self.config.retrieval_stride == 0:
                self._retrieve(position, self._segment_query(position))
            if self._ends_prompt(position):
                self._retrieve(position, self.config.prompt_query(position + 1))
            if not self.retrieved and not self.retrieved_named:
                continue
            span = AttendedSpan(position, position + 1, self.retrieved, self.origin, self.retrieved_named)
            if spans and spans[-1] == replace(span, start=spans[-1].start, end=position):
                spans[-1] = replace(span, start=spans[-1].start)
            else:
                spans.append(span)
        return spans

    def _ends_prompt(self, position: int) -> bool:
        return self.prompt_len is not None and position == self.prompt_len - 1

    def _segment_query(self, segment: int) -> tuple[int, int]:
        end = segment + self.config.retrieval_stride
        known = len(self.token_ids) if self.prompt_len is None else self.prompt_len
        if self.config.query_scope == "current" and end <= known:
            return segment, end
        return max(0, segment - self.config.query_tokens), segment

    def _store(self, chunk_id: int) -> None:
        held, capacity = sorted(self.counts), self.config.capacity
        if len(held) == capacity:
            tenth = len(held) // 10
            dropped = held[:tenth]
            middle = sorted(held[tenth : len(held) - tenth], key=lambda chunk: (self.counts[chunk], chunk))
            while len(held) - len(dropped) > capacity // 2:
                dropped.append(middle.pop(0))
            for chunk in dropped:
                del self.counts[chunk]
        size = self.config.chunk_size
        self.embeddings.append(self.embed(self.token_ids[chunk_id * size : (chunk_id + 1) * size]))
        if capacity > 0:
            self.counts[chunk_id] = 0

    def _retrieve(self, position: int, query: tuple[int, int]) -> None:
        stride = self.config.retrieval_stride
        segment = position // stride * stride
        window_start = segment + stride - self.config.local_window
        size = self.config.chunk_size
        eligible = [c for c in self.counts if (c + 1) * size <= min(segment, window_start)]
        # Named memories come first in a tie and where chunks are attended.
        candidates = [(m, c, e) for m, memory in enumerate(self.named) for c, e in enumerate(memory.embeddings)]
        candidates += [(len(self.named), c, self.embeddings[c]) for c in eligible]
        candidates = [candidate for candidate in candidates if candidate[2].any()]
        found: list[tuple[int, int]] = []
        if candidates and query[0] < query[1]:
            vector = self.embed(self.token_ids[query[0] : query[1]]).double()
            ranked = sorted((-round(float(e.double() @ vector), 7), m, c) for m, c, e in candidates)
            found = sorted((m, c) for _, m, c in ranked[: self.config.top_k])
        self.retrieved_named = tuple((m, c) for m, c in found if m < len(self.named))
        self.retrieved = tuple(c for m, c in found if m == len(self.named))
        for chunk in self.retrieved:
            self.counts[chunk] += 1
        self.origin = max(0, window_start) - 1
