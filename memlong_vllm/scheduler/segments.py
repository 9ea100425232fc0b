"""When a sequence retrieves and what it may retrieve. Pure arithmetic on positions (section 2 of
the paper's method, restated): nothing here depends on batching or on how a prefill is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from memlong_vllm.config import MemoryConfig

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """One retrieval.

    Attributes:
        position: the first token that attends to the result.
        kind: ``"segment"``, or ``"prompt_end"`` for the further query at the prompt's last token.
        query: token span whose text is the query.
        num_reachable: chunks with ids below this are complete and outside the window of the
            segment's last token; those of them not forgotten are eligible.
        origin: see :class:`memlong_vllm.plan.ReadSpan`.
    """

    position: int
    kind: Literal["segment", "prompt_end"]
    query: Span
    num_reachable: int
    origin: int


class SegmentClock:
    """Positions of the retrievals of one sequence with a prompt of ``prompt_len`` tokens.

    Args:
        reads_named: the sequence reads named memories, which can be reached from anywhere.
    """

    def __init__(self, config: MemoryConfig, prompt_len: int, reads_named: bool = False) -> None:
        self._config = config
        self._prompt_len = prompt_len
        self._reads_named = reads_named

    def retrievals(self, start: int, end: int) -> Iterator[Retrieval]:
        """Retrievals at positions in [start, end) that can reach at least one chunk, in order.

        A query without text (before the first segment) finds nothing and is not made.
        """
        stride = self._config.retrieval_stride
        segment = start // stride * stride
        while segment < end:
            last_prompt_token = self._prompt_len - 1
            if segment >= start:
                yield from self._at(segment, "segment", segment, self._segment_query(segment))
            if max(start, segment) <= last_prompt_token < min(end, segment + stride):
                query = self._config.prompt_query(self._prompt_len)
                yield from self._at(last_prompt_token, "prompt_end", segment, query)
            segment += stride

    def _at(
        self, position: int, kind: Literal["segment", "prompt_end"], segment: int, query: Span
    ) -> Iterator[Retrieval]:
        window_start = segment + self._config.retrieval_stride - self._config.local_window
        num_reachable = max(0, window_start // self._config.chunk_size) if self._config.capacity > 0 else 0
        if num_reachable > 0 or (self._reads_named and query[1] > query[0]):
            yield Retrieval(position, kind, query, num_reachable, origin=max(0, window_start) - 1)

    def _segment_query(self, segment: int) -> Span:
        segment_end = segment + self._config.retrieval_stride
        if self._config.query_scope == "current" and segment_end <= self._prompt_len:
            return segment, segment_end
        return max(0, segment - self._config.query_tokens), segment
