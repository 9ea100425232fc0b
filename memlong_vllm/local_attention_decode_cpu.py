"""vLLM's attention on a CPU with AVX-512, but for steps that only decode. Imported on CPUs only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from memlong_vllm.kernels import few_tokens_cpu, vllm_blocks_cpu
from memlong_vllm.local_attention_cpu import FewTokens, few_tokens


@dataclass
class CPUDecodeMetadata(CPUAttentionMetadata):
    """``few``: the tokens of the step, if all its sequences have few and they are attended here."""

    few: FewTokens | None = None


class CPUDecodeMetadataBuilder(CPUAttentionMetadataBuilder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of the layouts that vLLM's cache has, the one that there is a kernel for.
        self._is_known = self.isa == "vec" and self.kv_cache_dtype == "auto" and few_tokens_cpu.suits(1, self.dtype)
        if self._is_known:
            heads = self.num_heads, self.num_kv_heads, self.head_dim
            vllm_blocks_cpu.compile_vllm_blocks(*heads, self.block_size, self.dtype)

    def build(self, *args: Any, **kwargs: Any) -> CPUDecodeMetadata:
        metadata = super().build(*args, **kwargs)
        few = None
        if self._is_known and few_tokens_cpu.suits(metadata.max_query_len, self.dtype):
            starts = metadata.query_start_loc.tolist()
            few = few_tokens(range(len(starts) - 1), starts, metadata.seq_lens.tolist())
        return CPUDecodeMetadata(**vars(metadata), few=few)


class CPUDecodeImpl(CPUAttentionBackendImpl):
    """Attention over vLLM's cache, which vLLM writes. Causal, and nothing else that layers may ask for."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None or attn_metadata.few is None:
            tensors = query, key, value, kv_cache
            return super().forward(layer, *tensors, attn_metadata, output, output_scale, output_block_scale)
        token_idx, sequence_of, positions = attn_metadata.few
        places = attn_metadata.block_table, token_idx, sequence_of, positions, self.sliding_window
        vllm_blocks_cpu.attend_vllm_blocks(query, kv_cache, *places, self.scale, output)
        return output


class CPUDecodeBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CPUDecodeImpl]:
        return CPUDecodeImpl

    @staticmethod
    def get_builder_cls() -> type[CPUDecodeMetadataBuilder]:
        return CPUDecodeMetadataBuilder
