"""Linear maps by which layers above read what one layer stored: ``memory_adapter: "linear"``, fitted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memlong_vllm.adapter_input import adapter_input
from memlong_vllm.probe.backbone import Backbone, read_passage
from memlong_vllm.probe.reading import Memory
from memlong_vllm.ridge import RidgeAccumulator

FLOAT64_BYTES = 8


@dataclass(frozen=True)
class ReaderMap:
    """From the memory layer's [k;v] to one layer's keys and values.

    Attributes:
        keys, values: [kv, width * 2 * kv] each, as ``memory_k_adapter`` and ``memory_v_adapter``.
        chunk_size: of what is read, whole chunks.
        key_r_squared, value_r_squared: over passages that were not fitted.
    """

    keys: Tensor
    values: Tensor
    chunk_size: int
    key_r_squared: float
    value_r_squared: float

    def apply(self, stored: Memory) -> Memory:
        both = torch.cat([_rows(stored.keys), _rows(stored.values)], dim=-1).to(self.keys.dtype)
        both = adapter_input(both, self.keys.shape[1] // both.shape[1], self.chunk_size)
        heads = stored.keys.shape[0]
        keys, values = ((both @ w.T).unflatten(-1, (heads, -1)).transpose(0, 1) for w in (self.keys, self.values))
        dtype = stored.keys.dtype
        return Memory(keys.contiguous().to(dtype), values.contiguous().to(dtype))


def _rows(states: Tensor) -> Tensor:
    """[heads, tokens, d] as [tokens, heads * d]."""
    return states.transpose(0, 1).flatten(1)


def sums_bytes(backbone: Backbone, memory_layers: Sequence[int], adapter_width: int) -> int:
    """Memory that fitting takes for the sums of these memory layers, fitted and unseen."""
    outputs = 2 * backbone.num_kv_heads * backbone.head_dim
    inputs = adapter_width * outputs
    targets = sum((backbone.num_layers - 1 - layer) * outputs for layer in memory_layers)
    return 2 * FLOAT64_BYTES * inputs * (targets + inputs * len(memory_layers))


class MapFitter:
    """Collects passages, then fits maps from each of ``memory_layers`` to every layer above it.

    Args:
        adapter_width: tokens that a map sees, as ``memory_adapter_width``.

    Raises (``fit``):
        RidgeError: for too few tokens.
    """

    def __init__(
        self, backbone: Backbone, memory_layers: Sequence[int], window: int, chunk_size: int, adapter_width: int
    ) -> None:
        self.backbone, self.window = backbone, window
        self.chunk_size, self.adapter_width = chunk_size, adapter_width
        width = 2 * backbone.num_kv_heads * backbone.head_dim
        sizes = {
            m: (adapter_width * width, (backbone.num_layers - 1 - m) * width)
            for m in memory_layers
            if m < backbone.num_layers - 1
        }
        self.width = width
        self.fitted, self.unseen = (
            {m: RidgeAccumulator(*size, device=backbone.device) for m, size in sizes.items()} for _ in range(2)
        )

    def add(self, passages: Iterable[Sequence[int]], *, unseen: bool = False) -> None:
        """Read passages of token ids; ``unseen``: for R², not for the maps."""
        for token_ids in passages:
            read = read_passage(self.backbone, torch.tensor(token_ids, device=self.backbone.device), self.window)
            rows = [torch.cat([_rows(layer.raw_keys), _rows(layer.values)], dim=-1) for layer in read]
            for memory_layer, sums in (self.unseen if unseen else self.fitted).items():
                seen = adapter_input(rows[memory_layer], self.adapter_width, self.chunk_size)
                sums.add(seen, torch.cat(rows[memory_layer + 1 :], dim=-1))

    def fit(self, ridge: float) -> dict[int, dict[int, ReaderMap]]:
        """Maps by memory layer and reading layer."""
        found: dict[int, dict[int, ReaderMap]] = {}
        for memory_layer, sums in self.fitted.items():
            maps, unseen, kv = sums.fit(ridge), self.unseen[memory_layer], self.width // 2
            found[memory_layer] = {}
            for index in range(self.backbone.num_layers - 1 - memory_layer):
                keys, values = (slice(first, first + kv) for first in (2 * index * kv, (2 * index + 1) * kv))
                found[memory_layer][memory_layer + 1 + index] = ReaderMap(
                    maps[keys].float(),
                    maps[values].float(),
                    self.chunk_size,
                    unseen.r_squared(maps, keys),
                    unseen.r_squared(maps, values),
                )
        return found
