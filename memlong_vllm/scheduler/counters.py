"""Counters of the scheduler's work on memories."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from memlong_vllm.scheduler.request_memory import RequestMemory


@dataclass
class SchedulerCounters:
    """What happened since the start.

    Attributes:
        holds: how often a request was kept out of a step because it waited for embeddings;
            ``held_seconds``: for how long in all, summed over requests.
        preemptions: of running requests, because the bank was short of slots.
        prefix_hit_tokens: prompt tokens taken over from earlier requests.
        searches: retrievals made; ``search_seconds``: the time that took, in the scheduler.
    """

    holds: int = 0
    held_seconds: float = 0.0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    searches: int = 0
    search_seconds: float = 0.0

    def note_hold(self, memory: RequestMemory, is_held: bool) -> None:
        if is_held:
            self.holds += 1
            memory.held_since = memory.held_since or time.monotonic()
        else:
            self.end_hold(memory)

    def end_hold(self, memory: RequestMemory) -> None:
        if memory.held_since is not None:
            self.held_seconds += time.monotonic() - memory.held_since
            memory.held_since = None

    def timed(self, search: Callable[..., Any]) -> Callable[..., Any]:
        def timed_search(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return search(*args)
            finally:
                self.searches += 1
                self.search_seconds += time.perf_counter() - started

        return timed_search

    def as_dict(self) -> dict[str, float]:
        return asdict(self)
