"""Names and headers of shard files, without torch.

A *shard* holds the keys and values of some chunks, one file per tensor-parallel rank:
``<path>.rank<r>of<n>.safetensors`` with the tensor ``kv``, [num_chunks, 2, this rank's heads,
chunk_size, head_dim] (keys, then values; un-rotated), and the metadata ``first_head`` and
``num_heads``. A chunk is thus one contiguous read. Ranks that replicate heads have equal ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from memlong_vllm.memories.errors import ShardError

TENSOR = "kv"
_COUNT = re.compile(r"0|[1-9][0-9]{0,8}")


def shard_file(path: str, rank: int, num_ranks: int) -> str:
    """The file of one rank."""
    return f"{path}.rank{rank}of{num_ranks}.safetensors"


def shard_files(path: str, num_ranks: int) -> list[str]:
    """The files of a shard, by rank."""
    return [shard_file(path, rank, num_ranks) for rank in range(num_ranks)]


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard's file says of itself.

    Attributes:
        shape: of ``kv``: [num_chunks, 2, num_heads, chunk_size, head_dim].
        dtype: of ``kv``, as safetensors writes it, for example ``"BF16"``.
        first_head: the first key-value head in the file, among all ranks' heads.
    """

    shape: tuple[int, int, int, int, int]
    dtype: str
    first_head: int

    @property
    def num_heads(self) -> int:
        return self.shape[2]


def read_header(file: str) -> ShardHeader:
    """Read and check the header of one rank's file.

    Raises:
        ShardError: naming the file, if it is missing, cut short or not a shard's.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            return checked_header(file, opened)
    except (OSError, SafetensorError) as error:
        raise ShardError(f"{file}: {error}") from error


def checked_header(file: str, opened: safe_open) -> ShardHeader:
    """The header of an open file.

    Raises:
        ShardError: naming the file, if it is not a shard's.
    """
    keys, metadata = list(opened.keys()), opened.metadata() or {}
    if keys != [TENSOR]:
        raise ShardError(f"{file}: holds the tensors {keys[:8]} instead of '{TENSOR}' alone")
    view = opened.get_slice(TENSOR)
    shape = tuple(view.get_shape())
    if len(shape) != 5 or shape[1] != 2 or 0 in shape:
        rule = "[num_chunks, 2, num_heads, chunk_size, head_dim]"
        raise ShardError(f"{file}: '{TENSOR}' has the shape {list(shape)} instead of {rule}")
    counts = {name: metadata.get(name, "") for name in ("first_head", "num_heads")}
    for name, value in counts.items():
        if not _COUNT.fullmatch(value):
            raise ShardError(f"{file}: metadata '{name}' is {value[:20]!r} instead of a number")
    if int(counts["num_heads"]) != shape[2]:
        raise ShardError(f"{file}: metadata 'num_heads' is {counts['num_heads']}, but 'kv' has {shape[2]} heads")
    return ShardHeader(shape, view.get_dtype(), int(counts["first_head"]))
