"""A retrieval layer's own keys and values of the stored ones: the extension ``memory_adapter``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from memlong_vllm.adapter_input import adapter_input
from memlong_vllm.worker.transfer import RankHeads

AllGather = Callable[[torch.Tensor], torch.Tensor]
"""Joins the tensors that all ranks call it with along the last dimension, in the order of ranks."""


class AdapterWeights(Protocol):
    """W_k and W_v of a layer, [S, w·2·S], where S is all ranks' key-value heads, joined.

    They multiply [k;v] of a stored token and of the w − 1 before it in its chunk, and are whole on every rank.
    """

    @property
    def memory_k_adapter(self) -> torch.Tensor: ...

    @property
    def memory_v_adapter(self) -> torch.Tensor: ...


class Adaptation:
    """Applies the adapters of all retrieval layers of one rank.

    All ranks' heads make each head, so ranks exchange what they have stored. Ranks execute the
    same plan: they adapt the same chunks in the same order, as a collective operation needs.

    Args:
        layers: the retrieval layers' weights, looked up at each use, since loaders replace them.
        heads: this rank's place among the ranks.
        max_tokens: tokens of one rank's heads that staging holds. No more than its size is made for
            a moment of what adapters multiply, all ranks' keys and values of w tokens each, unless
            one token of every span is more.
        chunk_size: tokens a chunk.

    Attributes:
        num_adapted: spans multiplied by weights so far, each once a layer.
    """

    def __init__(
        self,
        layers: Sequence[AdapterWeights],
        heads: RankHeads,
        max_tokens: int,
        all_gather: AllGather,
        chunk_size: int,
    ) -> None:
        self.num_adapted = 0
        self._layers = layers
        self._heads = heads
        rows, columns = layers[0].memory_k_adapter.shape
        self._width = columns // (2 * rows)
        self._chunk_size = chunk_size
        self._max_tokens = max_tokens // (heads.num_ranks * self._width)
        self._all_gather = all_gather
        self._identities: frozenset[int] = frozenset()
        self._is_stale = True

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def needs_other_ranks(self) -> bool:
        return self._heads.num_ranks > 1

    def weights_changed(self) -> None:
        """They are other ones from the next :meth:`prepare` on."""
        self._is_stale = True

    def prepare(self) -> None:
        """Begin a step. The first one with new weights waits for the device.

        Not while weights are loaded: when vLLM reloads, they are elsewhere until all have come.
        """
        if self._is_stale:
            # What such a layer reads is exactly what is stored: so the memory layer, unless trained.
            self._identities = frozenset(i for i, layer in enumerate(self._layers) if _is_identity(layer))
            self._is_stale = False

    def adapt(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        """Make a layer's keys and values of stored ones, in place.

        Args:
            keys, values: [num_spans, num_kv_heads, num_tokens, head_dim], this rank's heads.
            layer: counts retrieval layers.
        """
        if layer in self._identities:
            return
        self.num_adapted += keys.shape[0]
        # A part comes with the tokens before it.
        size = max(1, self._max_tokens // keys.shape[0] - (self._width - 1))
        # From the end, so that nothing is overwritten before tokens behind it have seen it.
        for first in reversed(range(0, keys.shape[2], size)):
            tokens = slice(first, min(first + size, keys.shape[2]))
            stored = self._join(keys, values, tokens)
            for weight, out in (
                (self._layers[layer].memory_k_adapter, keys),
                (self._layers[layer].memory_v_adapter, values),
            ):
                self._apply(weight, stored, out[:, :, tokens])

    def _join(self, keys: torch.Tensor, values: torch.Tensor, tokens: slice) -> torch.Tensor:
        """[G, R, M, d] of this rank -> a copy, [G, T, w·2·S]: all ranks' keys, then their values, then
        those of the tokens before."""
        first = max(0, tokens.start - self._width + 1)
        part = slice(first, tokens.stop)
        mine = torch.stack((keys[:, :, part].transpose(1, 2), values[:, :, part].transpose(1, 2)), dim=2).flatten(3)
        stored = adapter_input(self._all_gather(mine).flatten(2), self._width, self._chunk_size, first)
        return stored[:, tokens.start - first :]

    def _apply(self, weight: torch.Tensor, stored: torch.Tensor, out: torch.Tensor) -> None:
        """[G, T, w·2·S] -> this rank's heads, [G, R, T, d]."""
        num_heads, head_dim = out.shape[1], out.shape[3]
        first = self._heads.first_head * head_dim
        adapted = stored @ weight[first : first + num_heads * head_dim].T
        out.copy_(adapted.unflatten(-1, (num_heads, head_dim)).transpose(1, 2))


def _is_identity(layer: AdapterWeights) -> bool:
    """Whether a layer's keys and values are the stored ones to the last bit."""
    size = layer.memory_k_adapter.shape[0]
    return all(
        bool(weight.diagonal(offset).eq(1).all()) and int(weight.count_nonzero()) == size
        for weight, offset in ((layer.memory_k_adapter, 0), (layer.memory_v_adapter, size))
    )
