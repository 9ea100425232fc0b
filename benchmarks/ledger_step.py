"""What the ledger and the plan of one engine step take, without an engine: real objects, no tensors."""

from __future__ import annotations

import time
from typing import Any

from memlong_vllm.config import MemoryConfig, max_sequence_slots
from memlong_vllm.plan import StepPlan
from memlong_vllm.scheduler.ledger import Found, Ledger
from memlong_vllm.scheduler.segments import Retrieval

STEP_TOKENS = 2048


class DecodingSequences:
    """Sequences that decode, a token each a step, as the scheduler advances them.

    Args:
        length: tokens of each before the first step; they differ by parts of a segment, so that
            sequences retrieve one after another.
    """

    def __init__(self, config: MemoryConfig, number: int, length: int, num_steps: int) -> None:
        self._top_k = config.top_k
        self._num_searches = 0
        longest = length + config.retrieval_stride + num_steps
        slots = number * max_sequence_slots(config, longest, STEP_TOKENS)
        self._ledger = Ledger(config, slots, STEP_TOKENS)
        self._positions = {}
        for row in range(number):
            request_id, end = str(row), length + row * config.retrieval_stride // number
            self._ledger.open(request_id, end)
            for start in range(0, end, STEP_TOKENS):
                self._ledger.free_retired()
                self._ledger.advance(request_id, start, min(start + STEP_TOKENS, end), self._search)
            self._positions[request_id] = end

    def _search(self, retrieval: Retrieval, chunk_ids: list[int]) -> Found:
        """No search at all: that is measured in the engine."""
        self._num_searches += 1
        return [(chunk_id, 0.0) for chunk_id in chunk_ids[: self._top_k]]

    def step(self) -> tuple[StepPlan, int]:
        """The ledger's part and the plan's of what :class:`memlong_vllm.scheduler.scheduler.MemLongScheduler`
        does in a step: neither vLLM's, nor searches, nor the looks for embeddings, which ``own_ms`` of
        :mod:`retrieval` has as well. Returns the plan and how many sequences retrieved."""
        self._num_searches = 0
        ledger, positions = self._ledger, self._positions
        ledger.free_retired()
        needed = sum(ledger.slots_to_advance(request_id, 1) for request_id in positions)
        assert needed <= ledger.pool.num_available
        plans = []
        for request_id, position in positions.items():
            plans.append(ledger.advance(request_id, position, position + 1, self._search).plan)
            positions[request_id] = position + 1
        return StepPlan(tuple(plans)), self._num_searches


def ledger_times(config: MemoryConfig, number: int, length: int, num_steps: int) -> dict[str, Any]:
    """Milliseconds of ``num_steps`` steps, those in which some sequence retrieves and the others."""
    sequences = DecodingSequences(config, number, length, num_steps)
    times: dict[str, list[float]] = {"retrieving_ms": [], "plain_ms": []}
    for _ in range(num_steps):
        began = time.perf_counter()
        _, num_searches = sequences.step()
        elapsed = 1000 * (time.perf_counter() - began)
        times["retrieving_ms" if num_searches else "plain_ms"].append(round(elapsed, 5))
    return times
