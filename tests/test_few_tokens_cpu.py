"""The CPU's kernels for a few query tokens, against plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memlong_vllm.kernels.few_tokens_cpu import MAX_TOKENS, attend_rows, attend_windows, suits
from memlong_vllm.memory_attention import attend_with_lse

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 100), (8, 2, 48), (4, 1, 128)])
@pytest.mark.parametrize(("spans", "tokens", "length"), [(1, 1, 16), (5, 1, 1000), (2, 3, 128)])
def test_rows(spans: int, tokens: int, length: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(spans, tokens, heads, size, generator=generator).to(dtype)
    # Rows of the working set are views into a larger tensor.
    shape = (2, spans + 1, kv_heads, length + 7, size)
    keys, values = torch.randn(shape, generator=generator).to(dtype)[:, 1:, :, :length]
    scale, bias = torch.rand(2, heads, generator=generator)
    output, lse = attend_rows(query, keys, values, scale, bias)
    wanted, wanted_lse = attend_with_lse(query.float(), keys.float(), values.float(), scale, bias)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), wanted, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [0, 1, 50, 1000])
def test_windows(window: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, size, block_size, positions = 6, 2, 40, 16, np.array([0, 15, 16, 17, 100, 127])
    cache = torch.randn(20, kv_heads, block_size, 2 * size, generator=generator).to(dtype)
    table = torch.stack([torch.randperm(20, generator=generator)[:8] for _ in range(3)]).int()
    sequence_of = np.array([0, 1, 2, 0, 1, 2])
    query = torch.randn(len(positions), heads, size, generator=generator).to(dtype)
    output, lse = attend_windows(query, cache, table, sequence_of, positions, window, 0.3)
    for row, position in enumerate(positions):
        tokens = cache[table[sequence_of[row]].long()].transpose(0, 1).flatten(1, 2)[:, : position + 1].float()
        keys, values = (tokens[:, -window:] if window else tokens)[None].split(size, dim=-1)
        scale = torch.full((heads,), 0.3)
        wanted, wanted_lse = attend_with_lse(query[None, row : row + 1].float(), keys, values, scale, 0 * scale)
        torch.testing.assert_close(output[row], wanted[0, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(lse[row], wanted_lse[0, 0], atol=1e-5, rtol=1e-6)


def test_what_suits() -> None:
    assert suits(MAX_TOKENS, torch.zeros(1))
    assert not suits(MAX_TOKENS + 1, torch.zeros(1))
    assert not suits(1, torch.zeros(1, dtype=torch.float16))


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
from memlong_vllm.kernels.few_tokens_cpu import attend_rows
rows = torch.ones(2, 1, 2, 8)
attend_rows(rows, rows, rows, torch.ones(2), torch.zeros(2))
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
