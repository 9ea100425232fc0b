"""What sequences with equal beginnings share: chunks in the bank and the history of retrievals.

Up to the segment that holds its prompt's end, everything about a sequence's memory follows from
its tokens: the stored keys and values, the sets, the counters, what was forgotten. So a segment
is addressed by a hash of all tokens up to its end (and of whatever else keeps two requests
apart), and one that finds its beginning here takes over the state instead of computing it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memlong_vllm.scheduler.events import Event, Forgotten, Retrieved
from memlong_vllm.scheduler.eviction import ChunkCounters
from memlong_vllm.scheduler.slots import Chunk, SlotPool


def segment_keys(token_ids: Sequence[int], segment_len: int, num_segments: int, seed: str) -> list[bytes]:
    """Addresses of the first segments of a sequence.

    Args:
        seed: sequences with different seeds share nothing.
    """
    keys: list[bytes] = []
    key = hashlib.sha256(seed.encode()).digest()
    for first in range(0, num_segments * segment_len, segment_len):
        segment = array("q", token_ids[first : first + segment_len]).tobytes()
        key = hashlib.sha256(key + segment).digest()
        keys.append(key)
    return keys


class Segment:
    """One segment after another that led here.

    Attributes:
        parent: the segment before, None for the first.
        chunks: its complete chunks, in order.
        retrieved: what was retrieved at its start, if anything could be.
        num_children: segments in the tree that follow this one.
    """

    __slots__ = ("chunks", "key", "num_children", "parent", "retrieved")

    def __init__(self, key: bytes, parent: Segment | None, chunks: list[Chunk], retrieved: Retrieved | None) -> None:
        self.key = key
        self.parent = parent
        self.chunks = chunks
        self.retrieved = retrieved
        self.num_children = 0


@dataclass(frozen=True)
class SharedPrefix:
    """The memory of a sequence after some segments that are in the tree.

    Attributes:
        segments: these segments.
        counts: {chunk id: times retrieved} of the chunks held after them.
        chunks: {chunk id: contents} of the same.
        forgotten: the others, if they are wanted as well.
        events: everything that happened in them, in order.
    """

    segments: tuple[Segment, ...]
    counts: dict[int, int]
    chunks: dict[int, Chunk]
    forgotten: dict[int, Chunk]
    events: tuple[Event, ...]

    @property
    def num_unheld(self) -> int:
        """Slots that nobody else holds: taking over the prefix makes them unavailable."""
        return sum(chunk.refs == 0 for chunk in [*self.chunks.values(), *self.forgotten.values()])

    def slots(self) -> dict[int, int]:
        """{chunk id: slot} of all chunks here, ascending."""
        return {chunk_id: chunk.slot for chunk_id, chunk in sorted((self.chunks | self.forgotten).items())}


class PrefixTree:
    """Segments by address. A segment stays while a chunk of it, or of one after it, is resident.

    Args:
        chunk_size: tokens.
        chunks_per_segment: complete chunks in a segment.
    """

    def __init__(self, pool: SlotPool, chunk_size: int, chunks_per_segment: int) -> None:
        self._pool = pool
        self._chunk_size = chunk_size
        self._chunks_per_segment = chunks_per_segment
        self._segments: dict[bytes, Segment] = {}

    def __len__(self) -> int:
        return len(self._segments)

    def path(self, keys: Sequence[bytes]) -> list[Segment]:
        """The longest beginning of ``keys`` that is here."""
        path: list[Segment] = []
        for key in keys:
            segment = self._segments.get(key)
            if segment is None:
                break
            path.append(segment)
        return path

    def usable_lengths(self, path: Sequence[Segment], capacity: int, every_chunk: bool = False) -> list[int]:
        """After how many segments of ``path`` the memory's whole state is at hand, ascending.

        Args:
            capacity: chunks the sequence's memory may hold.
            every_chunk: forgotten chunks must be resident, too.
        """
        lengths, num_missing = [], 0
        resident = [chunk.is_resident for segment in path for chunk in segment.chunks]
        for length, (_, stored, forgotten) in enumerate(self._replay(path, capacity), start=1):
            num_missing += sum(not resident[chunk_id] for chunk_id in stored)
            if not every_chunk:
                num_missing -= sum(not resident[chunk_id] for chunk_id in forgotten)
            if num_missing == 0:
                lengths.append(length)
        return lengths

    def prefix(self, segments: Sequence[Segment], capacity: int, every_chunk: bool = False) -> SharedPrefix:
        """The state after ``segments``, a usable length of a path."""
        counters, events = ChunkCounters(capacity), list[Event]()
        for counters, _, _ in self._replay(segments, capacity, events):  # noqa: B007 (the last one is wanted)
            pass
        contents = [chunk for segment in segments for chunk in segment.chunks]
        chunks = {chunk_id: contents[chunk_id] for chunk_id in counters.counts}
        others = {i: chunk for i, chunk in enumerate(contents) if i not in chunks} if every_chunk else {}
        return SharedPrefix(tuple(segments), dict(counters.counts), chunks, others, tuple(events))

    def _replay(
        self, segments: Sequence[Segment], capacity: int, events: list[Event] | None = None
    ) -> Iterator[tuple[ChunkCounters, list[int], list[int]]]:
        """After each segment: the counters, and what was stored and forgotten in it."""
        counters = ChunkCounters(capacity)
        events = [] if events is None else events
        for index, segment in enumerate(segments):
            if segment.retrieved is not None:
                counters.retrieve(segment.retrieved.chunk_ids)
                events.append(segment.retrieved)
            first = index * self._chunks_per_segment
            stored, forgotten = list(range(first, first + self._chunks_per_segment)), list[int]()
            for chunk_id in stored:
                if gone := counters.store(chunk_id):
                    events.append(Forgotten((chunk_id + 1) * self._chunk_size, tuple(gone)))
                    forgotten += gone
            yield counters, stored, forgotten

    def add(
        self, parent: Segment | None, key: bytes, chunks: list[Chunk], retrieved: Retrieved | None
    ) -> Segment | None:
        """Add a segment that a sequence has computed, all its chunks resident.

        If it is here already, it gets those chunks back that were evicted.

        Returns:
            The segment in the tree, or None if ``parent`` is no longer in it.
        """
        if parent is not None and self._segments.get(parent.key) is not parent:
            return None
        segment = self._segments.get(key)
        if segment is None:
            segment = self._segments[key] = Segment(key, parent, list(chunks), retrieved)
            if parent is not None:
                parent.num_children += 1
            kept = chunks
        else:
            kept = []
            for index, (old, new) in enumerate(zip(segment.chunks, chunks, strict=True)):
                if not old.is_resident:
                    segment.chunks[index] = new
                    kept.append(new)
        for chunk in kept:
            chunk.on_evict = lambda: self._prune(segment)
        return segment

    def _prune(self, segment: Segment | None) -> None:
        while (
            segment is not None
            and segment.num_children == 0
            and not any(chunk.is_resident for chunk in segment.chunks)
            and self._segments.get(segment.key) is segment
        ):
            del self._segments[segment.key]
            segment = segment.parent
            if segment is not None:
                segment.num_children -= 1

    def check(self) -> None:
        """Raise RuntimeError unless the tree is connected and nothing in it is useless."""
        children: dict[bytes, int] = {}
        for segment in self._segments.values():
            if segment.parent is not None:
                children[segment.parent.key] = children.get(segment.parent.key, 0) + 1
                if self._segments.get(segment.parent.key) is not segment.parent:
                    raise RuntimeError("a segment's parent is not in the tree")
        for key, segment in self._segments.items():
            if segment.num_children != children.get(key, 0):
                raise RuntimeError("a segment miscounts its children")
            if segment.num_children == 0 and not any(chunk.is_resident for chunk in segment.chunks):
                raise RuntimeError("a segment without contents was kept")
