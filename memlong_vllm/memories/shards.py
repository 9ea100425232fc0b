"""Writing and reading the keys and values of chunks in shards. See ``shard_layout`` for the format."""

from __future__ import annotations

import glob
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from memlong_vllm.memories.durable import write_durably
from memlong_vllm.memories.errors import ShardError
from memlong_vllm.memories.shard_layout import TENSOR, ShardHeader, checked_header, shard_file, shard_files

__all__ = ["ShardReader", "shard_file", "shard_files", "write_shard"]

MAX_OPEN_FILES = 64
MAX_KNOWN_SHARDS = 4096


def write_shard(path: str, rank: int, num_ranks: int, first_head: int, kv: torch.Tensor) -> None:
    """Write one rank's part of a new shard. It appears on disk complete or not at all.

    Args:
        path: the shard, without the rank's suffix; its folder exists.
        first_head: the first of this rank's key-value heads, among all ranks' heads.
        kv: [num_chunks, 2, num_heads, chunk_size, head_dim], on any device.

    Raises:
        ShardError: naming the file, if ``kv`` has another shape or writing fails.
    """
    file = shard_file(path, rank, num_ranks)
    if kv.dim() != 5 or kv.shape[1] != 2 or 0 in kv.shape:
        raise ShardError(f"{file}: cannot write a tensor of shape {list(kv.shape)}")
    metadata = {"first_head": str(first_head), "num_heads": str(kv.shape[2])}
    try:
        # Not save_file: a kill would leave its temporary file, which has a name of its own choice.
        write_durably(Path(file), save({TENSOR: kv.detach().to("cpu").contiguous()}, metadata))
    except (OSError, SafetensorError) as error:
        raise ShardError(f"{file}: cannot be written: {error}") from error


@dataclass(slots=True)
class _OpenFile:
    header: ShardHeader
    handle: safe_open  # Memory-mapped.


class ShardReader:
    """Reads chunks out of shards. Keeps the 64 files used last memory-mapped; not thread-safe.

    A shard's path is never used again for other contents, so what is known of one stays true.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._parts: OrderedDict[str, list[tuple[str, ShardHeader]]] = OrderedDict()

    def read(self, path: str, row: int, first_head: int, num_heads: int) -> torch.Tensor:
        """Keys and values of one chunk, for heads [first_head, first_head + num_heads).

        The heads may lie in any ranks' files, so the shard may come from another number of ranks.

        Args:
            path: the shard, without a rank's suffix.
            row: the chunk within the shard.

        Returns:
            [2, num_heads, chunk_size, head_dim] in the stored dtype, on the CPU, a copy.

        Raises:
            ShardError: naming the file, if it is missing, not a shard's, or lacks row or heads.
        """
        parts = self._parts_of(path)
        pieces: list[torch.Tensor] = []
        head, end = first_head, first_head + num_heads
        while head < end:
            file, header = _part_with(parts, head, path)
            start = head - header.first_head
            stop = min(end - header.first_head, header.num_heads)
            pieces.append(self._read(file, row, start, stop))
            head += stop - start
        if not pieces:
            raise ShardError(f"{path}: no heads were asked for")
        # Pieces are views of mapped files, which would keep those mapped.
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)

    def _read(self, file: str, row: int, start: int, stop: int) -> torch.Tensor:
        opened = self._opened(file)
        num_chunks = opened.header.shape[0]
        if not 0 <= row < num_chunks:
            raise ShardError(f"{file}: has no chunk {row}, only {num_chunks}")
        try:
            return opened.handle.get_slice(TENSOR)[row : row + 1, :, start:stop].squeeze(0)
        except (OSError, SafetensorError) as error:
            raise ShardError(f"{file}: {error}") from error

    def _parts_of(self, path: str) -> list[tuple[str, ShardHeader]]:
        if path in self._parts:
            self._parts.move_to_end(path)
            return self._parts[path]
        found = set(glob.glob(f"{glob.escape(path)}.rank0of*.safetensors"))
        if len(found) != 1:
            raise ShardError(f"{path}: {len(found)} files of a rank 0, instead of one")
        count = found.pop().removeprefix(f"{path}.rank0of").removesuffix(".safetensors")
        if not count.isdecimal():
            raise ShardError(f"{path}: a file's number of ranks is {count!r}")
        parts = [(file, self._opened(file).header) for file in shard_files(path, int(count))]
        self._parts[path] = parts
        if len(self._parts) > MAX_KNOWN_SHARDS:
            self._parts.popitem(last=False)
        return parts

    def _opened(self, file: str) -> _OpenFile:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        try:
            handle = safe_open(file, framework="pt", device="cpu")
            opened = _OpenFile(checked_header(file, handle), handle)
        except (OSError, SafetensorError) as error:
            raise ShardError(f"{file}: {error}") from error
        self._open[file] = opened
        if len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return opened


def _part_with(parts: list[tuple[str, ShardHeader]], head: int, path: str) -> tuple[str, ShardHeader]:
    for file, header in parts:
        if header.first_head <= head < header.first_head + header.num_heads:
            return file, header
    raise ShardError(f"{path}: no rank's file holds key-value head {head}")
