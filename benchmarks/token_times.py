"""When tokens came, and what rates and latencies follow from that. Times in seconds since the
requests were added, all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class TokenTimes:
    """What a batch of requests got.

    Attributes:
        prompt_lens: tokens of each prompt; ``num_cached``: those of them that were not computed.
        times: of each request, when each of its tokens came.
        total_s: until the last token.
        peak_bytes: what was in use, by kind, when most was.
        peak_running: requests that were under way at once when most were; None if it was not counted.
        counters: what the engine counted meanwhile, by name.
        steps: of a vLLM engine that was asked for them, see :mod:`vllm_engine`.
    """

    prompt_lens: list[int]
    num_cached: list[int]
    times: list[list[float]]
    total_s: float = 0.0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    peak_running: int | None = None
    counters: dict[str, float] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def prompts_s(self) -> float:
        """Until every request had its first token."""
        return max(times[0] for times in self.times)

    @property
    def is_simultaneous(self) -> bool:
        """Whether all requests decoded at the same time for a while; else the engine's memory made
        some wait for others to end."""
        return self.prompts_s < min(times[-1] for times in self.times)

    def decode_tokens_per_s(self) -> float | None:
        """While all requests decode; None where they never do."""
        began, ended = self.prompts_s, min(times[-1] for times in self.times)
        if not self.is_simultaneous:
            return None
        return sum(began < time <= ended for times in self.times for time in times) / (ended - began)

    def first_token_s(self) -> list[float]:
        return [times[0] for times in self.times]

    def gaps_ms(self) -> list[float]:
        """Between a request's tokens, of all requests, in ms."""
        return [1000 * (after - before) for times in self.times for before, after in pairwise(times)]


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; ``share`` in (0, 1]."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
