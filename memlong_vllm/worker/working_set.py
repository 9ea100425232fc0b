"""The working set: the retrieved chunks of decoding sequences, gathered once a retrieval."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memlong_vllm.plan import ReadSpan, StepPlan
from memlong_vllm.worker.adapted_chunks import AdaptedChunks
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.host_memory import allocate
from memlong_vllm.worker.index_tensors import index_tensor
from memlong_vllm.worker.step_buffers import Stored

# A row that no step has read for so long is as good as free. (Requests also miss steps while
# they wait for a retrieval, which replaces the row's contents anyway.)
KEPT_STEPS = 64


@dataclass(frozen=True, slots=True)
class DecodeRead:
    """A sequence's only span in this step, which no write of the step concerns."""

    request_id: str
    span: ReadSpan


def decode_reads(plan: StepPlan) -> list[DecodeRead]:
    """Reads of one token that is all a sequence computes in the step: those of decoding.

    Reads of slots that the step itself writes are left out, since a row is filled before.
    """
    written = {slot for sequence in plan.sequences for slot in sequence.write_slots}
    return [
        DecodeRead(sequence.request_id, sequence.reads[0])
        for sequence in plan.sequences
        if sequence.end - sequence.start == 1 and sequence.reads and written.isdisjoint(sequence.reads[0].slots)
    ]


@dataclass(slots=True)
class _Row:
    """Whose a row is. ``last_step``: the number of the last step that read it."""

    request_id: str
    retrieval_id: int
    last_step: int


