"""The ledger: which slots hold which chunks of which sequence. Holds no tensors.

Logical and physical ends of a chunk differ. A forgotten chunk is gone at once for every later
retrieval, but its slot may still be read in the step that forgot it, and by the set retrieved
before, so it is let go only when neither can happen any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memlong_vllm.config import MemoryConfig, max_named_slots, max_sequence_slots
from memlong_vllm.plan import ReadSpan, SequencePlan
from memlong_vllm.scheduler.events import Event, Forgotten, NamedChunk, Retrieved
from memlong_vllm.scheduler.eviction import ChunkCounters
from memlong_vllm.scheduler.prefix_tree import PrefixTree, Segment, SharedPrefix
from memlong_vllm.scheduler.segments import Retrieval, SegmentClock
from memlong_vllm.scheduler.slots import Chunk, SlotPool

Found = list[tuple[int | NamedChunk, float]]
Search = Callable[[Retrieval, list[int]], Found]
"""(retrieval, eligible own chunk ids) -> (chunk, score) of at most top_k chunks, in any order."""
Borrow = Callable[[NamedChunk], Chunk]
"""A named memory's chunk -> its contents, held once more for the caller."""


class LedgerError(RuntimeError):
    """The ledger was used out of order; a bug, never a consequence of a request."""


@dataclass(slots=True)
class MemoryHandle:
    """The memory of one sequence.

    Attributes:
        config: the checkpoint's, with what the request asked for.
        keys: addresses of the segments that others may share.
        borrow: where chunks of named memories come from, if the request reads any.
        position: tokens planned so far; the next step must start here.
        counters: complete chunks held and how often each was retrieved.
        chunks: contents of the same.
        writing: contents of chunks that are not complete yet.
        retrieved: what every next token attends to, until the next retrieval; ``retrieved_slots``:
            where that is.
        origin: local position offset of that set.
        retrieval_id: of the retrieval it came from.
        retiring: forgotten chunks that may still be read.
        passing: forgotten chunks of a shared prefix, held for the first step only.
        borrowed: chunks of named memories in the set; ``returning``: in earlier sets of the step.
        segment: the last shared segment; ``num_shared``: how many there are; ``segment_chunks``,
            ``segment_retrieved``: what the one under way will consist of.
    """

    config: MemoryConfig
    prompt_len: int
    clock: SegmentClock
    counters: ChunkCounters
    keys: Sequence[bytes] = ()
    borrow: Borrow | None = None
    position: int = 0
    chunks: dict[int, Chunk] = field(default_factory=dict)
    writing: dict[int, Chunk] = field(default_factory=dict)
    retrieved: tuple[Chunk, ...] = ()
    retrieved_slots: tuple[int, ...] = ()
    origin: int = -1
    retrieval_id: int = -1
    retiring: list[Chunk] = field(default_factory=list)
    passing: list[Chunk] = field(default_factory=list)
    borrowed: list[Chunk] = field(default_factory=list)
    returning: list[Chunk] = field(default_factory=list)
    segment: Segment | None = None
    num_shared: int = 0
    segment_chunks: list[Chunk] = field(default_factory=list)
    segment_retrieved: Retrieved | None = None

    def held(self) -> list[Chunk]:
        """Everything this sequence holds, one entry a holding; the newest of its own chunks first."""
        own = [*self.writing.values(), *reversed(self.chunks.values())]
        return own + self.retiring + self.borrowed + self.returning + self.passing


@dataclass(slots=True)  # Not frozen, as parts of a plan are not.
class Advance:
    """What the ledger decided about some tokens of a sequence.

    Attributes:
        events: what was retrieved and forgotten, in the order of positions.
        completed: {chunk id: slot} of the chunks these tokens complete.
    """

    plan: SequencePlan
    events: list[Event]
    completed: dict[int, int]


