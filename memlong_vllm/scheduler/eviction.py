"""Which chunks a full memory forgets (section 3.2, dynamic memory update). Pure."""

from __future__ import annotations

from collections.abc import Sequence


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
