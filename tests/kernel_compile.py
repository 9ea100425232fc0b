"""Run as a program, where Triton compiles: the kernel of retrieval attention as compiled for GPUs
that need not be there. Prints a JSON object of facts a launch. See test_attention_kernel.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memlong_vllm.config import MemoryConfig
from memlong_vllm.kernels import launcher
from memlong_vllm.kernels.attention import retrieval_attention
from memlong_vllm.kernels.head_shape import HeadShape
from memlong_vllm.kernels.launcher import RetrievalKernel
from memlong_vllm.worker.step_buffers import Spans, Stored

CPU = torch.device("cpu")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CHUNK, TOP_K = 128, 8
MODELS = {"openllama-3b": HeadShape(32, 32, 100, 104, 100), "llama-3-8b": HeadShape(32, 8, 128, 128, 128)}
MODELS |= {"demo": HeadShape(9, 3, 64, 64, 64), "wide": HeadShape(16, 8, 256, 256, 256)}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
SPECIALIZED = ("query_stride", "output_stride")
LAUNCHES = {
    # name: compute capability, model, type, fusion, softmax, tokens of a span, spans, where sets lie.
    "decode_3b": (90, "openllama-3b", torch.bfloat16, "gated", "all", 1, 4, "rows"),
    "decode_3b_slots": (80, "openllama-3b", torch.bfloat16, "gated", "all", 1, 4, "slots"),
    "decode_8b_joint": (80, "llama-3-8b", torch.float16, "joint", "all", 1, 4, "rows"),
    "decode_8b_slots": (80, "llama-3-8b", torch.bfloat16, "joint", "all", 1, 4, "slots"),
    "prefill_3b_chunk": (80, "openllama-3b", torch.bfloat16, "gated", "chunk", 128, 4, "slots"),
    "prefill_8b": (90, "llama-3-8b", torch.bfloat16, "scaled_logits", "all", 128, 4, "slots"),
    "prefill_8b_rows": (80, "llama-3-8b", torch.bfloat16, "joint", "all", 128, 4, "rows"),
    "prefill_8b_chunk": (80, "llama-3-8b", torch.float16, "gated", "chunk", 128, 4, "rows"),
    "prefill_demo_joint": (80, "demo", torch.bfloat16, "joint", "all", 128, 4, "slots"),
    "prefill_8b_float32": (80, "llama-3-8b", torch.float32, "joint", "all", 128, 4, "slots"),
    "prefill_wide_joint": (80, "wide", torch.bfloat16, "joint", "all", 128, 4, "slots"),
    "decode_wide_chunk": (80, "wide", torch.bfloat16, "gated", "chunk", 1, 4, "slots"),
    "decode_3b_float32": (80, "openllama-3b", torch.float32, "joint", "all", 1, 200, "rows"),
}


class Recorder:
    """In the kernel's place: keeps what it is launched with."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


def record(
    model: str, dtype: torch.dtype, fusion: str, softmax: str, max_tokens: int, num_spans: int, place: str
) -> Recorder:
    """What a launch is given; tensors are on the CPU: sets in ``"rows"``, or a bank in ``"slots"``."""
    heads, recorder = MODELS[model], Recorder()
    block = {"memory_layer": 0, "retrieval_layers": [0], "chunk_size": CHUNK, "top_k": TOP_K}
    memory = MemoryConfig.from_dict(block | {"fusion": fusion, "memory_softmax": softmax}, 1)
    kernel = RetrievalKernel(heads, memory, TOP_K, dtype, CPU)
    kernel.constants["FLOAT32_DOT"] = False
    kernel.limit_programs(528, CPU)
    launcher.retrieval_attention = recorder
    rows = torch.zeros(2, heads.num_heads * heads.padded_dim, dtype=dtype)
    indices = torch.zeros(2, dtype=torch.int64)
    spans = Spans(torch.zeros(num_spans, 5, dtype=torch.int32), indices, indices, max_tokens)
    stored = Stored(*[torch.zeros(2, heads.num_kv_heads, TOP_K * CHUNK, heads.head_dim, dtype=dtype)] * 2, None)
    if place == "slots":
        stored = Stored(*[torch.zeros(heads.num_kv_heads, 2, CHUNK, heads.head_dim, dtype=dtype)] * 2, indices)
    gate, lse = rows[0, : heads.num_heads], torch.zeros(heads.num_heads, 2).T
    kernel.attend(
        *(rows, rows, spans, stored, rows, gate),
        local_lse=None if fusion == "gated" else lse,
    )
    return recorder


def spilled_bytes(binary: bytes) -> int:
    """Of a thread's stack: what the assembler could not keep in registers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        said = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    (stack,), (local,) = (re.findall(rf"{kind}:(\d+)", said) for kind in ("STACK", "LOCAL"))
    return int(stack) + int(local)


def compile_launch(capability: int, *launch: Any) -> dict[str, Any]:
    recorder = record(*launch)
    options = {name: recorder.kwargs.pop(name) for name in ("num_warps", "num_stages")}
    names = retrieval_attention.arg_names
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, value) in enumerate(zip(names, recorder.args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if name != "spans":
                attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name in SPECIALIZED and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(recorder.kwargs, "constexpr")
    source = ASTSource(retrieval_attention, signature, recorder.kwargs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assembly = compiled.asm["ptx"]
    return {
        "shared_bytes": compiled.metadata.shared,
        "is_split": recorder.kwargs["IS_SPLIT"],
        "copy_bytes": sorted(
            {int(width, 16) for width in re.findall(r"cp\.async\.c[ag]\S* .*, 0x([0-9a-f]+);?", assembly)}
        ),
        "spilled_bytes": spilled_bytes(compiled.asm["cubin"]),
        "matrix_products": assembly.count("mma.sync") + assembly.count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    names = sys.argv[1:] or list(LAUNCHES)
    print(json.dumps({name: compile_launch(*LAUNCHES[name]) for name in names}))