class Ledger:
    """Slots of the bank and the handles that hold them.

    The caller must see to it (:meth:`slots_to_advance`) that the pool has what a step takes.

    Args:
        num_slots: slots in the bank.
        max_step_tokens: tokens one engine step computes at most.
    """

    def __init__(self, config: MemoryConfig, num_slots: int, max_step_tokens: int) -> None:
        self.config = config
        self.pool = SlotPool(num_slots)
        self.tree = PrefixTree(self.pool, config.chunk_size, config.retrieval_stride // config.chunk_size)
        self._max_step_tokens = max_step_tokens
        self._handles: dict[str, MemoryHandle] = {}
        self._retrieval_ids = itertools.count()

    def is_open(self, request_id: str) -> bool:
        return request_id in self._handles

    def slots_at_most(self, num_tokens: int, config: MemoryConfig, reads_named: bool = False) -> int:
        """Slots that a sequence of ``num_tokens`` tokens can have held at once."""
        own = max_sequence_slots(config, num_tokens, self._max_step_tokens)
        return own + (max_named_slots(config, num_tokens, self._max_step_tokens) if reads_named else 0)

    def slots_to_come(self, request_id: str, num_tokens: int) -> int:
        """Slots that a sequence may still ask for until it has ``num_tokens`` tokens."""
        handle = self._handles[request_id]
        bound = self.slots_at_most(num_tokens, handle.config, handle.borrow is not None)
        return max(0, bound - len(handle.held()) + len(handle.passing))

    def slots_to_advance(self, request_id: str, num_tokens: int) -> int:
        """Slots that planning the next ``num_tokens`` tokens takes at most."""
        handle, size = self._handles[request_id], self.config.chunk_size
        if num_tokens <= 0:
            return 0
        if num_tokens == 1 and handle.borrow is None:  # As below, in half the time: most steps of most sequences.
            return 0 if handle.position // size in handle.writing else 1
        first, last = handle.position // size, (handle.position + num_tokens - 1) // size
        own = last - first + (first not in handle.writing)  # Only the first can have been begun.
        if handle.borrow is None:
            return own
        retrievals = num_tokens // handle.config.retrieval_stride + 2
        return own + retrievals * handle.config.top_k

    def find_prefix(self, config: MemoryConfig, keys: Sequence[bytes], every_chunk: bool = False) -> list[int]:
        """After how many of the segments ``keys`` the memory's state can be taken over, ascending."""
        return self.tree.usable_lengths(self.tree.path(keys), config.capacity, every_chunk)

    def prefix(self, config: MemoryConfig, keys: Sequence[bytes], every_chunk: bool = False) -> SharedPrefix:
        """The state after the segments ``keys``, one of :meth:`find_prefix`."""
        return self.tree.prefix(self.tree.path(keys), config.capacity, every_chunk)

    def open(
        self,
        request_id: str,
        prompt_len: int,
        config: MemoryConfig | None = None,
        keys: Sequence[bytes] = (),
        prefix: SharedPrefix | None = None,
        borrow: Borrow | None = None,
    ) -> None:
        """Begin the memory of a sequence, empty or with the state after a shared prefix.

        Args:
            config: the checkpoint's by default.
            keys: addresses of the segments that others may share (:func:`segment_keys`).
        """
        if request_id in self._handles:
            raise LedgerError(f"the memory of {request_id!r} is open already")
        config = config or self.config
        clock = SegmentClock(config, prompt_len, reads_named=borrow is not None)
        handle = MemoryHandle(config, prompt_len, clock, ChunkCounters(config.capacity), keys, borrow)
        if prefix is not None and prefix.segments:
            handle.num_shared, handle.segment = len(prefix.segments), prefix.segments[-1]
            handle.position = handle.num_shared * config.retrieval_stride
            handle.counters.counts = dict(prefix.counts)
            handle.chunks = dict(prefix.chunks)
            # Forgotten chunks that are wanted (to be saved) are held for the step to come.
            handle.passing = list(prefix.forgotten.values())
            for chunk in [*handle.chunks.values(), *handle.passing]:
                self.pool.hold(chunk)
        self._handles[request_id] = handle

    def close(self, request_id: str) -> None:
        """Let a sequence's slots go; nothing happens if it has none (finished or preempted)."""
        handle = self._handles.pop(request_id, None)
        if handle is not None:
            # The newest first: if the pool is short, a shared document is lost from its end on.
            for chunk in handle.held():
                self.pool.release(chunk)

    def free_retired(self) -> None:
        """Let go what the steps so far can no longer read. Call before planning a step."""
        for handle in self._handles.values():
            if handle.returning or handle.passing:
                for chunk in [*handle.returning, *handle.passing]:
                    self.pool.release(chunk)
                handle.returning, handle.passing = [], []
            if handle.retiring:
                lingering = [chunk for chunk in handle.retiring if chunk in handle.retrieved]
                for chunk in handle.retiring:
                    if chunk not in lingering:
                        self.pool.release(chunk)
                handle.retiring = lingering

    def advance(self, request_id: str, start: int, end: int, search: Search) -> Advance:
        """Plan tokens [start, end) of a sequence: its writes, retrievals and forgettings.

        Raises:
            LedgerError: if ``start`` is not where the last plan ended, or nothing is open.
        """
        handle = self._handles.get(request_id)
        if handle is None:
            raise LedgerError(f"no memory is open for {request_id!r}")
        if start != handle.position or end <= start:
            raise LedgerError(f"{request_id!r} is at position {handle.position}, cannot plan [{start}, {end})")
        chunk_size = self.config.chunk_size
        if end - start == 1 and start >= handle.prompt_len and start % chunk_size and end % chunk_size:
            return self._advance_within_chunk(handle, request_id, start)
        chunk_ids = range(start // chunk_size, (end - 1) // chunk_size + 1)
        for chunk_id in chunk_ids:
            if chunk_id not in handle.writing:
                handle.writing[chunk_id] = self.pool.new()
        write_slots = [handle.writing[chunk_id].slot for chunk_id in chunk_ids]
        reads: list[ReadSpan] = []
        events: list[Event] = []
        cursor = start
        for retrieval in handle.clock.retrievals(start, end):
            self._add_span(handle, reads, cursor, retrieval.position)
            events += self._store_up_to(handle, retrieval.position)
            events.append(self._retrieve(handle, retrieval, search))
            cursor = retrieval.position
        self._add_span(handle, reads, cursor, end)
        events += self._store_up_to(handle, end)
        handle.position = end
        plan = SequencePlan(request_id, start, end, tuple(write_slots), tuple(reads))
        num_complete = end // chunk_size - start // chunk_size
        return Advance(plan, events, dict(zip(chunk_ids, write_slots[:num_complete], strict=False)))

    def _advance_within_chunk(self, handle: MemoryHandle, request_id: str, position: int) -> Advance:
        """Plan a token of the answer that neither begins nor completes a chunk, and so retrieves
        nothing: most steps of a decoding sequence, of which a step can have very many."""
        end = position + 1
        handle.position = end
        slots = (handle.writing[position // self.config.chunk_size].slot,)
        reads: tuple[ReadSpan, ...] = ()
        if handle.retrieved:
            reads = (ReadSpan(position, end, handle.retrieved_slots, handle.origin, handle.retrieval_id),)
        return Advance(SequencePlan(request_id, position, end, slots, reads), [], {})

    @staticmethod
    def _add_span(handle: MemoryHandle, reads: list[ReadSpan], start: int, end: int) -> None:
        if start < end and handle.retrieved:
            reads.append(ReadSpan(start, end, handle.retrieved_slots, handle.origin, handle.retrieval_id))

    def _retrieve(self, handle: MemoryHandle, retrieval: Retrieval, search: Search) -> Retrieved:
        eligible = [chunk_id for chunk_id in handle.chunks if chunk_id < retrieval.num_reachable]
        found = search(retrieval, eligible) if eligible or handle.borrow is not None else []
        own = sorted((c, score) for c, score in found if not isinstance(c, NamedChunk))
        named = sorted((c, score) for c, score in found if isinstance(c, NamedChunk))
        handle.counters.retrieve(chunk_id for chunk_id, _ in own)
        handle.returning += handle.borrowed
        handle.borrowed = [handle.borrow(chunk) for chunk, _ in named] if handle.borrow is not None else []
        handle.retrieved = tuple(handle.borrowed) + tuple(handle.chunks[chunk_id] for chunk_id, _ in own)
        handle.retrieved_slots = tuple(chunk.slot for chunk in handle.retrieved)
        handle.origin = retrieval.origin
        handle.retrieval_id = next(self._retrieval_ids)
        retrieved = Retrieved(
            retrieval,
            len(eligible),
            tuple(c for c, _ in own),
            tuple(s for _, s in own),
            tuple(c for c, _ in named),
            tuple(s for _, s in named),
        )
        if retrieval.kind == "segment":
            handle.segment_retrieved = retrieved
        return retrieved

    def _store_up_to(self, handle: MemoryHandle, position: int) -> list[Forgotten]:
        """Store the chunks whose last token lies before ``position``."""
        forgotten = []
        for chunk_id in [c for c in handle.writing if (c + 1) * self.config.chunk_size <= position]:
            discarded = handle.counters.store(chunk_id)
            handle.retiring += [handle.chunks.pop(c) for c in discarded]
            if discarded:
                forgotten.append(Forgotten((chunk_id + 1) * self.config.chunk_size, tuple(discarded)))
            handle.chunks[chunk_id] = handle.writing.pop(chunk_id)
            self._share(handle, handle.chunks[chunk_id])
        return forgotten

    def _share(self, handle: MemoryHandle, chunk: Chunk) -> None:
        """Put a segment into the tree once its last chunk is complete."""
        if handle.num_shared >= len(handle.keys):
            return
        handle.segment_chunks.append(chunk)
        if len(handle.segment_chunks) * self.config.chunk_size < self.config.retrieval_stride:
            return
        key = handle.keys[handle.num_shared]
        handle.segment = self.tree.add(handle.segment, key, handle.segment_chunks, handle.segment_retrieved)
        handle.num_shared += 1
        handle.segment_chunks, handle.segment_retrieved = [], None
        if handle.segment is None:  # Its beginning was evicted meanwhile: nobody could find it.
            handle.keys = ()

    def check(self, held_elsewhere: Sequence[Chunk] = ()) -> None:
        """Raise an error unless every slot is accounted for and the tree is whole."""
        held = [chunk for handle in self._handles.values() for chunk in handle.held()]
        self.pool.check(held + list(held_elsewhere))
        self.tree.check()
