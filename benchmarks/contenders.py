"""What is compared: MemLong, and what a user would pick instead. How each is loaded, and how much
memory it is given.

All of them have the same backbone, the one inside the MemLong checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import authors_loop
import vllm_engine
from cells import Cell
from engine_process import EngineProcess, Loader

from memlong_vllm.config import GIB, MemLongConfig, max_sequence_slots
from memlong_vllm.evaluation.plain_backbone import plain_backbone

MEMLONG, FULL, WINDOW, AUTHORS, FP8, INT8 = "memlong", "full", "window", "authors", "fp8", "int8"
OFF = "off"
TITLES = {
    MEMLONG: "MemLong",
    FULL: "full attention, stock vLLM",
    FP8: "full attention, fp8 KV cache",
    INT8: "full attention, int8 KV cache",
    WINDOW: "sliding window only, stock vLLM",
    OFF: "MemLong that remembers nothing (memory_size 0): its attention, and no memory",
    AUTHORS: "a loop like the authors', around this project's plain reference model in transformers (not their code; "
    "attention is written out, without fused kernels), and without the maps of memory that theirs has not",
}
KV_DTYPES = {FP8: "fp8", INT8: "int8_per_token_head"}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Workloads whose prompts are known but for their ends.
KNOWN = ("decode", "document", "spread", "aligned")
# Blocks of the KV cache have at most so many tokens; a window needs one more at either end.
BLOCK_TOKENS = 128
WARM_UP_ANSWER = 4
# Of a process beside weights and caches: libraries, compiled code, the tensors of a step.
PROCESS_BYTES = 6 * GIB // 10
# Engines of this package, and those whose KV cache needs a window only.
OURS, WINDOWED = (MEMLONG, OFF), (MEMLONG, OFF, WINDOW)


@dataclass(frozen=True)
class Options:
    """How engines are set up, alike for all. ``kv_bytes``: of each one's KV cache, MemLong's bank included, at
    most; engines with a window get what that needs at least."""

    dtype: str = "float32"
    enforce_eager: bool = True
    max_num_batched_tokens: int = 2048
    kv_bytes: int = 4 * GIB
    memlong: dict[str, Any] | None = None


def _in_blocks(cell: Cell, num_tokens: int) -> int:
    """Tokens of whole blocks, with one that vLLM keeps and one that is being filled for each sequence."""
    return num_tokens + 2 * (cell.batch + 1) * BLOCK_TOKENS


class Contenders:
    """The engines of a run.

    Args:
        checkpoint: of MemLong.
        folder: for the backbone's checkpoints, which are made when they are needed.
        cells: what will be asked of them; they are given memory for the largest, within limits.
    """

    def __init__(
        self, checkpoint: Path, folder: Path, names: Sequence[str], cells: Sequence[Cell], options: Options
    ) -> None:
        self.names, self.options = list(names), options
        self._checkpoint, self._folder = checkpoint, folder
        self.config = MemLongConfig.from_pretrained(checkpoint)
        self.memory = self.config.memory
        self._cells = {name: [cell for cell in cells if self.why_not(name, cell) is None] for name in names}

    def describe(self) -> dict[str, dict[str, Any]]:
        """For the results file; the same whatever the cells."""
        block = self.config.memlong
        return {
            name: {"title": TITLES[name], "checkpoint": self._checkpoint.name}
            | ({"memlong": block} if name in (MEMLONG, AUTHORS) else {})
            | ({"local_window": self.memory.local_window} if name in (WINDOW, OFF) else {})
            for name in self.names
        }

    def why_not(self, name: str, cell: Cell) -> str | None:
        """Why an engine cannot do a cell, or None if it can, as far as is known without trying."""
        if name == AUTHORS and cell.batch > 1:
            return "the loop takes one sequence at a time"
        if name in (FULL, *KV_DTYPES):
            needed, limit = self._padded(cell.longest) * self._token_bytes(name), self.options.kv_bytes
            if needed > limit:
                return f"the KV cache of one sequence takes {needed / GIB:.2f} GiB of {limit / GIB:.2f}"
        return None

    def fitting(self, name: str, cell: Cell) -> int:
        """How many of a cell's sequences the KV cache holds at once; the others wait."""
        if name not in (FULL, *KV_DTYPES) or cell.workload == "document":
            return cell.batch
        return min(cell.batch, self.kv_bytes(name) // (self._padded(cell.longest) * self._token_bytes(name)))

    def start(self, name: str) -> EngineProcess:
        """Raises:
        EngineError: if it does not start.
        """
        load: Loader = authors_loop.load if name == AUTHORS else vllm_engine.load
        return EngineProcess(load, self.model(name), self.settings(name))

    def warm_up(self, name: str, engine: EngineProcess) -> None:
        """Ask for what is not measured: in the first steps kernels are compiled, threads start and
        weights are packed, which vLLM does beforehand only if it measures memory."""
        engine.ask(prompts=[[(0, self.warm_up_tokens(name))]], max_tokens=WARM_UP_ANSWER, salts=["warm-up"])

    def warm_up_tokens(self, name: str) -> int:
        """A prompt's, of which some leave the window and are retrieved, and which fills a step, so that the memory
        of its tensors has been written to; if the engine takes so many."""
        longest: int = self.settings(name)["max_model_len"]
        wanted = self.memory.local_window + 3 * self.memory.retrieval_stride
        return min(longest - WARM_UP_ANSWER, max(wanted, self.options.max_num_batched_tokens))

    def model(self, name: str) -> Path:
        if name in (*OURS, AUTHORS):
            return self._checkpoint
        window = self.memory.local_window if name == WINDOW else None
        folder = self._folder / ("window" if name == WINDOW else "full")
        return folder if folder.exists() else plain_backbone(self._checkpoint, folder, window)

    def settings(self, name: str) -> dict[str, Any]:
        """Of ``vllm.LLM``, or of the loop."""
        options, cells = self.options, self._cells[name]
        max_model_len = max(cell.longest for cell in cells)
        if name == AUTHORS:
            return {"dtype": options.dtype, "piece": self.memory.local_window, "max_model_len": max_model_len}
        settings: dict[str, Any] = {
            "dtype": options.dtype,
            "enforce_eager": options.enforce_eager,
            "max_model_len": max_model_len,
            "max_num_seqs": max(cell.batch for cell in cells),
            "max_num_batched_tokens": max(options.max_num_batched_tokens, max(cell.batch for cell in cells)),
            "kv_cache_memory_bytes": self.kv_bytes(name),
            "enable_prefix_caching": True,
        }
        if max_model_len > json.loads((self.model(name) / "config.json").read_text())["max_position_embeddings"]:
            # Only speed is measured: beyond what the backbone was trained on, its text is no use.
            settings["hf_overrides"] = {"max_position_embeddings": max_model_len}
        if name in KV_DTYPES:
            settings["kv_cache_dtype"] = KV_DTYPES[name]
        if name in OURS:
            memlong = {"bank_gib": self._bank_bytes(name) / GIB} | (options.memlong or {})
            settings["additional_config"] = {"memlong": memlong | ({"memory_size": 0} if name == OFF else {})}
        return settings

    def check_memory(self, available: int | None) -> None:
        """All engines run at once.

        Raises:
            SystemExit: if they take more than there is, and the system would end one of them.
        """
        names = [name for name in self.names if self._cells[name]]
        weights = sum(file.stat().st_size for file in self._checkpoint.glob("*.safetensors"))
        total = sum(weights + PROCESS_BYTES + self._cache_bytes(name) for name in names)
        if available is not None and total > available:
            raise SystemExit(
                f"--kv-gib {self.options.kv_bytes / GIB:g}: {len(names)} engines take about {total / GIB:.1f} GiB, "
                f"{available / GIB:.1f} are available: lower it, or have fewer --engines or smaller cells"
            )

    def _cache_bytes(self, name: str) -> int:
        if name == AUTHORS:  # It has none of its own size.
            return 0
        return self.kv_bytes(name) + (self._bank_bytes(name) if name in OURS else 0)

    def kv_bytes(self, name: str) -> int:
        """Of the KV cache: for all sequences of the largest cell, within the limit. Engines with a
        window get as much as full attention where prompts are known: blocks that left the window hold prefixes."""
        cells, token_bytes = self._cells[name], self._token_bytes(name)
        limit = self.options.kv_bytes - (self._bank_bytes(name) if name == MEMLONG else 0)
        if name not in WINDOWED:
            return min(max(_in_blocks(cell, cell.kv_tokens) for cell in cells) * token_bytes, limit)
        least = max(cell.batch * self._window_tokens(cell) for cell in cells)
        least += self.options.max_num_batched_tokens + BLOCK_TOKENS
        known = [cell for cell in cells if cell.workload in KNOWN]
        wanted = max((_in_blocks(cell, cell.kv_tokens) for cell in known), default=0)
        return max(min(wanted * token_bytes, limit), least * token_bytes)

    def _window_tokens(self, cell: Cell) -> int:
        """That a sequence of a windowed engine holds, but for those of a step."""
        return min(cell.longest, self.memory.local_window) + 2 * BLOCK_TOKENS

    def _bank_bytes(self, name: str) -> int:
        slot_bytes = self.memory.chunk_size * self._token_bytes(name) // self.config.num_hidden_layers
        cells, step = self._cells[name], self.options.max_num_batched_tokens
        memory = replace(self.memory, memory_size=0) if name == OFF else self.memory
        slots = max(cell.batch * max_sequence_slots(memory, cell.longest, step) for cell in cells)
        longest = max(cell.longest for cell in cells)
        return (slots + max_sequence_slots(memory, longest, step) + 1) * slot_bytes

    def _token_bytes(self, name: str) -> int:
        """Of a token's keys and values in all layers."""
        itemsize = 1 if name in KV_DTYPES else DTYPE_BYTES[self.options.dtype]
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim * itemsize

    @staticmethod
    def _padded(num_tokens: int) -> int:
        """In whole blocks, and one that vLLM keeps for itself."""
        return (-(-num_tokens // BLOCK_TOKENS) + 1) * BLOCK_TOKENS
