"""Lines that say how far a run has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Say = Callable[[str], None]


def each(items: Sequence[Item], what: str, say: Say) -> Iterator[Item]:
    """The items one by one; says so after each, with the seconds since the first."""
    started = time.perf_counter()
    for number, item in enumerate(items, 1):
        yield item
        say(f"{what} {number} of {len(items)}: {time.perf_counter() - started:.0f} s")
