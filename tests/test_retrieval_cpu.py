"""The CPU's kernels of a retrieval layer, against the same in plain PyTorch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from memlong_vllm.config import MemoryConfig
from memlong_vllm.kernels import memory_rows_cpu, memory_spans_cpu
from memlong_vllm.kernels.head_shape import FUSIONS, HeadShape
from memlong_vllm.kernels.query_tiles_cpu import TILE_TOKENS
from memlong_vllm.kernels.retrieval_cpu import CPURetrievalKernel
from memlong_vllm.memory_attention import attend, attend_with_lse, merge
from memlong_vllm.worker.step_buffers import Spans, Stored

TOP_K, NUM_SLOTS, NUM_ROWS, POSITIONS = 9, 30, 4, 400
MEMORY = MemoryConfig(
    memory_layer=0, retrieval_layers=(1,), chunk_size=16, top_k=TOP_K, memory_size=4096, local_window=64,
    retrieval_stride=16, memory_bias=True,
)  # fmt: skip
SHAPES = {
    "group3": HeadShape(9, 3, 64, 64, 64),
    "padded": HeadShape(4, 4, 100, 104, 100),
    "partly_rotated": HeadShape(4, 2, 48, 48, 16),
    "head128_group4": HeadShape(8, 2, 128, 128, 128),
    "head256": HeadShape(2, 1, 256, 256, 256),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="without AVX-512 spans are PyTorch's"
)


@dataclass(frozen=True)
class Read:
    """Of some adjacent tokens of the batch; the first is at local position ``position``."""

    token: int
    num_tokens: int
    position: int
    num_chunks: int
    row: int


ROWS = [Read(4, 1, 49, TOP_K, 2), Read(0, 1, 3, 1, 0), Read(1, 1, 17, 5, 3)]
SPANS = [Read(3, 7, 20, 3, 1), Read(30, TILE_TOKENS + 20, 5, TOP_K, 0), Read(12, 1, 90, 1, 2)]


class Case:
    """A batch of which some tokens read memory, in rows, or in slots of a bank."""

    def __init__(
        self, heads: HeadShape, dtype: torch.dtype, reads: list[Read], chunk_size: int, in_slots: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.heads, self.reads, self.chunk_size = heads, reads, chunk_size
        size, num_tokens = heads.num_heads * heads.padded_dim, 200
        # The query is a part of a larger tensor's rows.
        self.query, self.output = draw(num_tokens, 2 * size)[:, :size], draw(num_tokens, size)
        shape = (NUM_ROWS, heads.num_kv_heads, TOP_K * chunk_size, heads.head_dim)
        if in_slots:
            shape = (heads.num_kv_heads, NUM_SLOTS, chunk_size, heads.head_dim)
        self.keys, self.values = draw(2, *shape)
        self.gate, self.bias = draw(2, heads.num_heads)
        self.lse = torch.randn(num_tokens, heads.num_heads, generator=generator) + 3
        angles = 6 * torch.rand(POSITIONS, heads.rotary_dim // 2, generator=generator)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
        self.slots = [torch.randperm(NUM_SLOTS, generator=generator)[: read.num_chunks] for read in reads]
        # Entries and slots that are others' come first; a span without tokens is no span.
        tokens = [np.arange(read.token, read.token + read.num_tokens) for read in reads]
        self.token_idx = torch.from_numpy(np.concatenate([[199], *tokens]))
        local = [np.arange(read.position, read.position + read.num_tokens) for read in reads]
        self.positions = torch.from_numpy(np.concatenate([[9], *local]))
        entries = np.cumsum([1, *(read.num_tokens for read in reads)])
        first_slots = np.cumsum([2, *(read.num_chunks for read in reads)])
        rows = [
            [entries[i], read.num_tokens, read.num_chunks, first_slots[i], read.row] for i, read in enumerate(reads)
        ]
        self.table = torch.tensor([*rows, [entries[-1], 0, 0, 0, 0]], dtype=torch.int32)
        step_slots = torch.cat([torch.zeros(2, dtype=torch.int64), *self.slots]) if in_slots else None
        self.stored = Stored(self.keys, self.values, step_slots)
        self._spoil_what_nobody_reads()

    def _spoil_what_nobody_reads(self) -> None:
        for stored in (self.keys, self.values):
            if self.stored.slots is not None:
                unread = sorted(set(range(NUM_SLOTS)) - set(torch.cat(self.slots).tolist()))
                stored[:, unread] = float("nan")
                continue
            for row in range(NUM_ROWS):
                read = max([read.num_chunks for read in self.reads if read.row == row], default=0)
                stored[row, :, read * self.chunk_size :] = float("nan")

    def run(self, kernel: CPURetrievalKernel, *, has_bias: bool, has_lse: bool) -> torch.Tensor:
        output = self.output.clone()
        longest = max(read.num_tokens for read in self.reads)
        spans = Spans(self.table, self.token_idx, self.positions, longest)
        bias, lse = self.bias if has_bias else None, self.lse if has_lse else None
        kernel.attend(self.query, output, spans, self.stored, self.cos_sin, self.gate, bias, lse)
        return output

    def wanted(self, fusion: str, *, has_bias: bool) -> torch.Tensor:
        heads, output = self.heads, self.output.float()
        bias = self.bias.float() if has_bias else torch.zeros(heads.num_heads)
        for i, read in enumerate(self.reads):
            tokens = slice(read.token, read.token + read.num_tokens)
            shape = (read.num_tokens, heads.num_heads, heads.padded_dim)
            query = self._rotated(self.query[tokens].float().reshape(shape)[..., : heads.head_dim], read.position)[None]
            keys, values = (stored[None] for stored in self._stored(i))
            scale = torch.full((heads.num_heads,), heads.head_dim**-0.5)
            local = output[tokens].view(shape)[..., : heads.head_dim]
            if fusion == "gated":
                memory = attend(query, keys, values, heads.head_dim**-0.5)[0]
                local += self.gate.float().tanh()[:, None] * memory
                continue
            weight = self.gate.float().sigmoid() if fusion == "scaled_logits" else torch.ones_like(scale)
            memory, lse = attend_with_lse(query, keys, values, scale * weight, bias * weight)
            local.copy_(merge(local, self.lse[tokens], memory[0], lse[0]))
        return output

    def _stored(self, number: int) -> list[torch.Tensor]:
        """Keys and values that a read reads, [R, M, d]."""
        read = self.reads[number]
        if self.stored.slots is not None:
            return [t[:, self.slots[number]].flatten(1, 2).float() for t in (self.keys, self.values)]
        return [t[read.row, :, : read.num_chunks * self.chunk_size].float() for t in (self.keys, self.values)]

    def _rotated(self, query: torch.Tensor, position: int) -> torch.Tensor:
        """Args: query: [n, H, d]."""
        half = self.heads.rotary_dim // 2
        cos, sin = self.cos_sin[position : position + len(query), None].float().split(half, dim=-1)
        low, high, rest = query[..., :half], query[..., half : 2 * half], query[..., 2 * half :]
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def check(case: Case, fusion: str, dtype: torch.dtype) -> None:
    """With a bias and without: tokens without memory and the padding of heads stay as they are."""
    size = case.chunk_size
    sizes = {"memory_size": 32 * size, "local_window": 4 * size, "retrieval_stride": size, "query_tokens": size}
    kernel = CPURetrievalKernel(case.heads, replace(MEMORY, fusion=fusion, chunk_size=size, **sizes), dtype)
    for has_bias in (True, False) if fusion != "gated" else (False,):
        output = case.run(kernel, has_bias=has_bias, has_lse=fusion != "gated")
        wanted = case.wanted(fusion, has_bias=has_bias)
        torch.testing.assert_close(output.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        untouched = torch.ones(len(output), dtype=torch.bool)
        for read in case.reads:
            untouched[read.token : read.token + read.num_tokens] = False
        assert torch.equal(output[untouched], case.output[untouched])
        assert not (output[~untouched] == case.output[~untouched]).all(dim=-1).any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_that_read_rows(shape: str, fusion: str, dtype: torch.dtype) -> None:
    check(Case(SHAPES[shape], dtype, ROWS, 16, in_slots=False), fusion, dtype)


@needs_avx512
@pytest.mark.parametrize("in_slots", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_spans(shape: str, fusion: str, dtype: torch.dtype, in_slots: bool) -> None:
    check(Case(SHAPES[shape], dtype, SPANS, 16, in_slots=in_slots), fusion, dtype)


@needs_avx512
@pytest.mark.parametrize("chunk_size", [8, 100, 128, 200, 256])
@pytest.mark.parametrize("in_slots", [True, False])
def test_chunks_of_any_size(chunk_size: int, in_slots: bool) -> None:
    check(Case(SHAPES["group3"], torch.float32, SPANS, chunk_size, in_slots=in_slots), "joint", torch.float32)


@pytest.mark.parametrize("kind", ["rows", pytest.param("spans", marks=needs_avx512)])
def test_gates_of_zero_leave_the_local_output_as_it_is(kind: str) -> None:
    reads = ROWS if kind == "rows" else SPANS
    case = Case(SHAPES["group3"], torch.float32, reads, 16, in_slots=kind == "spans")
    case.gate.zero_()
    kernel = CPURetrievalKernel(case.heads, replace(MEMORY, fusion="gated", chunk_size=16), torch.float32)
    assert torch.equal(case.run(kernel, has_bias=False, has_lse=False), case.output)


NO_LSE = """
import torch
from memlong_vllm.kernels.retrieval_cpu import CPURetrievalKernel
from memlong_vllm.worker.step_buffers import Spans, Stored
from tests.test_retrieval_cpu import MEMORY, SHAPES

