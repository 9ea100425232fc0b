"""Which chunks each token attends to, in the simplest code that says it. Shipped in checkpoints.

This is an implementation of its own, not the engine's: tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Embed = Callable[[list[int]], torch.Tensor]
"""Token ids of a span -> the embedding of its text, [dimension], L2-normalised; zeros if empty."""


@dataclass(frozen=True)
class AttendedSpan:
    """Tokens [start, end) attend to ``chunk_ids``; token t at local position ``t - origin``."""

    start: int
    end: int
    chunk_ids: tuple[int, ...]
    origin: int


class SequenceMemory:
    """The memory of one sequence: chunks, counters and the set retrieved last.

    Args:
        config: the ``memlong`` block as a :class:`MemoryConfig`.
        embed: the retriever.
        prompt_len: tokens of the prompt, or None while all tokens are one text without a prompt's
            end (training, perplexity of a text).
    """

    def __init__(self, config, embed: Embed, prompt_len: int | None = None) -> None:
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
            if self.prompt_len is not None and position == self.prompt_len - 1:
                first = max(0, self.prompt_len - self.config.query_tokens)
                self._retrieve(position, (first, self.prompt_len))
            if not self.retrieved:
                continue
            last = spans[-1] if spans else None
            if last and (last.end, last.chunk_ids, last.origin) == (position, self.retrieved, self.origin):
                spans[-1] = AttendedSpan(last.start, position + 1, self.retrieved, self.origin)
            else:
                spans.append(AttendedSpan(position, position + 1, self.retrieved, self.origin))
        return spans

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
        eligible = [c for c in eligible if self.embeddings[c].any()]
        if eligible:
            vector = self.embed(self.token_ids[query[0] : query[1]]).double()
            scores = {c: float(self.embeddings[c].double() @ vector) for c in eligible}
            eligible = sorted(eligible, key=lambda c: (-round(scores[c], 7), c))[: self.config.top_k]
        for chunk in eligible:
            self.counts[chunk] += 1
        self.retrieved = tuple(sorted(eligible))
        self.origin = max(0, window_start) - 1
