"""The CPU's kernel of a retrieval layer for decoding sequences, against the same in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memlong_vllm.config import MemoryConfig
from memlong_vllm.kernels import memory_rows_cpu
from memlong_vllm.kernels.head_shape import FUSIONS, HeadShape
from memlong_vllm.kernels.memory_rows_cpu import RowsKernel
from memlong_vllm.memory_attention import attend, attend_with_lse, merge
from memlong_vllm.worker.step_buffers import Spans, Stored

CHUNK, TOP_K, POSITIONS = 16, 20, 50
MEMORY = MemoryConfig(
    memory_layer=0, retrieval_layers=(1,), chunk_size=CHUNK, top_k=TOP_K, memory_size=4096, local_window=64,
    retrieval_stride=CHUNK, memory_bias=True,
)  # fmt: skip
SHAPES = {
    "group3": HeadShape(9, 3, 64, 64, 64),
    "padded": HeadShape(4, 4, 100, 104, 100),
    "partly_rotated": HeadShape(4, 2, 48, 48, 16),
    "head128_group4": HeadShape(8, 2, 128, 128, 128),
    "head256": HeadShape(2, 1, 256, 256, 256),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Case:
    """A batch of five tokens, of which three have memory, of 20, 1 and 9 chunks, in rows 2, 0 and 3."""

    def __init__(self, heads: HeadShape, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.heads = heads
        # The query is a part of a larger tensor's rows.
        self.query = draw(5, 2 * heads.num_heads * heads.padded_dim)[:, : heads.num_heads * heads.padded_dim]
        self.output = draw(5, heads.num_heads * heads.padded_dim)
        self.keys, self.values = draw(2, 4, heads.num_kv_heads, TOP_K * CHUNK, heads.head_dim)
        self.gate, self.bias = draw(2, heads.num_heads)
        self.lse = torch.randn(5, heads.num_heads, generator=generator) + 3
        angles = torch.rand(POSITIONS, heads.rotary_dim // 2, generator=generator)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
        self.reads = {4: (49, 20, 2), 0: (3, 1, 0), 1: (17, 9, 3)}
        # Entries of the step that are others' come first; a span without tokens is no span.
        self.token_idx = torch.tensor([3, *self.reads, 2])
        self.positions = torch.tensor([9, *(position for position, _, _ in self.reads.values()), 9])
        rows = [[1 + i, 1, chunks, 0, row] for i, (_, chunks, row) in enumerate(self.reads.values())]
        self.table = torch.tensor([*rows, [4, 0, 0, 0, 0]], dtype=torch.int32)

    def run(self, kernel: RowsKernel, *, has_bias: bool, has_lse: bool) -> torch.Tensor:
        output = self.output.clone()
        spans = Spans(self.table, self.token_idx, self.positions, 1)
        bias, lse = self.bias if has_bias else None, self.lse if has_lse else None
        kernel.attend(
            self.query, output, spans, Stored(self.keys, self.values, None), self.cos_sin, self.gate, bias, lse
        )
        return output

    def wanted(self, fusion: str, *, has_bias: bool) -> torch.Tensor:
        heads, output = self.heads, self.output.float()
        bias = self.bias.float() if has_bias else torch.zeros(heads.num_heads)
        for token, (position, chunks, row) in self.reads.items():
            query = self.query[token].float().view(heads.num_heads, heads.padded_dim)[:, : heads.head_dim]
            query = self._rotated(query, position)[None, None]
            keys, values = (t[row, :, : chunks * CHUNK].float()[None] for t in (self.keys, self.values))
            scale = torch.full((heads.num_heads,), heads.head_dim**-0.5)
            local = output[token].view(heads.num_heads, heads.padded_dim)[:, : heads.head_dim]
            if fusion == "gated":
                memory = attend(query, keys, values, heads.head_dim**-0.5)[0, 0]
                local += self.gate.float().tanh()[:, None] * memory
                continue
            weight = self.gate.float().sigmoid() if fusion == "scaled_logits" else torch.ones_like(scale)
            memory, lse = attend_with_lse(query, keys, values, scale * weight, bias * weight)
            local.copy_(merge(local, self.lse[token], memory[0, 0], lse[0, 0]))
        return output

    def _rotated(self, query: torch.Tensor, position: int) -> torch.Tensor:
        half = self.heads.rotary_dim // 2
        cos, sin = self.cos_sin[position].float().split(half)
        low, high, rest = query[:, :half], query[:, half : 2 * half], query[:, 2 * half :]
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_plain_pytorch(shape: str, fusion: str, dtype: torch.dtype) -> None:
    """Every fusion, with a bias and without: tokens without memory and the padding of heads stay as they are."""
    case = Case(SHAPES[shape], dtype)
    kernel = RowsKernel(case.heads, replace(MEMORY, fusion=fusion), dtype)
    for has_bias in (True, False) if fusion != "gated" else (False,):
        output = case.run(kernel, has_bias=has_bias, has_lse=fusion != "gated")
        wanted = case.wanted(fusion, has_bias=has_bias)
        torch.testing.assert_close(output.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert not torch.equal(output[4], case.output[4])
        assert torch.equal(output[2:4], case.output[2:4])


def test_what_suits() -> None:
    assert RowsKernel.suits(MEMORY, torch.bfloat16)
    assert not RowsKernel.suits(MEMORY, torch.float16)
    assert not RowsKernel.suits(replace(MEMORY, fusion="gated", memory_softmax="chunk"), torch.float32)


def test_nothing_is_compiled_after_the_start() -> None:
    """Also if the default type is the model's, as it is while models are made."""
    heads = HeadShape(2, 1, 40, 40, 40)
    before = len(memory_rows_cpu._attend.signatures)
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernel = RowsKernel(heads, replace(MEMORY, fusion="joint"), torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(memory_rows_cpu._attend.signatures) == before + 1
    case = Case(heads, torch.bfloat16)
    case.run(kernel, has_bias=True, has_lse=True)
    case.query = case.query.contiguous()
    case.run(kernel, has_bias=False, has_lse=True)
    assert len(memory_rows_cpu._attend.signatures) == before + 1
