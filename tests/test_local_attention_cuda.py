"""FlashAttention that keeps its log-sum-exp, against plain arithmetic. On a GPU only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("FlashAttention needs a GPU", allow_module_level=True)

from memlong_vllm.local_attention_cuda import FlashLseImpl

HEAD_DIM, BLOCK, DTYPE = 128, 16, torch.bfloat16
SCALE = HEAD_DIM**-0.5
# (tokens of the sequence, of which the last so many are computed): prompts, a part of one, and decoding.
SEQUENCES = ((40, 40), (200, 24), (130, 1))


def attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, H, d] and [tokens, H] float32, of the sequence's last tokens."""
    num_tokens, length = len(query), len(keys)
    keys, values = (t.float().repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (keys, values))
    scores = torch.einsum("nhd,mhd->nhm", query.float(), keys) * SCALE
    position = torch.arange(length - num_tokens, length, device=query.device)[:, None]
    other = torch.arange(length, device=query.device)[None]
    is_seen = (other <= position) & (other > position - window)
    scores = scores.masked_fill(~is_seen[:, None], float("-inf"))
    return torch.einsum("nhm,mhd->nhd", scores.softmax(dim=-1), values), scores.logsumexp(dim=-1)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("window", [64, 1024])
def test_output_and_log_sum_exp_are_those_of_the_window(num_heads: int, num_kv_heads: int, window: int) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    lengths, news = zip(*SEQUENCES, strict=True)
    blocks = [-(-length // BLOCK) for length in lengths]
    # As vLLM has it: keys and values of a head beside each other, its heads before a block's tokens.
    cache = torch.randn(sum(blocks), num_kv_heads, BLOCK, 2 * HEAD_DIM, dtype=DTYPE, device=device)
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=device)
    order = torch.randperm(sum(blocks)).split(blocks)
    for row, places in zip(table, order, strict=True):
        row[: len(places)] = places.to(row)
    query = torch.randn(sum(news), num_heads, HEAD_DIM, dtype=DTYPE, device=device)
    metadata = SimpleNamespace(
        num_actual_tokens=sum(news),
        query_start_loc=torch.tensor([0, *news], device=device).cumsum(0).int(),
        max_query_len=max(news),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        max_seq_len=max(lengths),
        block_table=table,
        scheduler_metadata=None,
        max_num_splits=0,
    )
    impl = FlashLseImpl(num_heads, HEAD_DIM, SCALE, num_kv_heads, None, window, "auto")
    output = impl.forward(torch.nn.Module(), query, query, query, cache, metadata, torch.empty_like(query))
    assert impl.lse.shape == (sum(news), num_heads)
    first = 0
    for length, new, places in zip(lengths, news, order, strict=True):
        stored = cache[places.to(device)].transpose(1, 2).flatten(0, 1)[:length]
        keys, values = stored.split(HEAD_DIM, dim=-1)
        wanted, lse = attended(query[first : first + new], keys, values, window)
        torch.testing.assert_close(output[first : first + new].float(), wanted, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(impl.lse[first : first + new], lse, atol=2e-3, rtol=2e-3)
        first += new
