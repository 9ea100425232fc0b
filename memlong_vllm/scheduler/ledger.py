"""The ledger: which bank slots hold which chunks of which sequence. Holds no tensors.

Logical and physical ends of a chunk differ. A forgotten chunk is gone at once for every later
retrieval, but its slot may still be read in the step that forgot it, and by the set retrieved
before, so it returns to the pool only when neither can happen any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from memlong_vllm.config import MemoryConfig, max_sequence_slots
from memlong_vllm.plan import ReadSpan, SequencePlan
from memlong_vllm.scheduler.eviction import choose_forgotten
from memlong_vllm.scheduler.segments import Retrieval, SegmentClock

Search = Callable[[Retrieval, list[int]], list[tuple[int, float]]]
"""(retrieval, eligible chunk ids) -> (chunk id, score) of at most top_k of them, in any order."""


class LedgerError(RuntimeError):
    """The ledger was used out of order; a bug, never a consequence of a request."""


@dataclass(slots=True)
class _Chunk:
    slot: int
    count: int = 0


@dataclass(frozen=True, slots=True)
class Retrieved:
    """A retrieval as it was made: scores are those of ``chunk_ids``, which ascend."""

    retrieval: Retrieval
    num_eligible: int
    chunk_ids: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Chunks discarded before the chunk ending at ``position`` was stored."""

    position: int
    chunk_ids: tuple[int, ...]


@dataclass(slots=True)
class MemoryHandle:
    """The memory of one sequence.

    Attributes:
        position: tokens planned so far; the next step must start here.
        chunks: complete chunks held, by ascending id.
        writing: slots of chunks that are not complete yet.
        retrieved: slots every next token attends to, until the next retrieval.
        origin: local position offset of that set.
        retrieval_id: of the retrieval it came from.
        retiring: slots of forgotten chunks that may still be read.
        reserved: slots this sequence can ever hold at once.
    """

    clock: SegmentClock
    reserved: int
    position: int = 0
    chunks: dict[int, _Chunk] = field(default_factory=dict)
    writing: dict[int, int] = field(default_factory=dict)
    retrieved: tuple[int, ...] = ()
    origin: int = -1
    retrieval_id: int = -1
    retiring: list[int] = field(default_factory=list)

    def slots(self) -> list[int]:
        """Every slot this sequence holds."""
        return [chunk.slot for chunk in self.chunks.values()] + list(self.writing.values()) + self.retiring


