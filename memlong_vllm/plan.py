"""The step plan: the one message from the scheduler to the workers. Standard library only.

Plans are not changed once made. Those of which a step has one a sequence are not frozen all the
same: a frozen dataclass takes three times as long to make, and four times to pickle.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ReadSpan:
    """Tokens [start, end) of a sequence that attend to the same retrieved chunks.

    Attributes:
        start, end: absolute token positions.
        slots: bank slots of the chunks, in ascending order of chunk id; never empty.
        origin: position t is at local position ``t - origin`` (section 3.3: memory sits at
            0, the first token of the window of the segment's last token at 1).
        retrieval_id: names the retrieval the set came from, unique in the life of an engine:
            spans with equal ids read the same contents, also in different steps.
    """

    start: int
    end: int
    slots: tuple[int, ...]
    origin: int
    retrieval_id: int


@dataclass(slots=True)
class SequencePlan:
    """What this step writes and reads for one sequence.

    Attributes:
        start, end: absolute positions of the tokens the step computes.
        write_slots: bank slot of each chunk the tokens lie in, from that of ``start`` on.
        reads: disjoint spans within [start, end), ascending. Tokens in none have no memory.
    """

    request_id: str
    start: int
    end: int
    write_slots: tuple[int, ...]
    reads: tuple[ReadSpan, ...]


@dataclass(frozen=True, slots=True)
class ChunkLoad:
    """Copy chunk ``row`` of the shard ``path`` (without the rank's suffix) into a slot.

    Loads come before the step's writes and reads and never into a slot that the step writes.
    """

    slot: int
    path: str
    row: int


@dataclass(frozen=True, slots=True)
class ChunkSave:
    """Copy slots, as they are at the end of the step, to the new shard ``path``, one row each."""

    slots: tuple[int, ...]
    path: str


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All sequences of an engine step. Writes of the memory layer precede all reads."""

    sequences: tuple[SequencePlan, ...]
    loads: tuple[ChunkLoad, ...] = ()
    saves: tuple[ChunkSave, ...] = ()
