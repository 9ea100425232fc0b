"""What the rows of a training batch carry from segment to segment, and what they read."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SegmentMemory:
    """What a batch of segments may attend to in the bank. N = spans in all, B rows of n spans.

    Attributes:
        keys, values: [N, R, M, d], un-rotated, of the memory layer.
        num_tokens: [N], how many of the M tokens are there; the rest is padding.
        first: [N], the first token of each span that reads; those before have no memory.
    """

    keys: torch.Tensor
    values: torch.Tensor
    num_tokens: torch.Tensor
    first: torch.Tensor

    def to(self, device: torch.device) -> SegmentMemory:
        return SegmentMemory(
            self.keys.to(device), self.values.to(device), self.num_tokens.to(device), self.first.to(device)
        )


@dataclass(frozen=True)
class Carried:
    """The last ``local_window`` tokens of each row before a segment, detached from the graph.

    Attributes:
        keys, values: one tensor a layer, [B, R, W, d], keys un-rotated.
        num_tokens: [B], how many of the W tokens (the last ones) belong to the row's document.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    num_tokens: torch.Tensor

    @classmethod
    def empty(cls, num_layers: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> Carried:
        """Nothing yet, for rows of ``shape`` [B, R, W, d]."""
        zeros = tuple(like.new_zeros(shape) for _ in range(num_layers))
        return cls(zeros, zeros, torch.zeros(shape[0], dtype=torch.long, device=like.device))

    def restarted(self, rows: torch.Tensor) -> Carried:
        """Without what the rows of ``rows`` [B] (bool) carry: they begin a document."""
        return Carried(self.keys, self.values, self.num_tokens.masked_fill(rows.to(self.num_tokens.device), 0))
