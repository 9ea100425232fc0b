"""Retrieval attention on a CPU: all that a retrieval layer does for what a step reads, in one call each."""

from __future__ import annotations

import numpy as np
import torch

from memlong_vllm.config import MemoryConfig
from memlong_vllm.kernels import query_tiles_cpu
from memlong_vllm.kernels.fusing_cpu import RetrievalSizes
from memlong_vllm.kernels.head_shape import FUSIONS, HeadShape
from memlong_vllm.kernels.memory_rows_cpu import attend_rows
from memlong_vllm.kernels.memory_spans_cpu import attend_spans
from memlong_vllm.kernels.numba_threads import flat, use_threads
from memlong_vllm.kernels.vectors_cpu import heads_at_once, num_vectors, shape_of
from memlong_vllm.worker.step_buffers import NUM_COLUMNS, Spans, Stored

_NO_SLOTS = np.zeros(1, np.int64)


class CPURetrievalKernel:
    """The CPU's counterpart of :class:`memlong_vllm.kernels.launcher.RetrievalKernel`.

    Args:
        dtype: of queries, outputs, keys and values: float32 or bfloat16.

    Attributes:
        reads_all: whether it attends to all that is stored; else to rows of the working set only, of
            spans of one token. Others have the registers for it with AVX-512 only.
    """

    def __init__(self, heads: HeadShape, memory: MemoryConfig, dtype: torch.dtype) -> None:
        self.reads_all = query_tiles_cpu.suits(dtype)
        self._heads, self._chunk_size = heads, memory.chunk_size
        dims = heads.padded_dim, heads.head_dim, heads.rotary_dim
        fusion, scale = FUSIONS.index(memory.fusion), np.float32(heads.head_dim**-0.5)
        self._sizes = RetrievalSizes(heads.group, heads.num_kv_heads, *dims, memory.chunk_size, fusion, scale)
        self._no_bias = torch.zeros(heads.num_heads, dtype=dtype)
        self._no_lse = torch.zeros(1, heads.num_heads, dtype=torch.float32)
        self._compile(dtype)

    def take_warm_up_spans(self) -> tuple[int, ...]:
        """None: it is compiled when it is made."""
        return ()

    @staticmethod
    def suits(memory: MemoryConfig, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for a configuration."""
        is_per_chunk = memory.fusion == "gated" and memory.memory_softmax == "chunk"
        return dtype in (torch.float32, torch.bfloat16) and not is_per_chunk

    def _compile(self, dtype: torch.dtype) -> None:
        """Now, or from Numba's cache of earlier runs, and not when the first request comes."""
        heads = self._heads
        rows = torch.zeros(1, heads.num_heads * heads.padded_dim, dtype=dtype)
        keys = torch.zeros(1, heads.num_kv_heads, self._chunk_size, heads.head_dim, dtype=dtype)
        entry, table = torch.zeros(1, dtype=torch.int64), torch.zeros(1, NUM_COLUMNS, dtype=torch.int32)
        cos_sin = torch.zeros(1, heads.rotary_dim, dtype=dtype)
        for max_tokens in (1, 2) if self.reads_all else (1,):
            spans = Spans(table, entry, entry, max_tokens)
            self.attend(rows, rows, spans, Stored(keys, keys, None), cos_sin, self._no_bias)

    def attend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        spans: Spans,
        stored: Stored,
        cos_sin: torch.Tensor,
        gate: torch.Tensor,
        bias: torch.Tensor | None = None,
        local_lse: torch.Tensor | None = None,
    ) -> None:
        """As :meth:`memlong_vllm.kernels.launcher.RetrievalKernel.attend`."""
        use_threads()
        heads = self._heads
        bias = self._no_bias if bias is None else bias
        lse = (self._no_lse if local_lse is None else local_lse).numpy()
        # With a gate and a bias a head: their only stride is 1.
        layer = flat(cos_sin), flat(gate)[0], flat(bias)[0]
        tokens = spans.table.numpy(), spans.token_idx.numpy(), spans.positions.numpy()
        arrays = flat(query), flat(output), *layer, flat(stored.keys), flat(stored.values), lse, tokens
        common = *arrays, self._sizes, shape_of(heads.head_dim)
        if spans.max_tokens == 1 and stored.slots is None:
            attend_rows(*common, heads_at_once(heads.group, num_vectors(heads.head_dim)))
        else:
            slots = _NO_SLOTS if stored.slots is None else stored.slots.numpy()
            tile = query_tiles_cpu.tile_of(heads.head_dim)
            attend_spans(*common, slots, stored.slots is not None, spans.max_tokens, *tile)
