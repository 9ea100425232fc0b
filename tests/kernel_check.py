"""Run as a program: the Triton kernel of retrieval attention against the plain arithmetic in
float32, on a GPU or else under Triton's interpreter (TRITON_INTERPRET=1).

Prints a JSON object: for each case, the largest difference where the kernel writes, and whether
everything else is as it was. See test_attention_kernel.py."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from memlong_vllm.config import MemoryConfig
from memlong_vllm.kernels.head_shape import HeadShape
from memlong_vllm.kernels.launcher import RetrievalKernel
from memlong_vllm.memory_attention import attend, attend_chunks, attend_with_lse, merge
from memlong_vllm.plan import ReadSpan, SequencePlan, StepPlan
from memlong_vllm.worker.adaptation import Adaptation
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.step_memory import StepMemory
from memlong_vllm.worker.transfer import RankHeads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS, TOP_K, NUM_POSITIONS = 7, 3, 64
HEADS_48 = HeadShape(4, 2, 48, 64, 48)


@dataclass(frozen=True)
class Case:
    """One configuration and batch.

    Attributes:
        block: tokens of a chunk that a program attends to at once; None: the kernel's own choice.
        max_programs: for splits: programs there should be at most; None: the kernel's own choice.
        in_rows: whether decoding sequences have rows in the working set.
        only_decodes: one token of every sequence that reads, and one of them reads a slot that the step writes, so that
            it has no row.
        gate: of every head; None: a random one.
        num_adapted_chunks: kept as adapters made them.
    """

    heads: HeadShape = HEADS_48
    dtype: torch.dtype = torch.float32
    chunk_size: int = 4
    memory: dict[str, Any] = field(default_factory=dict)
    block: int | None = None
    max_programs: int | None = None
    in_rows: bool = True
    is_on_device: bool = True
    num_adapted_chunks: int = NUM_SLOTS
    only_decodes: bool = False
    gate: float | None = None


FUSIONS = {
    "gated": {},
    "gated_chunk": {"memory_softmax": "chunk"},
    "joint": {"fusion": "joint"},
    "joint_bias": {"fusion": "joint", "memory_bias": True},
    "scaled": {"fusion": "scaled_logits"},
    "scaled_bias": {"fusion": "scaled_logits", "memory_bias": True},
}
HEADS = {
    "head100": HeadShape(2, 2, 100, 112, 100),
    "head64_group3": HeadShape(3, 1, 64, 64, 64),
    "head128_group4": HeadShape(4, 1, 128, 128, 128),
    "partly_rotated": HeadShape(2, 1, 32, 32, 16),
}
CASES = {name: Case(memory=memory) for name, memory in FUSIONS.items()}
CASES |= {f"gated_{name}": Case(heads) for name, heads in HEADS.items()}
CASES |= {f"joint_{name}": Case(heads, memory=FUSIONS["joint_bias"]) for name, heads in HEADS.items()}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
for i, name in enumerate(FUSIONS):
    for j, half in enumerate(HALVES):
        shape = list(HEADS)[(i + j) % len(HEADS)]
        CASES[f"{name}_{half}"] = Case(HEADS[shape], HALVES[half], memory=FUSIONS[name])
for name in ("gated", "gated_chunk", "joint"):
    base = Case(HEADS["head100"], memory=FUSIONS[name])
    # Three blocks a chunk, the last of which is not full; at the first launch more splits than a short set has units.
    CASES[f"{name}_blocks"] = replace(base, dtype=torch.float32, chunk_size=40, block=16, max_programs=20)
    CASES[f"{name}_decode_slots"] = Case(memory=FUSIONS[name], only_decodes=True)
    split = replace(base, dtype=torch.float32, chunk_size=40, block=16, max_programs=40)
    CASES[f"{name}_decode_slots_split"] = replace(split, only_decodes=True)
    CASES[f"{name}_gathered"] = Case(memory=FUSIONS[name], in_rows=False)
    CASES[f"{name}_staged"] = Case(memory=FUSIONS[name], is_on_device=False)
    adapter = {"memory_adapter": "linear", "memory_adapter_width": 2 if name == "joint" else 1}
    CASES[f"{name}_adapted"] = Case(memory=FUSIONS[name] | adapter)
    CASES[f"{name}_adapted_gathered"] = Case(memory=FUSIONS[name] | adapter, in_rows=False)
CASES["gated_closed"] = Case(gate=0.0)
CASES["gated_closed_bfloat16"] = Case(HEADS["head100"], torch.bfloat16, gate=0.0)


@dataclass
class Adapters:
    memory_k_adapter: torch.Tensor
    memory_v_adapter: torch.Tensor


class Run:
    """A case's random tensors, in the case's type; the reference computes with them in float32."""

    def __init__(self, case: Case) -> None:
        self.case, heads = case, case.heads
        self.generator = torch.Generator().manual_seed(0)
        chunk_size = case.chunk_size
        block = {"memory_layer": 0, "retrieval_layers": [0, 1], "chunk_size": chunk_size, "top_k": TOP_K}
        block |= {"local_window": 4 * chunk_size, "retrieval_stride": chunk_size, "memory_size": 800 * chunk_size}
        self.config = MemoryConfig.from_dict(block | case.memory, 2)
        self.plan = StepPlan(tuple(self._sequences()))
        self.num_tokens = sum(sequence.end - sequence.start for sequence in self.plan.sequences)
        bank = MemoryBank(
            NUM_SLOTS,
            case.chunk_size,
            heads.num_kv_heads,
            heads.head_dim,
            case.dtype,
            DEVICE,
            None if case.is_on_device else lambda shape, dtype: torch.empty(shape, dtype=dtype, device=DEVICE),
        )
        bank.keys.copy_(self.draw(*bank.keys.shape))
        bank.values.copy_(self.draw(*bank.values.shape))
        size = heads.num_kv_heads * heads.head_dim
        shape = (size, self.config.memory_adapter_width * 2 * size)
        self.adapters = [Adapters(self.draw(*shape) / 8, self.draw(*shape) / 8) for _ in range(2)]
        staging, ranks = 2 * TOP_K * case.chunk_size, RankHeads(0, 1, 0)
        has_adapter = self.config.memory_adapter is not None
        adapters = Adaptation(self.adapters, ranks, staging, lambda mine: mine, chunk_size)
        adaptation = adapters if has_adapter else None
        self.memory = StepMemory(bank, 4, TOP_K, 64, staging, ranks, adaptation, case.num_adapted_chunks)
        self.query = self.draw(self.num_tokens, heads.num_heads * heads.padded_dim)
        self.output = self.draw(self.num_tokens, heads.num_heads * heads.padded_dim)
        # As FlashAttention has it: heads first.
        self.lse = self.draw(heads.num_heads, self.num_tokens, dtype=torch.float32).T
        self.gate, self.bias = self.draw(heads.num_heads), self.draw(heads.num_heads)
        if case.gate is not None:
            self.gate.fill_(case.gate)
        angles = 6 * self.draw(NUM_POSITIONS, heads.rotary_dim // 2, dtype=torch.float32)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(case.dtype)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, dtype or self.case.dtype)

    def _sequences(self) -> list[SequencePlan]:
        """Prefill with two spans of other lengths and sets, prefill and decoding without memory, and
        decoding with whole and smaller sets. The slot that is written is read by ``only_decodes`` alone."""

        def decoding(name: str, position: int, *slots: int) -> SequencePlan:
            reads = (ReadSpan(position, position + 1, slots, position - 9, len(name)),) if slots else ()
            slack = 0 if self.case.in_rows else 1  # Two tokens: no row.
            return SequencePlan(name, position - slack, position + 1, (6,) * 2, reads)

        prefill = (ReadSpan(2, 5, (4, 1), 1, 10), ReadSpan(5, 26, (0, 2, 3), -7, 11))
        local = SequencePlan("local", 3, 5, (6,) * 2, ())
        writing = (6,) * (30 // self.case.chunk_size + 1)
        whole, part = decoding("a", 31, 5, 0, 2), decoding("bb", 40, 3)
        if self.case.only_decodes:
            return [whole, local, decoding("dddd", 33, 6), decoding("ccc", 12), part, decoding("eeeee", 50, 4, 6, 1)]
        return [whole, local, SequencePlan("prefill", 0, 28, writing, prefill), decoding("ccc", 12), part]

    def begin_step(self) -> RetrievalKernel:
        """Have the plan's step staged; the kernel, as the case asks for it."""
        kernel = RetrievalKernel(self.case.heads, self.config, TOP_K, self.case.dtype, DEVICE)
        if self.case.block is not None:
            shapes = (replace(shape, block_memory=self.case.block) for shape in (kernel.decode, kernel.prefill))
            kernel.decode, kernel.prefill = shapes
        if self.case.max_programs is not None:
            kernel.limit_programs(self.case.max_programs, DEVICE)
        lengths = [sequence.end - sequence.start for sequence in self.plan.sequences]
        self.memory.stage(self.plan)
        self.memory.begin_step([sequence.request_id for sequence in self.plan.sequences], np.cumsum([0, *lengths]))
        return kernel

    def run(self) -> list[torch.Tensor]:
        """The output of each of two launches, for layer 1, with the kernel."""
        kernel, outputs = self.begin_step(), []
        bias = self.bias if self.config.memory_bias else None
        lse = None if self.config.fusion == "gated" else self.lse
        # A span without tokens, as behind those of a step, and one without chunks.
        empty = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.int32, device=DEVICE)
        for padding in (empty[:0], empty):  # The second launch finds the kernel's own buffers as the first left them.
            output = self.output.clone()
            for spans, stored in self.memory.stored(1):
                padded = replace(spans, table=torch.cat((spans.table, padding)))
                kernel.attend(self.query, output, padded, stored, self.cos_sin, self.gate, bias, lse)
            outputs.append(output)
        return outputs

    def expected(self) -> torch.Tensor:
        """The same span by span, in float32, from the plan."""
        heads, first = self.case.heads, 0
        output = self.output.float().view(self.num_tokens, heads.num_heads, heads.padded_dim).clone()
        for sequence in self.plan.sequences:
            for span in sequence.reads:
                rows = slice(first + span.start - sequence.start, first + span.end - sequence.start)
                positions = torch.arange(span.start, span.end, device=DEVICE) - span.origin
                output[rows, :, : heads.head_dim] = self._attended(rows, positions, span.slots)
            first += sequence.end - sequence.start
        return output.flatten(1)

    def _attended(self, rows: slice, positions: torch.Tensor, slots: tuple[int, ...]) -> torch.Tensor:
        heads, config = self.case.heads, self.config
        shape = (-1, heads.num_heads, heads.padded_dim)
        query = self.query[rows].float().view(shape)[..., : heads.head_dim]
        local = self.output[rows].float().view(shape)[..., : heads.head_dim]
        query = self._rotated(query, positions)[None]
        keys, values = self._stored(slots)
        scale, gate = heads.head_dim**-0.5, self.gate.float()
        if config.fusion == "gated":
            if config.memory_softmax == "chunk":
                memory = attend_chunks(query, keys, values, scale, config.chunk_size)
            else:
                memory = attend(query, keys, values, scale)
            return local + gate.tanh()[:, None] * memory[0]
        weight = gate.sigmoid() if config.fusion == "scaled_logits" else torch.ones_like(gate)
        bias = self.bias.float() if config.memory_bias else torch.zeros_like(gate)
        memory, memory_lse = attend_with_lse(query, keys, values, scale * weight, bias * weight)
        return merge(local, self.lse[rows], memory[0], memory_lse[0])

    def _rotated(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.case.heads.rotary_dim // 2
        cos, sin = self.cos_sin[positions].float()[:, None].chunk(2, dim=-1)
        left, right, rest = query[..., :half], query[..., half : 2 * half], query[..., 2 * half :]
        return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)

    def _stored(self, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, kv_heads, tokens, head_dim] as layer 1 wants them, in float32."""
        bank = self.memory.bank
        keys, values = (torch.cat([kept[:, s] for s in slots], dim=1).float() for kept in (bank.keys, bank.values))
        if self.config.memory_adapter is None:
            return keys[None], values[None]
        both = torch.cat((keys.transpose(0, 1).flatten(1), values.transpose(0, 1).flatten(1)), dim=1)
        if self.config.memory_adapter_width == 2:
            before = both.roll(1, dims=0)
            before[:: self.config.chunk_size] = 0
            both = torch.cat((both, before), dim=1)
        weights = self.adapters[1].memory_k_adapter.float(), self.adapters[1].memory_v_adapter.float()
        made = [(both @ w.T).unflatten(1, (keys.shape[0], -1)).transpose(0, 1)[None] for w in weights]
        return made[0], made[1]


def check(case: Case) -> dict[str, Any]:
    run = Run(case)
    outputs, expected = [output.float() for output in run.run()], run.expected()
    is_written = expected != run.output.float()
    assert is_written.any() == (case.gate != 0)
    return {
        "difference": max((output - expected).abs().max().item() for output in outputs),
        "changed": (expected - run.output.float()).abs().max().item(),
        "rest_is_untouched": all(torch.equal(output[~is_written], expected[~is_written]) for output in outputs),
    }


if __name__ == "__main__":
    names = sys.argv[1:] or list(CASES)
    print(json.dumps({name: check(CASES[name]) for name in names}))
