"""From a step plan to the index tensors of a batch. The same for every model runner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memlong_vllm.plan import ReadSpan, SequencePlan, StepPlan
from memlong_vllm.worker.index_tensors import index_tensor
from memlong_vllm.worker.working_set import runs


@dataclass(frozen=True)
class SlotSource:
    """Chunks that each layer gathers anew. ``slots``: [num_spans, num_chunks] int64."""

    slots: torch.Tensor


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
    """

    token_idx: torch.Tensor
    positions: torch.Tensor
    source: SlotSource | RowSource


@dataclass(frozen=True)
class StepMetadata:
    """What one forward pass does with the bank.

    Attributes:
        token_places: [num_tokens] int64, where each token is stored (:meth:`MemoryBank.write`).
        groups: all reads of the step.
    """

    token_places: torch.Tensor
    groups: tuple[ReadGroup, ...]


@dataclass(frozen=True)
class _Member:
    """A span, and the batch row at which position 0 of its sequence would be."""

    row_offset: int
    span: ReadSpan


def build_step_metadata(
    plan: StepPlan,
    req_ids: Sequence[str],
    query_start_loc: np.ndarray,
    rows: Mapping[str, int],
    chunk_size: int,
    max_gathered_chunks: int,
    device: torch.device,
) -> StepMetadata:
    """Translate positions of sequences to rows of the batch.

    Args:
        req_ids: request of each sequence in the batch; its order may change every step.
        query_start_loc: [num_reqs + 1] first row of each sequence.
        rows: rows of the working set that hold the only span of these requests.
        max_gathered_chunks: chunks in all of a group that is gathered.

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
        token_places[first:last] = _token_places(sequence, chunk_size)
        for span in sequence.reads:
            member = _Member(first - sequence.start, span)
            if sequence.request_id in rows:
                held[len(span.slots)][rows[sequence.request_id]] = member
            else:
                gathered[span.end - span.start, len(span.slots)].append(member)
    groups = [*_gathered_groups(gathered, max_gathered_chunks, device), *_held_groups(held, device)]
    return StepMetadata(index_tensor(token_places, device), tuple(groups))


def _token_places(sequence: SequencePlan, chunk_size: int) -> np.ndarray:
    positions = np.arange(sequence.start, sequence.end)
    slots = np.asarray(sequence.write_slots)[positions // chunk_size - sequence.start // chunk_size]
    return slots * chunk_size + positions % chunk_size


def _gathered_groups(
    spans: Mapping[tuple[int, int], list[_Member]], max_chunks: int, device: torch.device
) -> Iterator[ReadGroup]:
    for (_, num_chunks), members in spans.items():
        size = max_chunks // num_chunks
        for first in range(0, len(members), size):
            part = members[first : first + size]
            slots = index_tensor(np.asarray([member.span.slots for member in part]), device)
            yield _read_group(part, SlotSource(slots), device)


def _held_groups(spans: Mapping[int, Mapping[int, _Member]], device: torch.device) -> Iterator[ReadGroup]:
    for num_chunks, members in spans.items():
        for run in runs(sorted(members)):
            yield _read_group([members[row] for row in run], RowSource(run, num_chunks), device)


def _read_group(members: list[_Member], source: SlotSource | RowSource, device: torch.device) -> ReadGroup:
    positions = np.asarray([np.arange(member.span.start, member.span.end) for member in members])
    row_offsets = np.asarray([[member.row_offset] for member in members])
    origins = np.asarray([[member.span.origin] for member in members])
    token_idx, local = (index_tensor(array, device) for array in (positions + row_offsets, positions - origins))
    return ReadGroup(token_idx, local, source)
