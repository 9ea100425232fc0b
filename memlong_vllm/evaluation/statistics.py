"""The few statistics that summaries state."""

from __future__ import annotations

import math
from collections.abc import Sequence

NORMAL_95 = 1.959964


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, with the sample's standard deviation; None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def wilson_interval(num_right: int, num: int, z: float = NORMAL_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), 95 % by default; (0, 1) without trials."""
    if num == 0:
        return 0.0, 1.0
    rate = num_right / num
    centre = rate + z * z / (2 * num)
    spread = z * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    # The rate is inside of it, also after rounding.
    return max(0.0, min(rate, (centre - spread) / scale)), min(1.0, max(rate, (centre + spread) / scale))
