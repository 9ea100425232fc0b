"""Slots of the bank as a counted resource: owned by many, kept for later, evicted when short."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

EVICTED = -1


class SlotError(RuntimeError):
    """Slots were asked for that are not there; a bug, never a consequence of a request."""


class Chunk:
    """The contents of a slot.

    Attributes:
        slot: where they are, or ``EVICTED``.
        refs: how many hold them; at 0 they are kept only until the slot is needed.
        on_evict: called when they are lost. None: of no use to anybody once nobody holds them,
            so the slot is then free at once.
    """

    __slots__ = ("on_evict", "refs", "slot")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.refs = 1
        self.on_evict: Callable[[], None] | None = None

    @property
    def is_resident(self) -> bool:
        return self.slot != EVICTED


class SlotPool:
    """Hands out slots. Contents that nobody holds are evicted, least recently used first.

    Args:
        num_slots: slots in the bank.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._kept: OrderedDict[Chunk, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Slots that :meth:`new` can still hand out."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Slots that nobody holds but whose contents may be wanted again."""
        return len(self._kept)

    def new(self) -> Chunk:
        """A slot with one holder.

        Raises:
            SlotError: if every slot is held.
        """
        if not self._free:
            self._evict()
        return Chunk(self._free.pop())

    def hold(self, chunk: Chunk) -> None:
        """One more holder of contents that are resident."""
        if not chunk.is_resident:
            raise SlotError("these contents were evicted")
        if chunk.refs == 0:
            del self._kept[chunk]
        chunk.refs += 1

    def release(self, chunk: Chunk) -> None:
        """One holder less."""
        if chunk.refs == 0:
            raise SlotError("nobody holds this slot")
        chunk.refs -= 1
        if chunk.refs == 0:
            if chunk.on_evict is None:
                self._free.append(chunk.slot)
                chunk.slot = EVICTED
            else:
                self._kept[chunk] = None

    def clear(self) -> None:
        """Evict everything that nobody holds."""
        while self._kept:
            self._evict()

    def _evict(self) -> None:
        if not self._kept:
            raise SlotError("every slot of the bank is held")
        chunk, _ = self._kept.popitem(last=False)
        self._free.append(chunk.slot)
        self.num_evictions += 1
        chunk.slot = EVICTED
        if chunk.on_evict is not None:
            chunk.on_evict()

    def check(self, held: list[Chunk]) -> None:
        """Raise SlotError unless ``held``, one entry a holder, and this pool agree about every slot."""
        holders: dict[Chunk, int] = {}
        for chunk in held:
            holders[chunk] = holders.get(chunk, 0) + 1
        if any(chunk.refs != count or not chunk.is_resident for chunk, count in holders.items()):
            raise SlotError("a slot has other holders than it counts")
        slots = [chunk.slot for chunk in [*holders, *self._kept]] + self._free
        if sorted(slots) != list(range(self.num_slots)):
            raise SlotError("slots were lost or are owned twice")
