"""How the Triton kernel of retrieval attention is launched: block sizes, splits and buffers.

It has run under Triton's interpreter and been compiled for GPUs, but not run on one yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from memlong_vllm.config import MemoryConfig
from memlong_vllm.kernels.attention import retrieval_attention
from memlong_vllm.kernels.head_shape import FUSIONS, HeadShape
from memlong_vllm.worker.step_buffers import Spans, Stored

# A block of keys, and one of values, in bytes: two of each in flight fit a consumer card's shared memory.
_BLOCK_BYTES = 16384
# Programs a multiprocessor should have to be busy, and the least blocks that are worth a program.
_PROGRAMS_EACH = 4
_MIN_SPLIT_BLOCKS = 2
# Multiprocessors to imagine where there is no GPU: the interpreter, which then splits as well.
_INTERPRETED_MULTIPROCESSORS = 2


@dataclass(frozen=True)
class LaunchShape:
    """How much a program does at once: tokens of a span (all heads of a group), tokens of a chunk."""

    block_tokens: int
    block_memory: int
    num_warps: int
    num_stages: int


class RetrievalKernel:
    """Retrieval attention of all retrieval layers of a rank, one after the other.

    Args:
        top_k: chunks of the largest retrieved set.
        dtype: of queries, outputs and chunks: float32, bfloat16 or float16.

    Attributes:
        reads_all: as of :class:`memlong_vllm.kernels.retrieval_cpu.CPURetrievalKernel`.
        decode, prefill: shapes for spans of one token and for longer ones.
        constants: that the kernel is compiled with at every launch.
        max_programs: that a set is split for.
    """

    reads_all = True

    def __init__(
        self, heads: HeadShape, memory: MemoryConfig, top_k: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.heads = heads
        self._chunk_size = memory.chunk_size
        self._fusion = FUSIONS.index(memory.fusion)
        self._is_per_chunk = memory.fusion == "gated" and memory.memory_softmax == "chunk"
        block_group = triton.next_power_of_2(heads.group)
        self._block_dim = max(16, triton.next_power_of_2(heads.head_dim))
        block_memory = max(16, _BLOCK_BYTES // (self._block_dim * dtype.itemsize))
        block_memory = min(block_memory, 128, max(16, triton.next_power_of_2(memory.chunk_size)))
        # As many as keep all in registers, with a softmax a chunk and with a log-sum-exp as well.
        prefill_rows, prefill_warps = (64, 8) if dtype.itemsize == 2 else (16, 4)
        self.decode = LaunchShape(max(1, 16 // block_group), block_memory, num_warps=4, num_stages=3)
        prefill_tokens = max(1, prefill_rows // block_group)
        self.prefill = LaunchShape(prefill_tokens, block_memory, num_warps=prefill_warps, num_stages=2)
        self.constants = {
            "FUSION": self._fusion,
            "PER_CHUNK": self._is_per_chunk,
            # The interpreter multiplies bfloat16 as if it were integers.
            "FLOAT32_DOT": device.type != "cuda",
            "GROUP": heads.group,
            "HEAD_DIM": heads.head_dim,
            "PADDED_DIM": heads.padded_dim,
            "ROTARY_DIM": heads.rotary_dim,
            "CHUNK": memory.chunk_size,
            "BLOCK_GROUP": block_group,
            "BLOCK_DIM": self._block_dim,
        }
        self._top_k = top_k
        self._is_warm = False
        multiprocessors = _INTERPRETED_MULTIPROCESSORS
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.limit_programs(_PROGRAMS_EACH * multiprocessors, device)

    def limit_programs(self, max_programs: int, device: torch.device) -> None:
        """Split until there are so many, and have room for what splits leave to the last of them.

        A rank's layers use it one by one.
        """
        self.max_programs = max_programs
        rows = max_programs * self.heads.group
        self._partial = torch.empty(rows, self._block_dim, dtype=torch.float32, device=device)
        self._stats = torch.empty(rows, 2, dtype=torch.float32, device=device)
        # How many splits of an item are done; the last sets it back to 0.
        self._arrivals = torch.zeros(max_programs, dtype=torch.int32, device=device)

    def take_warm_up_spans(self) -> tuple[int, ...]:
        """With how many spans a dummy run should have it compiled, so that no request waits for that; none from
        the second call on."""
        nums = () if self._is_warm else (1, self.max_programs)
        self._is_warm = True
        return nums

    def num_splits(self, num_spans: int) -> int:
        """Programs that share the chunks of a decoding token and key-value head."""
        blocks = -(-self._chunk_size // self.decode.block_memory)
        least = -(-_MIN_SPLIT_BLOCKS // blocks) * blocks if self._is_per_chunk else _MIN_SPLIT_BLOCKS
        most = self.max_programs // (num_spans * self.heads.num_kv_heads)
        return max(1, min(self._top_k * blocks // least, most))

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
        """Fuse what spans retrieved into the output of local attention, in place.

        Everything that changes between steps is read from device tensors, also how many tokens
        and chunks each span has; the sizes here are only upper bounds of them.

        Args:
            query: [num_tokens, H·padded_dim], un-rotated.
            output: [num_tokens, H·padded_dim], the output of local attention.
            stored: the spans' chunks, un-rotated (position 0).
            cos_sin: [positions, rotary_dim], cosines and then sines of each position.
            gate, bias: [H]; ``memory_gate`` and ``memory_bias``.
            local_lse: [num_tokens, H] float32, of the scores of local attention; not for ``gated``.
        """
        heads, is_decode = self.heads, spans.max_tokens == 1
        shape = self.decode if is_decode else self.prefill
        tiles = -(-spans.max_tokens // shape.block_tokens)
        num_spans = spans.table.shape[0]
        splits = self.num_splits(num_spans) if is_decode else 1
        row_stride, head_stride = stored.strides(self._chunk_size)
        lse_strides = (0, 0) if local_lse is None else local_lse.stride()
        retrieval_attention[num_spans * tiles, heads.num_kv_heads, splits](
            query,
            output,
            gate if local_lse is None else local_lse,
            gate,
            gate if bias is None else bias,
            cos_sin,
            stored.keys,
            stored.values,
            spans.token_idx if stored.slots is None else stored.slots,
            spans.table,
            spans.token_idx,
            spans.positions,
            self._partial,
            self._stats,
            self._arrivals,
            heads.head_dim**-0.5,
            splits,
            tiles,
            query.stride(0),
            output.stride(0),
            *lse_strides,
            row_stride,
            head_stride,
            **self.constants,
            HAS_BIAS=self._fusion > 0 and bias is not None,
            FROM_SLOTS=stored.slots is not None,
            IS_SPLIT=splits > 1,
            BLOCK_TOKENS=shape.block_tokens,
            BLOCK_MEMORY=shape.block_memory,
            num_warps=shape.num_warps,
            # Where a chunk is has to be loaded a stage before the chunk.
            num_stages=shape.num_stages + (stored.slots is not None),
        )
