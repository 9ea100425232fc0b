"""From a step plan to the index tensors of a batch. The same for every model runner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memlong_vllm.plan import ReadSpan, StepPlan


@dataclass(frozen=True)
class ReadGroup:
    """Spans of equal shape, attended together. All tensors int64.

    Attributes:
        token_idx: [num_spans, span_len] rows of the batch.
        positions: [num_spans, span_len] local positions of these tokens; memory sits at 0.
        slots: [num_spans, num_chunks] bank slots.
    """

    token_idx: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class StepMetadata:
    """What one forward pass does with the bank.

    Attributes:
        token_places: [num_tokens] int64, where each token is stored (:meth:`MemoryBank.write`).
        groups: all reads of the step.
    """

    token_places: torch.Tensor
    groups: tuple[ReadGroup, ...]


def build_step_metadata(
    plan: StepPlan, req_ids: Sequence[str], query_start_loc: np.ndarray, chunk_size: int, device: torch.device
) -> StepMetadata:
    """Translate positions of sequences to rows of the batch.

    Args:
        req_ids: request of each sequence in the batch; its order may change every step.
        query_start_loc: [num_reqs + 1] first row of each sequence.

    Raises:
        RuntimeError: if plan and batch disagree about what is computed.
    """
    rows = {req_id: (int(query_start_loc[i]), int(query_start_loc[i + 1])) for i, req_id in enumerate(req_ids)}
    planned = {sequence.request_id: sequence.end - sequence.start for sequence in plan.sequences}
    if {req_id: end - start for req_id, (start, end) in rows.items()} != planned:
        raise RuntimeError(f"the step plan {planned} does not fit the batch {rows}")
    token_places = np.empty(sum(planned.values()), dtype=np.int64)
    spans: dict[tuple[int, int], list[tuple[int, ReadSpan]]] = defaultdict(list)
    for sequence in plan.sequences:
        first, last = rows[sequence.request_id]
        positions = np.arange(sequence.start, sequence.end)
        slots = np.asarray(sequence.write_slots)[positions // chunk_size - sequence.start // chunk_size]
        token_places[first:last] = slots * chunk_size + positions % chunk_size
        for span in sequence.reads:
            spans[span.end - span.start, len(span.slots)].append((first - sequence.start, span))
    groups = tuple(_read_group(members, device) for members in spans.values())
    return StepMetadata(torch.from_numpy(token_places).to(device), groups)


def _read_group(members: list[tuple[int, ReadSpan]], device: torch.device) -> ReadGroup:
    """Members: (batch row of the sequence's position 0, span), spans of equal shape."""
    positions = np.asarray([np.arange(span.start, span.end) for _, span in members])
    row_offsets = np.asarray([[offset] for offset, _ in members])
    origins = np.asarray([[span.origin] for _, span in members])
    slots = np.asarray([span.slots for _, span in members])
    tensors = (positions + row_offsets, positions - origins, slots)
    return ReadGroup(*(torch.from_numpy(array).to(device) for array in tensors))
