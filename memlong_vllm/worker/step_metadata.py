"""From a step plan to the index tensors of a batch. The same for every model runner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memlong_vllm.plan import ReadSpan, SequencePlan, StepPlan
from memlong_vllm.worker.step_buffers import (
    FIRST_ENTRY,
    FIRST_SLOT,
    NUM_CHUNKS,
    NUM_COLUMNS,
    NUM_TOKENS,
    ROW,
    Spans,
    StepBuffers,
    refresh,
)
from memlong_vllm.worker.working_set import runs

PlacesOf = Callable[[np.ndarray], np.ndarray | None]


@dataclass(frozen=True)
class SlotSource:
    """Chunks that lie in the bank, or are kept as adapters made them.

    Attributes:
        slots: [num_spans, num_chunks] int64; with ``is_kept``, places among what is kept.
    """

    slots: torch.Tensor
    is_kept: bool = False


@dataclass(frozen=True)
class RowSource:
    """Chunks that lie in the working set. ``rows``: of each span, adjacent."""

    rows: range
    num_chunks: int


@dataclass(frozen=True)
class ReadGroup:
    """Spans of equal shape, attended together.

    Attributes:
        token_idx: [num_spans, span_len] int64, rows of the batch.
        positions: [num_spans, span_len] int64, local positions of these tokens; memory sits at 0.
        source: where the spans' chunks are.
        spans: the same spans as a kernel reads them.
    """

    token_idx: torch.Tensor
    positions: torch.Tensor
    source: SlotSource | RowSource
    spans: Spans


@dataclass(frozen=True)
class StepMetadata:
    """What one forward pass does with the bank. Its tensors are views of the step's buffers.

    Attributes:
        token_places: [num_tokens] int64, where each token is stored (:meth:`MemoryBank.write`).
        token_idx: [num_reading] int64, rows of the batch that have memory.
        groups: all reads of the step, those of the bank first.
        in_bank, in_rows: spans of all groups whose chunks lie in the bank, and in the working set.
    """

    token_places: torch.Tensor
    token_idx: torch.Tensor
    groups: tuple[ReadGroup, ...]
    in_bank: Spans | None
    in_rows: Spans | None

    @property
    def groups_of_slots(self) -> tuple[ReadGroup, ...]:
        """Those whose chunks do not lie in rows."""
        return tuple(group for group in self.groups if not isinstance(group.source, RowSource))


@dataclass(frozen=True)
class _Member:
    """A span, and the batch row at which position 0 of its sequence would be."""

    row_offset: int
    span: ReadSpan


@dataclass(frozen=True)
class _Part:
    """A group before it is on the device.

    Attributes:
        rows: of the working set; None: its chunks are in the bank.
        num_chunks: of each span.
        token_idx, positions: [num_spans, span_len] int64; they begin at ``first_entry`` of the step's.
        slots: [num_spans, num_chunks] int64, or none of them with ``rows``; from ``first_slot`` on.
        is_kept: whether these are places of adapted chunks.
        table: [num_spans, 5] int32 (:class:`Spans`), from ``first_span`` on.
    """

    rows: range | None
    num_chunks: int
    token_idx: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    is_kept: bool
    table: np.ndarray
    first_entry: int
    first_slot: int
    first_span: int


def build_step_metadata(
    plan: StepPlan,
    req_ids: Sequence[str],
    query_start_loc: np.ndarray,
    rows: Mapping[str, int],
    chunk_size: int,
    max_gathered_chunks: int,
    buffers: StepBuffers,
    places_of: PlacesOf | None = None,
) -> StepMetadata:
    """Translate positions of sequences to rows of the batch, and refresh the buffers with them.

    Args:
        req_ids: request of each sequence in the batch; its order may change every step.
        query_start_loc: [num_reqs + 1] first row of each sequence.
        rows: rows of the working set that hold the only span of these requests.
        max_gathered_chunks: chunks in all of a group in the bank.
        places_of: where adapted chunks of these slots are kept; None if there is no room for them.

    Raises:
        RuntimeError: if plan and batch disagree about what is computed.
    """
    places = {req_id: (int(query_start_loc[i]), int(query_start_loc[i + 1])) for i, req_id in enumerate(req_ids)}
    planned = {sequence.request_id: sequence.end - sequence.start for sequence in plan.sequences}
    if {req_id: end - start for req_id, (start, end) in places.items()} != planned:
        raise RuntimeError(f"the step plan {planned} does not fit the batch {places}")
    token_places = np.empty(sum(planned.values()), dtype=np.int64)
    gathered: dict[tuple[int, int], list[_Member]] = defaultdict(list)
    held: dict[int, dict[int, _Member]] = defaultdict(dict)
    for sequence in plan.sequences:
        first, last = places[sequence.request_id]
        if last - first == 1:  # Of a decoding sequence, of which a step can have very many.
            token_places[first] = sequence.write_slots[0] * chunk_size + sequence.start % chunk_size
        else:
            token_places[first:last] = _token_places(sequence, chunk_size)
        for span in sequence.reads:
            member = _Member(first - sequence.start, span)
            if sequence.request_id in rows:
                held[len(span.slots)][rows[sequence.request_id]] = member
            else:
                gathered[span.end - span.start, len(span.slots)].append(member)
    groups: list[tuple[list[_Member], range | None]]
    groups = [*_gathered_groups(gathered, max_gathered_chunks), *_held_groups(held)]
    return _refresh(buffers, token_places, _make_parts(groups, places_of))


def _token_places(sequence: SequencePlan, chunk_size: int) -> np.ndarray:
    positions = np.arange(sequence.start, sequence.end)
    slots = np.asarray(sequence.write_slots)[positions // chunk_size - sequence.start // chunk_size]
    return slots * chunk_size + positions % chunk_size


def _gathered_groups(
    spans: Mapping[tuple[int, int], list[_Member]], max_chunks: int
) -> Iterator[tuple[list[_Member], None]]:
    for (_, num_chunks), members in spans.items():
        size = max_chunks // num_chunks
        for first in range(0, len(members), size):
            yield members[first : first + size], None


def _held_groups(spans: Mapping[int, Mapping[int, _Member]]) -> Iterator[tuple[list[_Member], range]]:
    for members in spans.values():
        for run in runs(sorted(members)):
            yield [members[row] for row in run], run


def _make_parts(groups: Sequence[tuple[list[_Member], range | None]], places_of: PlacesOf | None) -> list[_Part]:
    parts: list[_Part] = []
    num_entries = num_slots = num_spans = 0
    for members, rows in groups:
        parts.append(part := _make_part(members, rows, num_entries, num_slots, num_spans, places_of))
        num_entries += part.token_idx.size
        num_slots += part.slots.size
        num_spans += len(members)
    return parts


def _make_part(
    members: list[_Member],
    rows: range | None,
    first_entry: int,
    first_slot: int,
    first_span: int,
    places_of: PlacesOf | None,
) -> _Part:
    positions = np.asarray([np.arange(member.span.start, member.span.end) for member in members])
    row_offsets = np.asarray([[member.row_offset] for member in members])
    origins = np.asarray([[member.span.origin] for member in members])
    num_chunks, idx = len(members[0].span.slots), np.arange(len(members))
    slots = np.asarray([() if rows else member.span.slots for member in members], dtype=np.int64)
    places = None if rows or places_of is None else places_of(slots)
    is_kept, slots = places is not None, slots if places is None else places
    table = np.empty((len(members), NUM_COLUMNS), dtype=np.int32)
    table[:, FIRST_ENTRY] = first_entry + idx * positions.shape[1]
    table[:, NUM_TOKENS] = positions.shape[1]
    table[:, NUM_CHUNKS] = num_chunks
    table[:, FIRST_SLOT] = first_slot + idx * slots.shape[1]
    table[:, ROW] = rows or idx
    token_idx, local = positions + row_offsets, positions - origins
    return _Part(rows, num_chunks, token_idx, local, slots, is_kept, table, first_entry, first_slot, first_span)


def _refresh(buffers: StepBuffers, token_places: np.ndarray, parts: Sequence[_Part]) -> StepMetadata:
    places = refresh(buffers.token_places, token_places)
    token_idx = refresh(buffers.token_idx, _joined([part.token_idx for part in parts]))
    refresh(buffers.positions, _joined([part.positions for part in parts]))
    refresh(buffers.slots, _joined([part.slots for part in parts]))
    buffers.refresh_spans(np.concatenate([np.empty((0, NUM_COLUMNS), dtype=np.int32), *(p.table for p in parts)]))
    in_bank = [part for part in parts if part.rows is None]
    in_rows = [part for part in parts if part.rows is not None]
    return StepMetadata(
        places,
        token_idx,
        tuple(_read_group(buffers, part) for part in parts),
        _spans(buffers, in_bank) if in_bank else None,
        _spans(buffers, in_rows) if in_rows else None,
    )


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *(array.ravel() for array in arrays)])


def _read_group(buffers: StepBuffers, part: _Part) -> ReadGroup:
    source: SlotSource | RowSource
    if part.rows is None:
        source = SlotSource(_view(buffers.slots, part.first_slot, part.slots), part.is_kept)
    else:
        source = RowSource(part.rows, part.num_chunks)
    token_idx = _view(buffers.token_idx, part.first_entry, part.token_idx)
    positions = _view(buffers.positions, part.first_entry, part.positions)
    return ReadGroup(token_idx, positions, source, _spans(buffers, [part]))


def _view(buffer: torch.Tensor, first: int, array: np.ndarray) -> torch.Tensor:
    """Where an array is in a buffer."""
    return buffer[first : first + array.size].view(array.shape)


def _spans(buffers: StepBuffers, parts: Sequence[_Part]) -> Spans:
    """Of adjacent parts."""
    first, last = parts[0].first_span, parts[-1].first_span + len(parts[-1].table)
    longest = max(part.token_idx.shape[1] for part in parts)
    return Spans(buffers.spans[first:last], buffers.token_idx, buffers.positions, longest)
