"""Decoding over vLLM's own cache on a CPU, against vLLM's kernel, which also writes that cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from memlong_vllm.kernels import vllm_blocks_cpu
from memlong_vllm.kernels.vllm_blocks_cpu import attend_vllm_blocks, compile_vllm_blocks
from memlong_vllm.local_attention import window_backend
from memlong_vllm.local_attention_cpu import CPUWindowBackend, few_tokens
from memlong_vllm.local_attention_decode_cpu import CPUDecodeBackend

# Tokens of each sequence, and how many of them are of this step.
LENGTHS, COUNTS = [1, 127, 128, 129, 700, 333], [1, 2, 1, 4, 1, 3]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


class Batch:
    """Sequences whose keys and values are in a cache that vLLM has written."""

    def __init__(self, heads: int, kv_heads: int, size: int, block_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        most = -(-max(LENGTHS) // block_size)
        num_blocks = len(LENGTHS) * most
        self.table = torch.randperm(num_blocks, generator=generator).view(len(LENGTHS), most).int()
        self.cache = torch.zeros(num_blocks, kv_heads, block_size, 2 * size, dtype=dtype)
        self._halves = self.cache.view(num_blocks, kv_heads, 2 * block_size, size).chunk(2, dim=2)
        for i, length in enumerate(LENGTHS):
            key, value = torch.randn(2, length, kv_heads, size, generator=generator).to(dtype)
            position = torch.arange(length)
            slots = self.table[i, position // block_size].long() * block_size + position % block_size
            ops.cpu_attn_reshape_and_cache(key, value, *self._halves, slots, "vec", kv_cache_dtype="auto")
        self.starts = np.concatenate([[0], np.cumsum(COUNTS)]).tolist()
        # A part of a larger tensor's rows, as layers have it.
        self.query = torch.randn(self.starts[-1], 2 * heads, size, generator=generator).to(dtype)[:, heads:]

    def by_vllm(self, window: int) -> torch.Tensor:
        lengths, starts = torch.tensor(LENGTHS, dtype=torch.int32), torch.tensor(self.starts, dtype=torch.int32)
        heads, size = self.query.shape[1:]
        sizes = {"num_heads": heads, "num_kv_heads": self.cache.shape[1], "head_dim": size, "dtype": self.query.dtype}
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(LENGTHS), seq_lens=lengths, query_start_loc=starts, causal=True, sliding_window_size=window,
            isa="vec", enable_kv_split=True, **sizes,
        )  # fmt: skip
        output, query = torch.empty(self.query.shape, dtype=self.query.dtype), self.query.contiguous()
        ops.cpu_attention_with_kv_cache(
            query, *self._halves, output, starts, lengths, scale=0.2, causal=True, alibi_slopes=None,
            sliding_window=window, block_table=self.table, softcap=0, scheduler_metadata=metadata, s_aux=None,
        )  # fmt: skip
        return output

    def by_ours(self, window: int) -> torch.Tensor:
        """Also with a cache that has no numbers where nothing has been written."""
        tokens = few_tokens(range(len(LENGTHS)), self.starts, LENGTHS)
        assert tokens is not None
        output = torch.empty(self.query.shape, dtype=self.query.dtype)
        attend_vllm_blocks(self.query, self._unwritten_spoilt(), self.table, *tokens, window, 0.2, output)
        return output

    def _unwritten_spoilt(self) -> torch.Tensor:
        num_blocks, kv_heads, block_size, twice = self.cache.shape
        spoilt = self.cache.clone().view(num_blocks, kv_heads, 2 * block_size * twice // 2)
        keys, values = spoilt.chunk(2, dim=2)
        columns, rows = keys.unflatten(2, (twice // 2, block_size)), values.unflatten(2, (block_size, twice // 2))
        for i, length in enumerate(LENGTHS):
            for number, block in enumerate(self.table[i].tolist()):
                written = min(block_size, max(0, length - number * block_size))
                columns[block, :, :, written:] = float("nan")
                rows[block, :, written:] = float("nan")
        return spoilt.view(self.cache.shape)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [-1, 1, 100, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block_size"), [(9, 3, 64, 128), (4, 4, 32, 32), (8, 2, 128, 64), (7, 1, 96, 160)]
)
def test_as_vllm_attends(
    heads: int, kv_heads: int, size: int, block_size: int, window: int, dtype: torch.dtype
) -> None:
    batch = Batch(heads, kv_heads, size, block_size, dtype)
    output, wanted = batch.by_ours(window).float(), batch.by_vllm(window).float()
    torch.testing.assert_close(output, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_nothing_is_compiled_after_the_start() -> None:
    before = len(vllm_blocks_cpu._attend.signatures)
    compile_vllm_blocks(10, 2, 32, 96, torch.float32)
    assert len(vllm_blocks_cpu._attend.signatures) == before + 1
    Batch(10, 2, 32, 96, torch.float32).by_ours(40)
    assert len(vllm_blocks_cpu._attend.signatures) == before + 1


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_which_backend_serves(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    wanted = {torch.float32: CPUWindowBackend, torch.bfloat16: CPUAttentionBackend}
    for dtype, without_avx512 in wanted.items():
        assert window_backend(CPUAttentionBackend, dtype, keeps_lse=True) is CPUWindowBackend
        other = CPUDecodeBackend if capability == "AVX512" else without_avx512
        assert window_backend(CPUAttentionBackend, dtype, keeps_lse=False) is other
