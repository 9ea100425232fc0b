"""The step plan: the one message from the scheduler to the workers. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReadSpan:
    """Tokens [start, end) of a sequence that attend to the same retrieved chunks.

    Attributes:
        start, end: absolute token positions.
        slots: bank slots of the chunks, in ascending order of chunk id; never empty.
        origin: position t is at local position ``t - origin`` (section 3.3: memory sits at
            0, the first token of the window of the segment's last token at 1).
    """

    start: int
    end: int
    slots: tuple[int, ...]
    origin: int


@dataclass(frozen=True, slots=True)
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
class StepPlan:
    """All sequences of an engine step. Writes of the memory layer precede all reads."""

    sequences: tuple[SequencePlan, ...]
