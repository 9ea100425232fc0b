"""FlashAttention that keeps its log-sum-exp. Imported on CUDA only."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl


class FlashLseImpl(FlashAttentionImpl):
    """Decoder self-attention over the paged cache, as in the base class.

    Attributes:
        lse: [num_tokens, num_heads] float32, of the last forward pass.
    """

    lse: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.fa4_hd256:
            raise ValueError("fusions 'joint' and 'scaled_logits' do not support heads of 256 with FlashAttention 4")

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output.fill_(0)
        num_tokens = attn_metadata.num_actual_tokens
        caches = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        # As in the base class: strides of size-1 dimensions must suit the tensor memory accelerator.
        key_cache, value_cache = (canonicalize_singleton_dim_strides(cache) for cache in caches)
        _, lse = flash_attn_varlen_func(
            q=query[:num_tokens],
            k=key_cache,
            v=value_cache,
            out=output[:num_tokens],
            cu_seqlens_q=attn_metadata.query_start_loc,
            max_seqlen_q=attn_metadata.max_query_len,
            seqused_k=attn_metadata.seq_lens,
            max_seqlen_k=attn_metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            window_size=list(self.sliding_window),
            block_table=attn_metadata.block_table,
            scheduler_metadata=attn_metadata.scheduler_metadata,
            num_splits=attn_metadata.max_num_splits,
            return_softmax_lse=True,
            fa_version=self.vllm_flash_attn_version,
        )[:2]
        self.lse = lse.T.float()
        return output


class FlashLseBackend(FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashLseImpl]:
        return FlashLseImpl
