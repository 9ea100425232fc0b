"""Small memories for tests: a format, chunks whose contents are known, and reading them back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memlong_vllm.memories.manifest import Manifest
from memlong_vllm.memories.memory_format import MemoryFormat
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.pending import PendingWrite
from memlong_vllm.memories.quota import Quota
from memlong_vllm.memories.shards import ShardReader, write_shard
from memlong_vllm.memories.snapshot import OpenMemory

TAU, DIM, HEADS, HEAD_DIM = 4, 3, 2, 2
FORMAT = MemoryFormat(
    model_fingerprint="0" * 64,
    pooling="mean",
    max_length=32,
    query_instruction=None,
    dimension=DIM,
    probe=(1.0, 0.0, 0.0),
    chunk_size=TAU,
    memory_layer=1,
    num_kv_heads=HEADS,
    head_dim=HEAD_DIM,
    dtype="float32",
)
PLENTY = Quota(max_bytes=1 << 30, max_names=1000)
OTHER_MODEL = replace(FORMAT, model_fingerprint="1" * 64)
WAIT_S = 20.0


@dataclass(frozen=True)
class Chunks:
    """Contents that follow from ``seeds``, one a chunk."""

    seeds: tuple[int, ...]

    @property
    def token_ids(self) -> np.ndarray:
        return np.array([[seed * 7 + i for i in range(TAU)] for seed in self.seeds], np.int32).reshape(-1, TAU)

    @property
    def embeddings(self) -> np.ndarray:
        return np.array([[seed, 1, -seed] for seed in self.seeds], np.float32).reshape(-1, DIM)

    @property
    def kv(self) -> torch.Tensor:
        seeds = torch.tensor(self.seeds, dtype=torch.float32)
        places = torch.arange(2 * HEADS * TAU * HEAD_DIM).reshape(2, HEADS, TAU, HEAD_DIM)
        return seeds[:, None, None, None, None] + places / 64


def save_shards(write: PendingWrite, seeds: tuple[int, ...], per_shard: int, num_ranks: int) -> list[tuple[str, int]]:
    """Write chunks to shards as workers would."""
    shards = []
    for start in range(0, len(seeds), per_shard):
        chunks = Chunks(seeds[start : start + per_shard])
        path = write.new_shard_path()
        heads = HEADS // num_ranks
        for rank in range(num_ranks):
            write_shard(path, rank, num_ranks, rank * heads, chunks.kv[:, :, rank * heads : (rank + 1) * heads])
        shards.append((path, len(chunks.seeds)))
    return shards


def commit(write: PendingWrite, seeds: tuple[int, ...], per_shard: int = 2, num_ranks: int = 1) -> None:
    shards = save_shards(write, seeds, per_shard, num_ranks)
    chunks = Chunks(seeds)
    write.commit(chunks.token_ids, chunks.embeddings, shards, num_ranks)


def append(library: MemoryLibrary, name: str, *seeds: int, tenant: str = "default", num_ranks: int = 1) -> None:
    """Append chunks and wait until they are there."""
    write = library.begin_write(tenant, name, len(seeds))
    commit(write, seeds, num_ranks=num_ranks)
    assert library.flush(WAIT_S)
    assert library.take_failures() == []
    assert write.is_done


def opened(library: MemoryLibrary, name: str, tenant: str = "default") -> OpenMemory:
    memory = library.open(tenant, name)
    try:
        memory.wait(WAIT_S)
    except BaseException:
        library.release(memory)
        raise
    return memory


def seeds_in(memory: OpenMemory) -> tuple[int, ...]:
    """The seeds of an open memory's chunks, having checked all that is stored of each."""
    seeds = tuple(int(tokens[0]) // 7 for tokens in memory.token_ids)
    expected = Chunks(seeds)
    assert memory.num_chunks == len(seeds)
    assert np.array_equal(memory.token_ids, expected.token_ids)
    assert np.array_equal(memory.embeddings, expected.embeddings)
    reader = ShardReader()
    for i, kv in enumerate(expected.kv):
        path, row = memory.location(i)
        assert torch.equal(reader.read(path, row, 0, HEADS), kv)
    return seeds


def read(library: MemoryLibrary, name: str, tenant: str = "default") -> tuple[int, ...]:
    memory = opened(library, name, tenant)
    try:
        return seeds_in(memory)
    finally:
        library.release(memory)


def files_under(root: Path) -> set[str]:
    """All files but the lock, relative to ``root``."""
    return {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir() and p.name != ".lock"}


def files_expected(library: MemoryLibrary, root: Path) -> set[str]:
    """The files that the manifests refer to, and the manifests."""
    expected = set()
    for tenant in library.tenants():
        for info in library.names(tenant):
            memory = library.open(tenant, info.name)
            names = ["manifest.json", *(file.name for file in memory.manifest.files())]
            expected |= {f"{tenant}/{info.name}/{name}" for name in names}
            library.release(memory)
    return expected


def manifest_of(library: MemoryLibrary, name: str) -> Manifest:
    memory = library.open("default", name)
    library.release(memory)
    return memory.manifest


def with_right_checksum(body: dict[str, Any]) -> bytes:
    """A manifest's file of any content, as somebody would make it who knows how."""
    rest = {name: value for name, value in body.items() if name != "sha256"}
    digest = hashlib.sha256((json.dumps(rest, indent=1, sort_keys=True) + "\n").encode()).hexdigest()
    return (json.dumps(rest | {"sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def reopen(library: MemoryLibrary, **changes: object) -> MemoryLibrary:
    """The same folder after a restart, with ``changes`` to the arguments."""
    library.close()
    arguments = {"format": FORMAT, "quota": PLENTY} | changes
    return MemoryLibrary(library._root, **arguments)  # type: ignore[arg-type]
