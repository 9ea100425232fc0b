"""Documents as continuing streams, one a batch row, a segment of each at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memlong_vllm.config import MemoryConfig
from memlong_vllm.training.features import DocumentFeatures
from memlong_vllm.training.segment_memory import SegmentMemory


@dataclass(frozen=True)
class SegmentBatch:
    """The next segment of every row. B rows, T tokens.

    Attributes:
        hidden: [B, T, hidden_size].
        labels: [B, T] the token after each; weights: [B, T] float32, 0 where there is none or it
            does not count.
        memory: what the rows' spans read; None if nothing was retrieved.
        restarts: [B] bool, rows that begin a document.
    """

    hidden: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    memory: SegmentMemory | None
    restarts: torch.Tensor

    def to(self, device: torch.device) -> SegmentBatch:
        memory = self.memory and self.memory.to(device)
        moved = (tensor.to(device) for tensor in (self.hidden, self.labels, self.weights))
        hidden, labels, weights = moved
        return SegmentBatch(hidden, labels, weights, memory, self.restarts.to(device))


class SegmentReader:
    """Cuts segments of ``segment_tokens`` out of documents' features.

    Args:
        with_memory: False: segments come without memory (the control).
    """

    def __init__(self, config: MemoryConfig, segment_tokens: int, head_dim: int, with_memory: bool) -> None:
        self.config, self.segment_tokens, self.head_dim = config, segment_tokens, head_dim
        self.with_memory = with_memory

    def num_segments(self, features: DocumentFeatures) -> int:
        """Whole ones; the rest of a document is left out."""
        return int(features.hidden.shape[0]) // self.segment_tokens

    def read(self, places: Sequence[tuple[DocumentFeatures, int]]) -> SegmentBatch:
        """Segment number n of each document, as a batch."""
        parts = [self._rows(features, segment) for features, segment in places]
        hidden, labels, weights = (torch.stack(column) for column in zip(*parts, strict=True))
        restarts = torch.tensor([segment == 0 for _, segment in places])
        memory = self._memory(places) if self.with_memory else None
        return SegmentBatch(hidden.float(), labels, weights, memory, restarts)

    def _rows(self, features: DocumentFeatures, segment: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, tokens = segment * self.segment_tokens, self.segment_tokens
        document = features.document
        following = document.token_ids[first + 1 : first + tokens + 1]
        labels, weights = torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens)
        labels[: len(following)] = torch.tensor(following)
        if document.loss_weights is None:
            weights[: len(following)] = 1.0
        else:
            weights[: len(following)] = torch.tensor(document.loss_weights[first + 1 : first + tokens + 1])
        return features.hidden[first : first + tokens], labels, weights

    def _memory(self, places: Sequence[tuple[DocumentFeatures, int]]) -> SegmentMemory | None:
        num_spans = self.segment_tokens // self.config.retrieval_stride
        sets = [
            (features, span)
            for features, segment in places
            for span in features.spans[segment * num_spans : (segment + 1) * num_spans]
        ]
        longest = max(len(span.chunk_ids) for _, span in sets)
        if longest == 0:
            return None
        num_tokens = torch.tensor([len(span.chunk_ids) * self.config.chunk_size for _, span in sets])
        keys, values = (
            torch.stack([self._gather(getattr(features, name), span.chunk_ids, longest) for features, span in sets])
            for name in ("keys", "values")
        )
        return SegmentMemory(keys, values, num_tokens, torch.tensor([span.first for _, span in sets]))

    def _gather(self, stored: torch.Tensor, chunk_ids: Sequence[int], num_chunks: int) -> torch.Tensor:
        """Chunks of [T, R·d] as [R, num_chunks · chunk_size, d], padded with zeros."""
        size = self.config.chunk_size
        gathered = stored.new_zeros(num_chunks * size, stored.shape[1])
        for idx, chunk in enumerate(chunk_ids):
            gathered[idx * size : (idx + 1) * size] = stored[chunk * size : (chunk + 1) * size]
        return gathered.unflatten(1, (-1, self.head_dim)).transpose(0, 1)


class Streams:
    """Endless batches over documents in a shuffled order, anew each epoch.

    Every row reads a document from its first segment to its last and then takes the next one of
    the order. Where the streams are is a few integers (:meth:`state`), so a run that continues
    from them reads what it would have read.

    Args:
        rank, num_ranks: of several processes, each takes every ``num_ranks``-th document.

    Raises:
        ValueError: if there are fewer documents than rows.
    """

    def __init__(
        self,
        documents: Sequence[DocumentFeatures],
        reader: SegmentReader,
        num_rows: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.documents, self.reader, self.seed = documents, reader, seed
        self.rank, self.num_ranks = rank, num_ranks
        self._num_own = len(range(rank, len(documents), num_ranks))
        self._order: tuple[int, list[int]] = (-1, [])  # Of an epoch.
        if self._num_own < num_rows:
            raise ValueError(f"{len(self.documents)} documents are too few for {num_rows} rows a process")
        self._taken = 0
        self._places: list[list[int]] = [[-1, 0] for _ in range(num_rows)]  # Document, next segment.

    def _order_of(self, epoch: int) -> list[int]:
        if epoch != self._order[0]:
            order = list(range(len(self.documents)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = epoch, order[self.rank :: self.num_ranks]
        return self._order[1]

    def _take_document(self) -> int:
        epoch, number = divmod(self._taken, self._num_own)
        self._taken += 1
        return self._order_of(epoch)[number]

    def next_batch(self) -> SegmentBatch:
        places = []
        for place in self._places:
            if place[0] < 0 or place[1] >= self.reader.num_segments(self.documents[place[0]]):
                place[:] = [self._take_document(), 0]
            places.append((self.documents[place[0]], place[1]))
            place[1] += 1
        return self.reader.read(places)

    @property
    def epoch(self) -> float:
        """Documents begun, in passes over all of them."""
        return self._taken / self._num_own

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken, "places": [list(place) for place in self._places]}

    def restore(self, state: dict[str, Any]) -> None:
        self._taken = int(state["taken"])
        self._places = [list(place) for place in state["places"]]