heads = SHAPES["group3"]
kernel = CPURetrievalKernel(heads, MEMORY, torch.float32)
rows = torch.zeros(heads.num_heads * heads.padded_dim).as_strided((10**9, heads.num_heads * heads.padded_dim), (0, 1))
stored = torch.zeros(1, heads.num_kv_heads, 16, heads.head_dim)
table, position = torch.tensor([[0, 1, 1, 0, 0]], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
for max_tokens in (1, 2) if kernel.reads_all else (1,):
    spans = Spans(table, torch.tensor([10**9 - 1]), position, max_tokens)
    kernel.attend(rows, rows, spans, Stored(stored, stored, None), torch.zeros(1, 64), torch.zeros(heads.num_heads))
print("done")
"""


def test_gated_reads_no_local_lse() -> None:
    """Of a token so far behind the others that the process would end."""
    assert MEMORY.fusion == "gated"
    result = subprocess.run([sys.executable, "-c", NO_LSE], capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout.strip() == "done", result.stderr


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["rows", pytest.param("spans", marks=needs_avx512)])
def test_what_is_no_number_stays_visible(kind: str, dtype: torch.dtype) -> None:
    """Of broken weights a user should see that they are; other tokens are as they were."""
    heads, reads = SHAPES["group3"], ROWS if kind == "rows" else SPANS
    case, whole = (Case(heads, dtype, reads, 16, in_slots=kind == "spans") for _ in range(2))
    case.query[reads[0].token] = float("nan")
    kernel = CPURetrievalKernel(heads, replace(MEMORY, fusion="joint"), dtype)
    output, wanted = (each.run(kernel, has_bias=False, has_lse=True) for each in (case, whole))
    assert output[reads[0].token].isnan().all()
    others = torch.arange(len(output)) != reads[0].token
    assert torch.equal(output[others], wanted[others])


def test_what_suits() -> None:
    assert CPURetrievalKernel.suits(MEMORY, torch.bfloat16)
    assert not CPURetrievalKernel.suits(MEMORY, torch.float16)
    assert not CPURetrievalKernel.suits(replace(MEMORY, fusion="gated", memory_softmax="chunk"), torch.float32)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_nothing_is_compiled_after_the_start(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the default type is the model's, as it is while models are made."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    size, reads_all = (40, False) if capability == "AVX2" else (44, True)
    heads = HeadShape(2, 1, size, size, size)
    kernels = memory_rows_cpu.attend_rows, memory_spans_cpu.attend_spans
    before = [len(kernel.signatures) for kernel in kernels]
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernel = CPURetrievalKernel(heads, replace(MEMORY, fusion="joint"), torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    compiled = [before[0] + 1, before[1] + reads_all]
    assert kernel.reads_all == reads_all
    assert [len(kernel.signatures) for kernel in kernels] == compiled
    cases = [Case(heads, torch.bfloat16, ROWS, 16, in_slots=False)]
    if reads_all:
        cases += [Case(heads, torch.bfloat16, SPANS, 16, in_slots=in_slots) for in_slots in (True, False)]
    for case in cases:
        case.run(kernel, has_bias=True, has_lse=True)
        case.query = case.query.contiguous()
        case.run(kernel, has_bias=False, has_lse=True)
    assert [len(kernel.signatures) for kernel in kernels] == compiled