class Ledger:
    """Slots of the bank and the handles that own them.

    A sequence is opened only if the most it can ever hold fits beside the reservations of the
    others, so a running sequence never finds the pool empty.

    Args:
        num_slots: slots in the bank.
        max_step_tokens: tokens one engine step computes at most.
    """

    def __init__(self, config: MemoryConfig, num_slots: int, max_step_tokens: int) -> None:
        self.config = config
        self.num_slots = num_slots
        self._max_step_tokens = max_step_tokens
        self._free = list(range(num_slots - 1, -1, -1))
        self._handles: dict[str, MemoryHandle] = {}
        self._num_reserved = 0
        self._retrieval_ids = itertools.count()

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    def is_open(self, request_id: str) -> bool:
        return request_id in self._handles

    def num_slots_needed(self, max_tokens: int) -> int:
        """Slots a sequence of at most ``max_tokens`` tokens can hold at once."""
        return max_sequence_slots(self.config, max_tokens, self._max_step_tokens)

    def can_open(self, max_tokens: int) -> bool:
        return self._num_reserved + self.num_slots_needed(max_tokens) <= self.num_slots

    def open(self, request_id: str, prompt_len: int, max_tokens: int) -> None:
        """Reserve memory for a sequence of at most ``max_tokens`` tokens, prompt included."""
        if request_id in self._handles or not self.can_open(max_tokens):
            raise LedgerError(f"cannot open a memory for {request_id!r}: open already, or too few slots")
        needed = self.num_slots_needed(max_tokens)
        self._handles[request_id] = MemoryHandle(SegmentClock(self.config, prompt_len), needed)
        self._num_reserved += needed

    def close(self, request_id: str) -> None:
        """Return a sequence's slots; nothing happens if it has none (finished or preempted)."""
        handle = self._handles.pop(request_id, None)
        if handle is not None:
            self._num_reserved -= handle.reserved
            self._free.extend(handle.slots())

    def free_retired(self) -> None:
        """Return slots that the steps so far can no longer read. Call before planning a step."""
        for handle in self._handles.values():
            if handle.retiring:
                lingering = [slot for slot in handle.retiring if slot in handle.retrieved]
                self._free.extend(set(handle.retiring) - set(lingering))
                handle.retiring = lingering

    def advance(
        self, request_id: str, start: int, end: int, search: Search
    ) -> tuple[SequencePlan, list[Retrieved | Forgotten]]:
        """Plan tokens [start, end) of a sequence: its writes, retrievals and forgettings.

        Returns:
            The plan and, in the order of their positions, what was retrieved and forgotten.

        Raises:
            LedgerError: if ``start`` is not where the last plan ended.
        """
        handle = self._handles[request_id]
        if start != handle.position or end <= start:
            raise LedgerError(f"{request_id!r} is at position {handle.position}, cannot plan [{start}, {end})")
        chunk_size = self.config.chunk_size
        chunk_ids = range(start // chunk_size, (end - 1) // chunk_size + 1)
        for chunk_id in chunk_ids:
            if chunk_id not in handle.writing:
                handle.writing[chunk_id] = self._free.pop()
        write_slots = tuple(handle.writing[chunk_id] for chunk_id in chunk_ids)
        reads: list[ReadSpan] = []
        events: list[Retrieved | Forgotten] = []
        cursor = start
        for retrieval in handle.clock.retrievals(start, end):
            self._add_span(handle, reads, cursor, retrieval.position)
            events += self._store_up_to(handle, retrieval.position)
            events.append(self._retrieve(handle, retrieval, search))
            cursor = retrieval.position
        self._add_span(handle, reads, cursor, end)
        events += self._store_up_to(handle, end)
        handle.position = end
        return SequencePlan(request_id, start, end, write_slots, tuple(reads)), events

    @staticmethod
    def _add_span(handle: MemoryHandle, reads: list[ReadSpan], start: int, end: int) -> None:
        if start < end and handle.retrieved:
            reads.append(ReadSpan(start, end, handle.retrieved, handle.origin, handle.retrieval_id))

    def _retrieve(self, handle: MemoryHandle, retrieval: Retrieval, search: Search) -> Retrieved:
        eligible = [chunk_id for chunk_id in handle.chunks if chunk_id < retrieval.num_reachable]
        found = sorted(search(retrieval, eligible)) if eligible else []
        for chunk_id, _ in found:
            handle.chunks[chunk_id].count += 1
        handle.retrieved = tuple(handle.chunks[chunk_id].slot for chunk_id, _ in found)
        handle.origin = retrieval.origin
        handle.retrieval_id = next(self._retrieval_ids)
        chunk_ids, scores = tuple(c for c, _ in found), tuple(s for _, s in found)
        return Retrieved(retrieval, len(eligible), chunk_ids, scores)

    def _store_up_to(self, handle: MemoryHandle, position: int) -> list[Forgotten]:
        """Store the chunks whose last token lies before ``position``."""
        forgotten = []
        complete = [c for c in handle.writing if (c + 1) * self.config.chunk_size <= position]
        for chunk_id in complete:
            counts = [(held, chunk.count) for held, chunk in handle.chunks.items()]
            discarded = choose_forgotten(counts, self.config.capacity)
            handle.retiring += [handle.chunks.pop(c).slot for c in discarded]
            if discarded:
                forgotten.append(Forgotten((chunk_id + 1) * self.config.chunk_size, tuple(discarded)))
            handle.chunks[chunk_id] = _Chunk(handle.writing.pop(chunk_id))
        return forgotten

    def check(self) -> None:
        """Raise LedgerError unless every slot is owned exactly once and within reservations."""
        owned = [slot for handle in self._handles.values() for slot in handle.slots()]
        if sorted(owned + self._free) != list(range(self.num_slots)):
            raise LedgerError("slots were lost or are owned twice")
        if any(len(handle.slots()) > handle.reserved for handle in self._handles.values()):
            raise LedgerError("a sequence holds more slots than it reserved")
