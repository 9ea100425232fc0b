"""The index tensors of a step: allocated once, refreshed in place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from memlong_vllm.worker.index_tensors import host_tensor

# Columns of the span table.
FIRST_ENTRY, NUM_TOKENS, NUM_CHUNKS, FIRST_SLOT, ROW = range(5)
NUM_COLUMNS = 5


@dataclass(frozen=True)
class Spans:
    """Adjacent spans of a step as a kernel reads them.

    Attributes:
        table: [num_spans, 5] int32, a row a span: its first entry in ``token_idx`` and
            ``positions`` and how many they are (0: nothing to do), the number of its chunks, its
            first entry in the step's slots, and its row among keys and values that lie in rows.
        token_idx, positions: int64, those of the whole step: rows of the batch, and local positions.
        max_tokens: of the longest span.
    """

    table: torch.Tensor
    token_idx: torch.Tensor
    positions: torch.Tensor
    max_tokens: int


@dataclass(frozen=True)
class Stored:
    """Chunks of spans, where they lie.

    Attributes:
        keys, values: with ``slots``, [num_kv_heads, num_slots, chunk_size, head_dim]; without,
            [num_rows, num_kv_heads, num_tokens, head_dim], of which each span has a row. The last
            two dimensions are contiguous.
        slots: int64, those of the whole step; see :class:`Spans`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor | None

    def strides(self, chunk_size: int) -> tuple[int, int]:
        """From row to row (0 with slots) and from head to head, in chunks."""
        size = chunk_size * self.keys.shape[-1]
        if self.slots is not None:
            return 0, self.keys.stride(0) // size
        return self.keys.stride(0) // size, self.keys.stride(1) // size


class StepBuffers:
    """What changes from step to step, at addresses that do not: a captured graph that was given
    them reads the contents of the step it is replayed in.

    Args:
        max_tokens: that a step computes; a step has no more spans than that.
        top_k: chunks of the largest retrieved set.

    Attributes:
        token_places, token_idx, positions: [max_tokens] int64.
        slots: [max_tokens * top_k] int64.
        spans: [max_tokens, 5] int32; behind those of the step, spans without tokens.
    """

    def __init__(self, max_tokens: int, top_k: int, device: torch.device) -> None:
        self.token_places, self.token_idx, self.positions = (
            torch.zeros(max_tokens, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.slots = torch.zeros(max_tokens * top_k, dtype=torch.int64, device=device)
        self.spans = torch.zeros(max_tokens, NUM_COLUMNS, dtype=torch.int32, device=device)
        self._num_spans = 0

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.token_places, self.token_idx, self.positions, self.slots, self.spans))

    def refresh_spans(self, table: np.ndarray) -> None:
        """Args: table: [num_spans, 5] int32."""
        no_more = np.zeros((max(0, self._num_spans - len(table)), NUM_COLUMNS), dtype=np.int32)
        self._num_spans = len(table)
        refresh(self.spans, np.concatenate((table, no_more)))


def refresh(buffer: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    """Overwrite the first rows of a buffer, in the order of the stream, without waiting for it.

    Returns:
        These rows; valid until the next refresh.
    """
    rows = buffer[: len(array)]
    rows.copy_(host_tensor(array, buffer.device), non_blocking=True)
    return rows
