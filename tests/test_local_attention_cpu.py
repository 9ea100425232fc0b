"""Local attention with log-sum-exp on a CPU, over a cache in blocks, against plain PyTorch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memlong_vllm.local_attention_cpu import _QUERY_BLOCK, CPUWindowImpl, WindowStep
from memlong_vllm.memory_attention import attend_with_lse

HEADS, KV_HEADS, SIZE = 6, 2, 40
# Of each sequence, the tokens before this step and those of it: of both kernels, and none.
BATCH = [(0, _QUERY_BLOCK + 45), (500, 1), (3, 0), (100, 3), (64, 5), (0, 2 * _QUERY_BLOCK)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def implementation() -> CPUWindowImpl:
    """Its constructor wants an engine's configuration, for what this class does not use."""
    made = object.__new__(CPUWindowImpl)
    made.scale, made.head_size = 0.3, SIZE
    return made


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [-1, 1, 30, 400])
@pytest.mark.parametrize(("capability", "block_size"), [("AVX2", 16), ("AVX512", 16), ("AVX512", 128), ("AVX512", 160)])
def test_a_batch_of_all_kinds(
    capability: str, block_size: int, window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of several tiles; with our kernel of many tokens and with PyTorch's."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    generator = torch.Generator().manual_seed(0)
    lengths, counts = [before + count for before, count in BATCH], [count for _, count in BATCH]
    starts = np.concatenate([[0], np.cumsum(counts)])
    query = torch.randn(int(starts[-1]), HEADS, SIZE, generator=generator).to(dtype)
    keys, values = (
        [torch.randn(length, KV_HEADS, SIZE, generator=generator).to(dtype) for length in lengths] for _ in range(2)
    )
    most = -(-max(lengths) // block_size)
    table = torch.randperm(len(BATCH) * most, generator=generator).view(len(BATCH), most).int()
    cache = torch.full((len(BATCH) * most, KV_HEADS, block_size, 2 * SIZE), float("nan"), dtype=dtype)
    attention = implementation()
    for i, length in enumerate(lengths):
        positions = torch.arange(length)
        slots = table[i, positions // block_size].long() * block_size + positions % block_size
        padded = torch.cat((slots, torch.tensor([-1])))
        padding = torch.full((1, KV_HEADS, SIZE), float("nan"), dtype=dtype)
        attention.do_kv_cache_update(
            torch.nn.Identity(), torch.cat((keys[i], padding)), torch.cat((values[i], padding)), cache, padded
        )
    metadata = SimpleNamespace(step=WindowStep(starts.tolist(), lengths, table, block_size, window, dtype))
    output = attention.forward(None, query, query, query, cache, metadata, torch.empty_like(query))
    zero = torch.zeros(HEADS)
    for i, (before, count) in enumerate(BATCH):
        for position in range(before, before + count):
            row, first = int(starts[i]) + position - before, max(0, position - window + 1) if window > 0 else 0
            seen = slice(first, position + 1)
            wanted, lse = attend_with_lse(
                query[row].float()[None, None], keys[i][seen].float().transpose(0, 1)[None],
                values[i][seen].float().transpose(0, 1)[None], zero + 0.3, zero,
            )  # fmt: skip
            torch.testing.assert_close(output[row].float(), wanted[0, 0], atol=TOLERANCE[dtype], rtol=0)
            lse_tolerance = 2e-3 if dtype == torch.float16 else 1e-4
            torch.testing.assert_close(attention.lse[row], lse[0, 0], atol=lse_tolerance, rtol=1e-6)
