"""What retrieval layers made of stored chunks, kept for the retrievals to come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from memlong_vllm.worker.adaptation import Adaptation
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.index_tensors import index_tensor
from memlong_vllm.worker.staging import Staging


@dataclass(slots=True)
class _Kept:
    """Where a slot's chunk is kept. ``last_round``: the last that asked for it."""

    place: int
    last_round: int


class AdaptedChunks:
    """The chunks used last, as each retrieval layer reads them.

    An adapter sees a chunk by itself, so what it makes of one is the same for every retrieval that
    finds it, until its slot is written again. Successive retrievals find many of the same chunks.

    What is asked for in one round (:meth:`begin_round`) is there at the same time. It is computed
    by :meth:`fill`, when the chunks are in the bank.

    Args:
        staging: what is adapted passes through it.
        num_chunks: that are kept for each layer; at least as many as staging holds, or the bank.

    Attributes:
        layers: a bank for each retrieval layer, with places for slots.
    """

    def __init__(self, bank: MemoryBank, staging: Staging, adaptation: Adaptation, num_chunks: int) -> None:
        num_heads, num_slots, chunk_size, head_dim = bank.keys.shape
        self._num_chunks = num_chunks
        if num_chunks < min(num_slots, staging.num_chunks):
            raise ValueError(f"{num_chunks} chunks are fewer than staging holds ({staging.num_chunks})")
        self.layers = [
            MemoryBank(num_chunks, chunk_size, num_heads, head_dim, bank.keys.dtype, bank.device)
            for _ in range(adaptation.num_layers)
        ]
        self._staging, self._adaptation = staging, adaptation
        # By slot; those that were asked for longest ago come first.
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._free = list(range(num_chunks))
        self._missing: dict[int, int] = {}
        self._round = 0
        self._num_in_round = 0

    @property
    def most_at_once(self) -> int:
        """Chunks that :meth:`make` has room for whatever they are."""
        return self._staging.num_chunks

    @property
    def needs_other_ranks(self) -> bool:
        return self._adaptation.needs_other_ranks

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)

    def forget(self) -> None:
        """What was made with other weights."""
        self.written(list(self._kept))

    def written(self, slots: Iterable[int]) -> None:
        """Slots that hold something else from now on, or will in this step."""
        for slot in slots:
            if slot in self._kept:
                self._drop(slot)

    def _drop(self, slot: int) -> None:
        kept = self._kept.pop(slot)
        self._free.append(kept.place)
        self._num_in_round -= kept.last_round == self._round
        self._missing.pop(slot, None)

    def begin_round(self) -> None:
        """What earlier rounds asked for may make room."""
        self._round += 1
        self._num_in_round = 0

    def places(self, slots: np.ndarray) -> np.ndarray | None:
        """Where chunks are, after the next :meth:`fill`; None if there is no room for them beside what
        this round has asked for.

        Args:
            slots: int64, of any shape.
        """
        asked = [int(slot) for slot in np.unique(slots)]
        others = self._num_in_round - sum(self._is_in_round(slot) for slot in asked)
        if len(asked) + others > self._num_chunks:
            return None
        known = [slot for slot in asked if slot in self._kept]
        for slot in (*known, *(slot for slot in asked if slot not in self._kept)):
            self._use(slot)
        place_of = {slot: self._kept[slot].place for slot in asked}
        return np.asarray([place_of[int(slot)] for slot in slots.flat], dtype=np.int64).reshape(slots.shape)

    def _is_in_round(self, slot: int) -> bool:
        return slot in self._kept and self._kept[slot].last_round == self._round

    def _use(self, slot: int) -> None:
        """Keep the slot's chunk, in the place of the one that was asked for longest ago if need be."""
        if self._is_in_round(slot):
            return
        if slot not in self._kept:
            if not self._free:
                self._drop(next(iter(self._kept)))
            self._missing[slot] = self._free.pop()
            self._kept[slot] = _Kept(self._missing[slot], self._round)
        self._kept[slot].last_round = self._round
        self._kept.move_to_end(slot)
        self._num_in_round += 1

    def make(self, slots: np.ndarray) -> np.ndarray:
        """A round of its own: chunks that are in the bank now, made at once if need be.

        Args:
            slots: int64, of any shape, :attr:`most_at_once` at most.

        Returns:
            Their places, until the next round.
        """
        self.begin_round()
        places = self.places(slots)
        assert places is not None
        self.fill()
        return places

    def fill(self) -> None:
        """Make what has been asked for and is not there yet, of the slots as they are now."""
        missing, size = list(self._missing.items()), self._staging.num_chunks
        for first in range(0, len(missing), size):
            self._adapt(missing[first : first + size])
        self._missing.clear()

    def _adapt(self, missing: Sequence[tuple[int, int]]) -> None:
        slots, places = index_tensor(np.asarray(missing, dtype=np.int64).T.copy(), self.layers[0].device)
        for layer, kept in enumerate(self.layers):
            stored = self._staging.gather(slots[:, None])
            self._adaptation.adapt(*stored, layer)
            kept.write_chunks(places, *stored)

    def abandon(self) -> None:
        """What was not filled never will be."""
        self.written(list(self._missing))
