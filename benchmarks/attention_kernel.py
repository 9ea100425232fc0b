"""Retrieval attention on a GPU: is the Triton kernel right, how fast is it, and does copying overlap?

    python benchmarks/attention_kernel.py --output benchmarks/results/attention_kernel_GPU.json

Needs CUDA and ends with an error where there is none. Shapes are those of OpenLLaMA-3B (32 heads of
100, each with its own keys) and Llama-3-8B (32 heads of 128, 8 with keys); sets are 8 chunks of 128.

``decode``: sequences of one token, whose sets lie in the working set. ``prefill``: spans of 128
tokens, whose sets lie in slots of the bank. Each row has the median time of a call within a CUDA
graph that cycles through more sets than the L2 cache holds, and of a call from Python; the floor,
which is the bytes a call must move over the bandwidth of a large copy measured in the same run; and
PyTorch's scaled dot product attention, which gets its keys and values gathered already and neither
rotates nor merges anything. With ``gated`` fusion, and ``joint``, which merges by log-sum-exps.
``difference`` is the largest to the same computed in float32, relative
to the largest value. ``copy_ahead``: sets copied from a bank in pinned host memory to the working
set on a stream of its own, beside matrix products as large as a decoding step's lower layers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from result_file import save_result, write_result

from memlong_vllm.config import MemoryConfig
from memlong_vllm.memory_attention import attend, attend_with_lse, merge
from memlong_vllm.plan import ReadSpan
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.host_memory import allocate_host
from memlong_vllm.worker.step_buffers import Spans, Stored
from memlong_vllm.worker.working_set import DecodeRead, WorkingSet

CHUNK, TOP_K = 128, 8
MEMORY = CHUNK * TOP_K
SPAN = 128
LEAST_CALLS = 16  # In a graph.
MAX_POSITION = 4096
GATE = 0.5
AHEAD_CYCLES = 30_000_000
FUSIONS = ("gated", "joint")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Model:
    """A backbone's heads, and the layers below the first retrieval layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    padded_dim: int
    hidden: int
    intermediate: int
    lower_layers: int

    @property
    def set_size(self) -> int:
        """Numbers in a set: keys and values of all its tokens."""
        return 2 * self.num_kv_heads * MEMORY * self.head_dim


MODELS = {
    "openllama-3b": Model(32, 32, 100, 104, 3200, 8640, 13),
    "llama-3-8b": Model(32, 8, 128, 128, 4096, 14336, 16),
}


def memory_config(fusion: str) -> MemoryConfig:
    block = {"memory_layer": 0, "retrieval_layers": [0], "chunk_size": CHUNK, "top_k": TOP_K, "fusion": fusion}
    return MemoryConfig.from_dict(block, 1)


