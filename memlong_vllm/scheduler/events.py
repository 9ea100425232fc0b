"""What happens to a sequence's memory, for those who watch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from memlong_vllm.scheduler.segments import Retrieval


class NamedChunk(NamedTuple):
    """A chunk of a named memory.

    Attributes:
        memory: which of the memories that the request reads.
        row: which of its chunks.
    """

    memory: int
    row: int


@dataclass(frozen=True, slots=True)
class Retrieved:
    """A retrieval as it was made.

    Attributes:
        num_eligible: own chunks that could have been chosen.
        chunk_ids: of the sequence's own chunks, ascending.
        scores: of these, inner products.
        named: chunks of named memories, ascending; they are attended before the own ones.
        named_scores: of these.
    """

    retrieval: Retrieval
    num_eligible: int
    chunk_ids: tuple[int, ...]
    scores: tuple[float, ...]
    named: tuple[NamedChunk, ...] = ()
    named_scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Chunks discarded before the chunk ending at ``position`` was stored."""

    position: int
    chunk_ids: tuple[int, ...]


Event = Retrieved | Forgotten