class WorkingSet:
    """Rows of retrieved chunks on the device, each owned by a request and one of its retrievals.

    A retrieval's contents never change, so a row that was filled for it stays valid until the
    row is given to another. A request keeps its row from retrieval to retrieval; a new request
    gets the first row that nobody used of late, so that rows in use stay close together.

    With adapters each retrieval layer has rows of its own, filled with what its adapter makes of
    the stored keys and values.

    On CUDA, rows are filled on a stream of its own beside the layers below the first retrieval
    layer, which waits for them (:meth:`wait`). This has not been run on a GPU yet. Elsewhere
    they are filled at once; and so they are where filling needs other ranks, whose collective
    operations then keep one order with those of the layers.

    Args:
        adapted: where rows are filled from instead of the bank; the staging that it is made with is
            used by nobody else from a step's begin to the first :meth:`wait`.

    Attributes:
        keys, values: [num_layers, num_rows, num_kv_heads, top_k * chunk_size, head_dim], where one
            layer stands for all without adapters. A layer's rows come first: what adjacent
            rows hold is read in place, as a batch of spans, by any kind of attention.
        num_gathers: rows filled so far.
        num_reuses: reads so far that found their row filled.
    """

    def __init__(self, bank: MemoryBank, num_rows: int, top_k: int, adapted: AdaptedChunks | None = None) -> None:
        num_heads, _, chunk_size, head_dim = bank.keys.shape
        num_layers = 1 if adapted is None else len(adapted.layers)
        shape = (num_layers, num_rows, num_heads, top_k * chunk_size, head_dim)
        self.keys = allocate(shape, bank.keys.dtype, bank.device)
        self.values = allocate(shape, bank.keys.dtype, bank.device)
        self.num_gathers = 0
        self.num_reuses = 0
        self._bank = bank
        self._top_k = top_k
        self._adapted = adapted
        self._rows: list[_Row | None] = [None] * num_rows
        self._row_of: dict[str, int] = {}
        self._step = 0
        is_alone = adapted is None or not adapted.needs_other_ranks
        self._stream = torch.cuda.Stream(bank.device) if bank.device.type == "cuda" and is_alone else None
        self._filled: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def forget(self) -> None:
        """Rows hold nothing any more: what they were made with has changed."""
        self._rows = [None] * len(self._rows)
        self._row_of.clear()

    def prepare_rows(self, reads: Sequence[DecodeRead]) -> dict[str, int]:
        """Begin a step: give every read a row, as far as there are rows, and fill what changed.

        Returns:
            Row of each request. Valid in this step only, and read only after :meth:`wait`.
        """
        self._step += 1
        # Those that have a row first: nobody's is taken who is in this step.
        known = [read for read in reads if read.request_id in self._row_of]
        new = [read for read in reads if read.request_id not in self._row_of]
        changed: dict[int, tuple[int, ...]] = {}
        result: dict[str, int] = {}
        for read in known:
            self._use_row(read, self._row_of[read.request_id], changed)
        for read in new:
            if (row_idx := self._free_row()) is not None:
                self._use_row(read, row_idx, changed)
        for read in reads:
            if (row := self._row_of.get(read.request_id)) is not None:
                result[read.request_id] = row
        self._fill(changed)
        return result

    def _use_row(self, read: DecodeRead, row_idx: int, changed: dict[int, tuple[int, ...]]) -> None:
        """Make the row the read's; note in ``changed`` the slots that it must be filled from."""
        before = self._rows[row_idx]
        if before is not None and before.request_id != read.request_id:
            del self._row_of[before.request_id]
        is_filled = before is not None and before.retrieval_id == read.span.retrieval_id
        self.num_reuses += is_filled
        self.num_gathers += not is_filled
        if not is_filled:
            changed[row_idx] = read.span.slots
        self._rows[row_idx] = _Row(read.request_id, read.span.retrieval_id, self._step)
        self._row_of[read.request_id] = row_idx

    def _free_row(self) -> int | None:
        """The first row not read of late, else the one read longest ago, if not in this step."""
        last_steps = [-KEPT_STEPS if row is None else row.last_step for row in self._rows]
        for row_idx, last_step in enumerate(last_steps):
            if last_step < self._step - KEPT_STEPS:
                return row_idx
        oldest = min(range(len(last_steps)), key=last_steps.__getitem__)
        return oldest if last_steps[oldest] < self._step else None

    def _fill(self, changed: dict[int, tuple[int, ...]]) -> None:
        """Gather slots into their rows: of adjacent rows together, in one operation."""
        if not changed:
            return
        longest = None if self._adapted is None else self._adapted.most_at_once // self._top_k
        with self._beside_the_step():
            for run in runs(sorted(changed), longest):
                # Rows that hold fewer chunks repeat their last: equal shapes, and nobody looks.
                slots = [changed[row] + changed[row][-1:] * (self._top_k - len(changed[row])) for row in run]
                self._fill_run(slice(run.start, run.stop), np.asarray(slots))

    def _fill_run(self, rows: slice, slots: np.ndarray) -> None:
        banks, places = [self._bank], slots
        if self._adapted is not None:
            banks, places = self._adapted.layers, self._adapted.make(slots)
        index = index_tensor(places, self.keys.device)
        for layer, bank in enumerate(banks):
            bank.gather(index, self.keys[layer, rows], self.values[layer, rows])

    @contextlib.contextmanager
    def _beside_the_step(self) -> Iterator[None]:
        """What is done within overlaps with the step's first layers, but not with earlier steps."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            # Index tensors made within belong to this stream, so they are not reused too early.
            yield
            self._filled = self._stream.record_event()

    def wait(self) -> None:
        """Let what comes next on the current stream see the filled rows."""
        if self._filled is not None:
            torch.cuda.current_stream(self.keys.device).wait_event(self._filled)
            self._filled = None

    def read(self, rows: range, num_chunks: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A retrieval layer's keys and values of adjacent rows with ``num_chunks`` chunks each; not copied.

        Returns:
            [num_rows, num_kv_heads, num_chunks * chunk_size, head_dim].
        """
        part = slice(rows.start, rows.stop), slice(None), slice(num_chunks * self._bank.chunk_size)
        stored = self.stored(layer)
        return stored.keys[part], stored.values[part]

    def stored(self, layer: int) -> Stored:
        """All rows of a retrieval layer."""
        layer = 0 if self._adapted is None else layer
        return Stored(self.keys[layer], self.values[layer], None)


def runs(rows: Sequence[int], longest: int | None = None) -> list[range]:
    """Ascending numbers as ranges of adjacent ones, of at most ``longest`` each."""
    found: list[range] = []
    for row in rows:
        if found and row == found[-1].stop and (longest is None or len(found[-1]) < longest):
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found
