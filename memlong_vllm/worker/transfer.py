"""Chunks between the bank and shards on disk."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from memlong_vllm.memories.shards import ShardReader, write_shard
from memlong_vllm.plan import ChunkLoad, ChunkSave
from memlong_vllm.process_cpus import use_process_cpus
from memlong_vllm.worker.bank import MemoryBank
from memlong_vllm.worker.index_tensors import index_tensor
from memlong_vllm.worker.staging import Staging

logger = logging.getLogger(__name__)

# Shards that wait in host memory to be written; a step that saves more waits for the disk.
MAX_WAITING_SAVES = 8


@dataclass(frozen=True, slots=True)
class RankHeads:
    """Which key-value heads of all a rank's bank holds.

    Ranks that replicate heads have the same ``first_head``.
    """

    rank: int
    num_ranks: int
    first_head: int


class ChunkTransfer:
    """Executes a plan's loads and saves for one rank.

    Loads are read from disk within the step. Saves are copied to host memory in the order of the
    device's stream and written by a thread. At the interpreter's normal exit, what waits is
    written first. No file ends the engine: an unreadable chunk becomes zeros, a shard that cannot
    be written stays missing, and both are logged as errors with the path.
    """

    def __init__(self, bank: MemoryBank, staging: Staging, heads: RankHeads) -> None:
        self._bank = bank
        self._staging = staging
        self._heads = heads
        self._reader = ShardReader()
        self._writer = ThreadPoolExecutor(1, "memlong-shard-writer", use_process_cpus)
        self._waiting: deque[Future[None]] = deque()
        self._is_cuda = bank.device.type == "cuda"

    def load(self, loads: Sequence[ChunkLoad]) -> None:
        """Fill slots from shards; later work on the current stream sees them."""
        size = self._staging.num_chunks
        for first in range(0, len(loads), size):
            self._load_together(loads[first : first + size])

    def _load_together(self, loads: Sequence[ChunkLoad]) -> None:
        # [2, chunks, heads, chunk_size, head_dim]: keys of all, then values of all.
        host = self._host_buffer(len(loads))
        for i, load in enumerate(loads):
            host[:, i] = self._read(load)
        slots = index_tensor(np.asarray([load.slot for load in loads]), self._bank.device)
        buffers = self._staging.buffers(len(loads), 1)
        for buffer, loaded in zip(buffers, host, strict=True):
            buffer.copy_(loaded, non_blocking=self._is_cuda)
        self._bank.write_chunks(slots, *buffers)

    def _host_buffer(self, num_chunks: int) -> torch.Tensor:
        """[2, num_chunks, num_kv_heads, chunk_size, head_dim] on the host, pinned where it matters."""
        num_heads, _, chunk_size, head_dim = self._bank.keys.shape
        shape = (2, num_chunks, num_heads, chunk_size, head_dim)
        return torch.empty(shape, dtype=self._bank.keys.dtype, pin_memory=self._is_cuda)

    def _read(self, load: ChunkLoad) -> torch.Tensor:
        """[2, num_kv_heads, chunk_size, head_dim]: the chunk, or zeros if it cannot be had."""
        num_heads, _, chunk_size, head_dim = self._bank.keys.shape
        shape = (2, num_heads, chunk_size, head_dim)
        try:
            chunk = self._reader.read(load.path, load.row, self._heads.first_head, num_heads)
            if tuple(chunk.shape) == shape:
                return chunk
            reason = f"its shape is {tuple(chunk.shape)}, not {shape}"
        except Exception as error:  # noqa: BLE001 (no file may end the engine)
            reason = str(error)
        logger.error("Chunk %d of %s cannot be loaded, zeros take its place: %s", load.row, load.path, reason)
        return torch.zeros(shape, dtype=self._bank.keys.dtype)

    def save(self, saves: Sequence[ChunkSave]) -> None:
        """Take copies of slots as the current stream's work leaves them, and have them written."""
        for save in saves:
            while len(self._waiting) >= MAX_WAITING_SAVES:
                self._waiting.popleft().result()
            host = self._copy_out(save.slots)
            copied = torch.cuda.current_stream(self._bank.device).record_event() if self._is_cuda else None
            self._waiting.append(self._writer.submit(self._write, save.path, host, copied))

    def _copy_out(self, slots: Sequence[int]) -> torch.Tensor:
        """[2, num_chunks, num_kv_heads, chunk_size, head_dim] on the host, there once the stream has."""
        host = self._host_buffer(len(slots))
        size = self._staging.num_chunks
        for first in range(0, len(slots), size):
            part = slice(first, first + size)
            index = index_tensor(np.asarray(slots[part]).reshape(-1, 1), self._bank.device)
            for target, gathered in zip(host, self._staging.gather(index), strict=True):
                target[part].copy_(gathered, non_blocking=self._is_cuda)
        return host

    def _write(self, path: str, host: torch.Tensor, copied: torch.cuda.Event | None) -> None:
        """In the writer's thread."""
        try:
            if copied is not None:
                copied.synchronize()
            heads = self._heads
            write_shard(path, heads.rank, heads.num_ranks, heads.first_head, host.transpose(0, 1).contiguous())
        except Exception as error:  # noqa: BLE001 (no file may end the engine)
            logger.error("Shard %s cannot be saved: %s", path, error)

    def flush(self) -> None:
        """Wait until everything saved so far is written."""
        while self._waiting:
            self._waiting.popleft().result()
