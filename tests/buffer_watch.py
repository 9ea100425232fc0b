"""Watches the tensors that a step's plan is written to, in an engine that runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memlong_vllm.plan import StepPlan
from memlong_vllm.worker.step_buffers import FIRST_ENTRY, FIRST_SLOT, NUM_CHUNKS, NUM_TOKENS, ROW
from memlong_vllm.worker.step_memory import StepMemory

BUFFERS = ("token_places", "token_idx", "positions", "slots", "spans")
Read = tuple[int, tuple[int, ...]]


class BufferWatch:
    """At the begin of each step: the buffers are those of the first step, and say what the plan says.

    Without adapters, and with the bank where the device reads it.

    Attributes:
        num_steps: checked so far.
        num_launches: of the first retrieval layer's kernel, which all of them share, so far.
    """

    def __init__(self, model: Any) -> None:
        self.num_steps = self.num_launches = 0
        self._memory: StepMemory = model.step_memory
        self._addresses = self._look_up()
        self._begin_step = self._memory.begin_step
        self._memory.begin_step = self._begin  # type: ignore[method-assign]
        kernel = next(
            layer.self_attn.memory.kernel for layer in model.model.layers if layer.self_attn.is_retrieval_layer
        )
        if kernel is not None:
            self._attend, kernel.attend = kernel.attend, self._launch

    def _look_up(self) -> list[int]:
        return [getattr(self._memory.buffers, name).data_ptr() for name in BUFFERS]

    def _launch(self, *args: Any) -> None:
        self.num_launches += 1
        self._attend(*args)

    def _begin(self, req_ids: Sequence[str], query_start_loc: np.ndarray) -> None:
        plan = self._memory._plan
        self._begin_step(req_ids, query_start_loc)
        if plan is None:
            return
        assert self._look_up() == self._addresses
        metadata, buffers = self._memory.metadata, self._memory.buffers
        assert metadata is not None
        places, reads = planned(plan, dict(zip(req_ids, query_start_loc.tolist(), strict=False)), self._chunk_size)
        assert buffers.token_places[: len(places)].tolist() == places
        assert self._reads(reads) == reads
        num_spans = sum(len(sequence.reads) for sequence in plan.sequences)
        assert not buffers.spans[num_spans:, NUM_TOKENS].any()
        self.num_steps += 1

    @property
    def _chunk_size(self) -> int:
        return self._memory.bank.chunk_size

    def _reads(self, wanted: dict[int, Read]) -> dict[int, Read]:
        """Of each row of the batch with memory: its local position and the slots it reads, as a
        captured kernel sees them; where it reads a copy, the wanted slots if it is one of them."""
        found: dict[int, Read] = {}
        bank, buffers = self._memory.bank, self._memory.buffers
        for spans, stored in self._memory.stored(0):
            first = self._first(spans.table)
            for span in buffers.spans[first : first + len(spans.table)].tolist():
                entries = slice(span[FIRST_ENTRY], span[FIRST_ENTRY] + span[NUM_TOKENS])
                rows, positions = buffers.token_idx[entries].tolist(), buffers.positions[entries].tolist()
                if stored.slots is not None:
                    slots = tuple(buffers.slots[span[FIRST_SLOT] : span[FIRST_SLOT] + span[NUM_CHUNKS]].tolist())
                else:
                    slots = wanted[rows[0]][1]
                    held = stored.keys[span[ROW], :, : span[NUM_CHUNKS] * self._chunk_size]
                    assert torch.equal(held, bank.keys[:, slots].flatten(1, 2))
                found |= {row: (position, slots) for row, position in zip(rows, positions, strict=True)}
        return found

    def _first(self, table: torch.Tensor) -> int:
        """Where in the buffer a part of it begins."""
        return (table.data_ptr() - self._memory.buffers.spans.data_ptr()) // (table.stride(0) * table.itemsize)


def planned(plan: StepPlan, first_rows: dict[str, int], chunk_size: int) -> tuple[list[int], dict[int, Read]]:
    """Places of all tokens, and what each row with memory reads, token by token."""
    places: dict[int, int] = {}
    reads: dict[int, Read] = {}
    for sequence in plan.sequences:
        offset = first_rows[sequence.request_id] - sequence.start
        for token in range(sequence.start, sequence.end):
            slot = sequence.write_slots[token // chunk_size - sequence.start // chunk_size]
            places[token + offset] = slot * chunk_size + token % chunk_size
        for span in sequence.reads:
            reads |= {token + offset: (token - span.origin, span.slots) for token in range(span.start, span.end)}
    return [places[row] for row in sorted(places)], reads
