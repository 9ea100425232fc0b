"""Which chunks a memory holds, and which a full one forgets (section 3.2). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def choose_forgotten(chunks: Sequence[tuple[int, int]], capacity: int) -> list[int]:
    """Chunks to discard before one more is stored.

    The oldest tenth goes, the newest tenth is protected, and of the rest the least retrieved
    go (older first on a tie) until at most half the capacity is in use.

    Args:
        chunks: (chunk id, times retrieved) of every chunk held, by ascending id.
        capacity: chunks the memory may hold.

    Returns:
        Chunk ids, ascending; empty while there is room for one more.
    """
    count = len(chunks)
    if count < capacity:
        return []
    tenth = count // 10
    oldest = [chunk_id for chunk_id, _ in chunks[:tenth]]
    middle = sorted(chunks[tenth : count - tenth], key=lambda chunk: (chunk[1], chunk[0]))
    num_surplus = max(0, count - tenth - capacity // 2)
    return sorted(oldest + [chunk_id for chunk_id, _ in middle[:num_surplus]])


class ChunkCounters:
    """The chunks a sequence's memory holds and how often each was retrieved.

    Args:
        capacity: chunks the memory may hold.

    Attributes:
        counts: {chunk id: times retrieved}, by ascending id.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.counts: dict[int, int] = {}

    def retrieve(self, chunk_ids: Iterable[int]) -> None:
        for chunk_id in chunk_ids:
            self.counts[chunk_id] += 1

    def store(self, chunk_id: int) -> list[int]:
        """Store the next chunk; returns those forgotten for it, ascending."""
        forgotten: list[int] = []
        if len(self.counts) >= self.capacity:
            forgotten = choose_forgotten(list(self.counts.items()), self.capacity)
            for gone in forgotten:
                del self.counts[gone]
        self.counts[chunk_id] = 0
        return forgotten
