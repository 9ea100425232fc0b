"""The CPU's kernel for many query tokens, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from memlong_vllm.kernels.flash_cpu import attend, attend_scaled
from memlong_vllm.memory_attention import attend_with_lse

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 100), (8, 2, 48), (4, 1, 128)])
@pytest.mark.parametrize("same_scale", [True, False])
def test_memory(heads: int, kv_heads: int, size: int, same_scale: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spans, tokens, length = 3, 40, 600
    query = torch.randn(spans, tokens, heads, size, generator=generator).to(dtype)
    # Rows of the working set are views into a larger tensor.
    shape = (2, spans + 1, kv_heads, length + 7, size)
    keys, values = torch.randn(shape, generator=generator).to(dtype)[:, 1:, :, :length]
    scale, bias = torch.rand(2, heads, generator=generator)
    scale = size**-0.5 * (torch.ones_like(scale) if same_scale else scale)
    output, lse = attend_scaled(query, keys, values, scale, bias)
    wanted, wanted_lse = attend_with_lse(query.float(), keys.float(), values.float(), scale, bias)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), wanted, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse, wanted_lse, atol=TOLERANCE[dtype], rtol=1e-5)


@pytest.mark.parametrize("window", [1, 30, 700])
def test_a_mask_hides_tokens(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, heads, kv_heads, size, length = 256, 4, 2, 16, 255 + window
    query = torch.randn(1, tokens, heads, size, generator=generator)
    keys, values = torch.randn(2, 1, kv_heads, length, size, generator=generator)
    mask = torch.full((tokens, length), float("-inf"))
    for row in range(tokens):
        mask[row, row : row + window] = 0
    output, lse = attend(query, keys, values, 0.25, mask)
    for row in range(0, tokens, 51):
        seen = slice(row, row + window)
        arguments = query[:, row : row + 1], keys[:, :, seen], values[:, :, seen]
        wanted, wanted_lse = attend_with_lse(*arguments, torch.full((heads,), 0.25), torch.zeros(heads))
        torch.testing.assert_close(output[:, row : row + 1], wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(lse[:, row : row + 1], wanted_lse, atol=1e-5, rtol=1e-5)