class Cell:
    """One model, type and number of spans: tensors, and calls over them, each with sets of its own.

    Args:
        span_len: 1 for decoding, with sets in rows; else with sets in slots.
        device: the CPU's for tests, under Triton's interpreter.
    """

    def __init__(
        self, model: Model, dtype: torch.dtype, fusion: str, num_spans: int, span_len: int, device: str = "cuda"
    ) -> None:
        from memlong_vllm.kernels.head_shape import HeadShape
        from memlong_vllm.kernels.launcher import RetrievalKernel

        self.model, self.num_spans, self.span_len, self._device = model, num_spans, span_len, torch.device(device)
        heads = HeadShape(model.num_heads, model.num_kv_heads, model.head_dim, model.padded_dim, model.head_dim)
        self.kernel = RetrievalKernel(heads, memory_config(fusion), TOP_K, dtype, self._device)
        self.copies = self._num_copies(num_spans * model.set_size * dtype.itemsize)
        device = self._device
        draw = partial(torch.randn, device=device, dtype=dtype)
        rows = self.copies * num_spans
        if span_len == 1:
            shape: tuple[int, ...] = (rows, model.num_kv_heads, MEMORY, model.head_dim)
        else:
            shape = (model.num_kv_heads, rows * TOP_K, CHUNK, model.head_dim)
        self.slots = None if span_len == 1 else torch.randperm(rows * TOP_K, device=device)
        self.stored = Stored(draw(shape), draw(shape), self.slots)
        num_tokens = num_spans * span_len
        self.query = draw(num_tokens, model.num_heads * model.padded_dim)
        self.output = draw(num_tokens, model.num_heads * model.padded_dim)
        self.gate = torch.full((model.num_heads,), GATE, device=device, dtype=dtype)
        self.lse = None
        if fusion == "joint":
            self.lse = torch.randn(num_tokens, model.num_heads, device=device, dtype=torch.float32)
        angles = torch.rand(MAX_POSITION, model.head_dim // 2, device=device) * 6
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(dtype)
        self.token_idx = torch.arange(num_tokens, device=device)
        self.positions = torch.randint(1, MAX_POSITION, (num_tokens,), device=device)
        self.tables = [self._table(copy) for copy in range(self.copies)]

    def _num_copies(self, set_bytes: int) -> int:
        """That are more than the L2 cache holds."""
        if self._device.type == "cpu":
            return 2
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        return min(64, -(-4 * cache // set_bytes) + 1)

    def _table(self, copy: int) -> torch.Tensor:
        rows = [
            (i * self.span_len, self.span_len, TOP_K, (copy * self.num_spans + i) * TOP_K, copy * self.num_spans + i)
            for i in range(self.num_spans)
        ]
        return torch.tensor(rows, dtype=torch.int32, device=self._device)

    @property
    def num_bytes(self) -> int:
        """That a call must move: sets, queries, and outputs twice."""
        return self.num_spans * self.model.set_size * self.gate.itemsize + self.query.nbytes + 2 * self.output.nbytes

    @property
    def flops(self) -> int:
        return 4 * self.num_spans * self.span_len * self.model.num_heads * MEMORY * self.model.head_dim

    def calls(self) -> Iterator[Callable[[], None]]:
        for table in cycle(self.tables):
            spans = Spans(table, self.token_idx, self.positions, self.span_len)
            tensors = self.query, self.output, spans, self.stored, self.cos_sin, self.gate
            yield partial(self.kernel.attend, *tensors, local_lse=self.lse)

    def sdpa_calls(self) -> Iterator[Callable[[], Any]]:
        """Nothing is causal, so heads that share keys are rows beside each other: keys are read once for them."""
        grouped = self._spans_of(self.query).unflatten(2, (self.model.num_kv_heads, -1))
        query = grouped.permute(0, 2, 1, 3, 4).flatten(2, 3).contiguous()
        gathered = [self.gathered(copy) for copy in range(self.copies)]
        for keys, values in cycle(gathered):
            yield partial(F.scaled_dot_product_attention, query, keys, values)

    def gathered(self, copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_spans, num_kv_heads, MEMORY, head_dim] of one copy."""
        kept = self.stored.keys, self.stored.values
        first = copy * self.num_spans
        if self.slots is None:
            keys, values = (t[first : first + self.num_spans] for t in kept)
            return keys, values
        slots = self.slots[first * TOP_K : (first + self.num_spans) * TOP_K]
        keys, values = (t[:, slots].unflatten(1, (-1, TOP_K)).flatten(2, 3).transpose(0, 1).contiguous() for t in kept)
        return keys, values

    def _spans_of(self, rows: torch.Tensor) -> torch.Tensor:
        """[num_spans, span_len, num_heads, head_dim]."""
        shape = self.num_spans, self.span_len, self.model.num_heads, self.model.padded_dim
        return rows.view(shape)[..., : self.model.head_dim]

    def difference(self) -> float:
        """Largest difference to float32, relative to the largest value there."""
        local = self.output.clone()
        half = self.model.head_dim // 2
        cos, sin = self.cos_sin[self.positions].float().view(self.num_spans, self.span_len, 1, -1).chunk(2, dim=-1)
        left, right = self._spans_of(self.query).float().split(half, dim=-1)
        query = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        keys, values = (t.float() for t in self.gathered(0))
        expected = self._fused(self._spans_of(local).float(), query, keys, values)
        next(self.calls())()
        found = (self._spans_of(self.output).float() - expected).abs().max() / expected.abs().max()
        self.output.copy_(local)
        return float(found)

    def _fused(
        self, local: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Plain arithmetic, [num_spans, span_len, num_heads, head_dim]."""
        scale = self.model.head_dim**-0.5
        if self.lse is None:
            return local + torch.tanh(torch.tensor(GATE)).item() * attend(query, keys, values, scale)
        scales = torch.full((self.model.num_heads,), scale, device=query.device)
        memory, memory_lse = attend_with_lse(query, keys, values, scales, torch.zeros_like(scales))
        fused = merge(local.flatten(0, 1), self.lse, memory.flatten(0, 1), memory_lse.flatten(0, 1))
        return fused.view_as(local)


def time_us(run: Callable[[], Any], repetitions: int, calls: int = 1, ahead: bool = False) -> float:
    """Median time of a call, ``calls`` of which are in a run. ``ahead``: the run is enqueued while the
    GPU is kept busy, so that what Python takes is not part of it."""
    times = []
    for _ in range(repetitions):
        if ahead:
            torch.cuda._sleep(AHEAD_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def graph_time_us(calls: Iterator[Callable[[], Any]], copies: int, repetitions: int) -> float:
    """Of a call in a CUDA graph of many, that read every copy."""
    number = max(LEAST_CALLS, copies)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            next(calls)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(number):
            next(calls)()
    graph.replay()
    return time_us(graph.replay, repetitions, number)


def copy_bandwidth(repetitions: int) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / time_us(lambda: target.copy_(source), repetitions) * 1e6


def peak_bandwidth(properties: Any) -> float:
    """Bytes a second that the memory's clock and width allow, which no copy reaches: two transfers a cycle."""
    return 2 * 1000.0 * properties.memory_clock_rate * properties.memory_bus_width / 8


def measure(
    name: str, dtype: str, fusion: str, num_spans: int, span_len: int, bandwidth: float, repetitions: int
) -> dict[str, Any]:
    cell = Cell(MODELS[name], DTYPES[dtype], fusion, num_spans, span_len)
    difference = cell.difference()
    calls = cell.calls()
    in_graph = graph_time_us(calls, cell.copies, repetitions)
    floor = cell.num_bytes / bandwidth * 1e6
    row = {
        "kind": "decode" if span_len == 1 else "prefill",
        "model": name,
        "dtype": dtype,
        "fusion": fusion,
        "spans": num_spans,
        "difference": difference,
        "kernel_us": in_graph,
        "kernel_from_python_us": time_us(lambda: next(calls)(), repetitions),
        "floor_us": floor,
        "floor_over_kernel": floor / in_graph,
        "gib_per_s": cell.num_bytes / in_graph * 1e6 / 2**30,
        "tflop_per_s": cell.flops / in_graph / 1e6,
        "sdpa_us": graph_time_us(cell.sdpa_calls(), cell.copies, repetitions),
        "splits": cell.kernel.num_splits(num_spans) if span_len == 1 else 1,
    }
    return row | {"kernel_over_sdpa": row["kernel_us"] / row["sdpa_us"]}


def copy_ahead(name: str, batch: int, repetitions: int) -> dict[str, Any]:
    """Filling the rows of a batch from the host, alone, beside the lower layers, and these alone."""
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    model, dtype, device = MODELS[name], torch.bfloat16, torch.device("cuda")
    allocate = partial(allocate_host, view=get_accelerator_view_from_cpu_tensor)
    bank = MemoryBank(batch * TOP_K, CHUNK, model.num_kv_heads, model.head_dim, dtype, device, allocate)
    rows = WorkingSet(bank, batch, TOP_K)
    hidden = torch.randn(batch, model.hidden, device=device, dtype=dtype)
    up = torch.randn(model.hidden, 3 * model.intermediate + 4 * model.hidden, device=device, dtype=dtype)
    retrieval_ids = iter(range(1 << 30))

    def fill() -> None:
        slots = [tuple(range(i * TOP_K, (i + 1) * TOP_K)) for i in range(batch)]
        rows.prepare_rows([DecodeRead(str(i), ReadSpan(0, 1, slots[i], 0, next(retrieval_ids))) for i in range(batch)])

    def compute() -> None:
        for _ in range(model.lower_layers):
            hidden @ up

    def both() -> None:
        fill()
        compute()
        rows.wait()

    def fill_and_wait() -> None:
        fill()
        rows.wait()

    for run in (fill_and_wait, compute, both):
        run()
    times = {run.__name__: time_us(run, repetitions, ahead=True) for run in (fill_and_wait, compute, both)}
    hidden_us = times["fill_and_wait"] + times["compute"] - times["both"]
    overlap = hidden_us / min(times["fill_and_wait"], times["compute"])
    num_bytes = batch * model.set_size * dtype.itemsize
    return {"kind": "copy_ahead", "model": name, "batch": batch, "bytes": num_bytes, "overlap": overlap} | {
        f"{run}_us": time for run, time in times.items()
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    decode = [row for row in rows if row["kind"] == "decode" and row["dtype"] == "bfloat16"]
    return {
        "decode, floor over kernel": {
            f"{row['model']} {row['fusion']} x {row['spans']}": row["floor_over_kernel"] for row in decode
        },
        "decode, cells at 0.8 of the floor or more": sum(row["floor_over_kernel"] >= 0.8 for row in decode),
        "decode, cells": len(decode),
        "largest difference": {
            dtype: max(row["difference"] for row in rows if row.get("dtype") == dtype)
            for dtype in dict.fromkeys(row["dtype"] for row in rows if "dtype" in row)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prefill-spans", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("attention_kernel.py measures a GPU kernel: it needs CUDA, which PyTorch does not find here")
    bandwidth = copy_bandwidth(arguments.repetitions)
    properties = torch.cuda.get_device_properties(0)
    settings = {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "copy_gib_per_s": bandwidth / 2**30,
        "peak_gib_per_s": peak_bandwidth(properties) / 2**30,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
    }
    rows: list[dict[str, Any]] = []
    for run in runs_of(arguments, bandwidth):
        rows.append(run())
        print(rows[-1], flush=True)
        # A failure leaves what was measured before.
        save_result(arguments.output, settings, rows, summarise(rows))
    write_result(arguments.output, settings, rows, summarise(rows))


def runs_of(arguments: argparse.Namespace, bandwidth: float) -> Iterator[Callable[[], dict[str, Any]]]:
    """One a row: all kernels first."""
    spans = [(number, 1) for number in arguments.batches] + [(number, SPAN) for number in arguments.prefill_spans]
    for model, dtype, fusion, span in product(MODELS, arguments.dtypes, FUSIONS, spans):
        yield partial(measure, model, dtype, fusion, *span, bandwidth, arguments.repetitions)
    for model, batch in product(MODELS, arguments.batches):
        yield partial(copy_ahead, model, batch, arguments.repetitions)


if __name__ == "__main__":
    main()
