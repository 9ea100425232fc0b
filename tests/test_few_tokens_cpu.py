"""The CPU's kernels for a few query tokens, against plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memlong_vllm.kernels import few_tokens_cpu, kv_cache_cpu
from memlong_vllm.kernels.few_tokens_cpu import MAX_TOKENS, attend_windows, suits
from memlong_vllm.kernels.numba_threads import njit
from memlong_vllm.memory_attention import attend_with_lse

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [0, 1, 50, 1000])
def test_windows(window: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, size, block_size, positions = 6, 2, 40, 16, np.array([0, 15, 16, 17, 100, 127])
    cache = torch.randn(20, kv_heads, block_size, 2 * size, generator=generator).to(dtype)
    table = torch.stack([torch.randperm(20, generator=generator)[:8] for _ in range(3)]).int()
    sequence_of = np.array([0, 1, 2, 0, 1, 2])
    query = torch.randn(len(positions), heads, size, generator=generator).to(dtype)
    # Of a batch with other tokens, and a query that is a part of a larger tensor's rows.
    token_idx, size_of_batch = np.array([7, 0, 1, 3, 4, 5]), 9
    batch = torch.full((size_of_batch, 2 * heads, size), float("nan"), dtype=dtype)
    batch[token_idx, heads:] = query
    outputs, lses = torch.full((size_of_batch, heads, size), 7.0, dtype=dtype), torch.full((size_of_batch, heads), 7.0)
    batch = batch[:, heads:]
    attend_windows(batch, cache, table, token_idx, sequence_of, positions, window, 0.3, outputs, lses)
    assert (outputs[[2, 6, 8]] == 7).all()
    assert (lses[[2, 6, 8]] == 7).all()
    output, lse = outputs[token_idx].float(), lses[token_idx]
    for row, position in enumerate(positions):
        tokens = cache[table[sequence_of[row]].long()].transpose(0, 1).flatten(1, 2)[:, : position + 1].float()
        keys, values = (tokens[:, -window:] if window else tokens)[None].split(size, dim=-1)
        scale = torch.full((heads,), 0.3)
        wanted, wanted_lse = attend_with_lse(query[None, row : row + 1].float(), keys, values, scale, 0 * scale)
        torch.testing.assert_close(output[row], wanted[0, 0], atol=TOLERANCE[dtype], rtol=0)
        torch.testing.assert_close(lse[row], wanted_lse[0, 0], atol=1e-5, rtol=1e-6)


def test_nothing_is_compiled_after_the_start() -> None:
    """Whatever the shapes and layouts are: with a head size that no other test has."""
    size = 24
    kernels = few_tokens_cpu._attend_windows, kv_cache_cpu._store
    before = [len(kernel.signatures) for kernel in kernels]
    few_tokens_cpu.compile_windows(2, 2, size, torch.float32)
    kv_cache_cpu.compile_store(size, torch.float32)
    assert [len(kernel.signatures) for kernel in kernels] == [count + 1 for count in before]
    large = torch.zeros(3, 2, 40, 2 * size)
    attended = np.array([0]), np.array([1]), np.array([20])
    for table in (torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, 12, dtype=torch.int32)[:, :9]):
        query = large[:, :, 0, :size]
        attend_windows(query, large, table, *attended, 8, 1.0, torch.empty(3, 2, size), torch.empty(3, 2))
    for tokens in (1, 3):
        kv_cache_cpu.store(large[:tokens, :, 1, :size], large[:tokens, :, 2, size:], large, torch.arange(tokens))
    assert [len(kernel.signatures) for kernel in kernels] == [count + 1 for count in before]


def test_kernels_are_compiled_while_a_model_is_made() -> None:
    """PyTorch's default type is the model's then."""
    size, dtype = 20, torch.bfloat16
    torch.set_default_dtype(dtype)
    try:
        few_tokens_cpu.compile_windows(1, 1, size, dtype)
        kv_cache_cpu.compile_store(size, dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    num_compiled = len(few_tokens_cpu._attend_windows.signatures)
    first, table = np.zeros(1, np.int64), torch.zeros(1, 1, dtype=torch.int32)
    query, cache = torch.zeros(1, 1, size, dtype=dtype), torch.zeros(1, 1, 8, 2 * size, dtype=dtype)
    attend_windows(query, cache, table, first, first, first, 1, 1.0, torch.empty_like(query), torch.empty(1, 1))
    assert len(few_tokens_cpu._attend_windows.signatures) == num_compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [10, 64])
def test_store(size: int, dtype: torch.dtype) -> None:
    """Parts of larger rows, more tokens than slots, and one slot that is none."""
    slots = torch.tensor([5, -1, 0, 11])
    rows = torch.randn(6, 2, 3 * size).to(dtype)
    key, value = rows[..., :size], rows[..., size : 2 * size]
    cache = torch.full((3, 2, 4, 2 * size), 7.0, dtype=dtype)
    kv_cache_cpu.store(key, value, cache, slots)
    wanted = torch.full_like(cache, 7.0)
    for token in (0, 2, 3):
        wanted[slots[token] // 4, :, slots[token] % 4] = rows[token, :, : 2 * size]
    assert torch.equal(cache, wanted)


def test_without_a_folder_for_its_cache_a_kernel_works_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    made: dict[str, Any] = {}
    exec("def double(x): return 2 * x", made)  # A function of no file: Numba finds nowhere to cache it.
    assert njit()(made["double"])(21) == 42
    assert "double is compiled at every start" in caplog.text


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(ValueError, match="even number of elements"):
        few_tokens_cpu.compile_windows(1, 1, 7, torch.float32)


def test_what_suits() -> None:
    assert suits(MAX_TOKENS, torch.float32)
    assert not suits(MAX_TOKENS + 1, torch.float32)
    assert not suits(1, torch.float16)


BOUND = """
import os, torch
torch.set_num_threads(2)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
"""
IMPORTED_BEFORE = """
import numba, torch
torch.set_num_threads(1)
"""
ATTEND = """
import numpy as np
from memlong_vllm.kernels.few_tokens_cpu import compile_windows
compile_windows(1, 1, 8, torch.float32)
import numba
print(torch.get_num_threads(), numba.get_num_threads(), numba.threading_layer())
"""


def attend_after(begin: str, cache: Path) -> list[str]:
    """PyTorch's threads, Numba's and its threading layer, in a process that begins so and compiles."""
    environ = {name: value for name, value in os.environ.items() if name != "NUMBA_NUM_THREADS"}
    environ |= {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", begin + ATTEND]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_a_bound_thread_keeps_its_openmp_threads(tmp_path: Path) -> None:
    assert attend_after(BOUND, tmp_path) == ["2", "2", "omp"]


def test_numba_may_be_imported_before(tmp_path: Path) -> None:
    assert attend_after(IMPORTED_BEFORE, tmp_path) == ["1", "1", "omp"]
