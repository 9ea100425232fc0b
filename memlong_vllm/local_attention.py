"""Which attention backend serves the local window.

The fusions ``joint`` and ``scaled_logits`` need the log-sum-exp of local attention. vLLM's backends
compute it but do not hand it out, so retrieval layers of these fusions use subclasses that do. So
do all layers on CPUs without AVX-512 in float32, where our attention is the faster one: 213 to 254 ms
for 6,144 tokens of prefill where vLLM's takes 284 to 291. With AVX-512 vLLM's kernel for vectors is
the faster one for prompts (26 ms for 2,048 tokens behind a full window of 1,024, where ours takes 31),
and ours for steps in which no sequence has many tokens (0.33 to 0.43 ms for eight that decode, where vLLM's
takes 0.63 to 0.72; nine heads of 64 on three key-value heads, float32), so other layers use a subclass that
does these steps over vLLM's own cache. (Not with heads of a size that is no multiple of 32, nor with AMX in
bfloat16, which vLLM has other kernels for.) Everything else uses vLLM's backends as they are.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.selector import get_attn_backend

_COMMON_HEAD_SIZES = (64, 128, 256)


def choose_backend(head_dim: int, dtype: torch.dtype, cache_dtype: str) -> tuple[type[AttentionBackend], int]:
    """vLLM's backend for a head size, and the size that heads are padded to for it.

    Sizes that are a multiple of 8 come first: FlashAttention takes any of them.

    Raises:
        ValueError: if no backend takes a size of at least ``head_dim``.
    """
    sizes = dict.fromkeys([-(-head_dim // 8) * 8, *(size for size in _COMMON_HEAD_SIZES if size >= head_dim)])
    reasons = []
    for size in sizes:
        try:
            backend = get_attn_backend(size, dtype, cache_dtype, has_sliding_window=True)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if backend.supports_head_size(size):
            return backend, size
        if fitting := [supported for supported in backend.get_supported_head_sizes() if supported >= head_dim]:
            return backend, min(fitting)
    raise ValueError(f"no attention backend takes heads of {head_dim} or a little more: {'; '.join(reasons)}")


def window_backend(base: type[AttentionBackend], dtype: torch.dtype, keeps_lse: bool) -> type[AttentionBackend]:
    """The backend of a layer: ``base``, or one of ours where that is needed or faster.

    Raises:
        ValueError: if the layer must keep its log-sum-exp and there is no such variant of ``base``.
    """
    if keeps_lse:
        return lse_backend(base)
    if base.get_name() != "CPU_ATTN":
        return base
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        from memlong_vllm.local_attention_decode_cpu import CPUDecodeBackend

        return CPUDecodeBackend
    return lse_backend(base) if dtype == torch.float32 else base


def lse_backend(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """The variant of an attention backend whose implementation keeps ``lse``.

    Raises:
        ValueError: if there is none.
    """
    if base.get_name() == "CPU_ATTN":
        from memlong_vllm.local_attention_cpu import CPUWindowBackend

        return CPUWindowBackend
    if base.get_name() == "FLASH_ATTN":
        from memlong_vllm.local_attention_cuda import FlashLseBackend

        return FlashLseBackend
    raise ValueError(
        f"fusions 'joint' and 'scaled_logits' need the local log-sum-exp, which is available with the attention "
        f"backends CPU_ATTN and FLASH_ATTN, not {base.get_name()}: use fusion 'gated', or --dtype bfloat16 and "
        "--attention-backend FLASH_ATTN"
    )
