"""The data files of a memory: writing chunks files, and checking all files against a manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from memlong_vllm.memories.durable import file_sha256, write_durably
from memlong_vllm.memories.errors import MemoryDamagedError, ShardError
from memlong_vllm.memories.manifest import Manifest, Part, ShardEntry, StoredFile
from memlong_vllm.memories.memory_format import SAFETENSORS_DTYPES, MemoryFormat
from memlong_vllm.memories.shard_layout import read_header, shard_files

TOKEN_IDS, EMBEDDINGS = "token_ids", "embeddings"


def write_chunks(file: Path, token_ids: np.ndarray, embeddings: np.ndarray) -> None:
    """Write a chunks file: ``token_ids`` [num_chunks, chunk_size] int32 and ``embeddings``
    [num_chunks, dimension] float32.

    Raises:
        OSError: if it cannot be written.
    """
    write_durably(file, save({TOKEN_IDS: token_ids, EMBEDDINGS: embeddings}))


def check_chunks(token_ids: np.ndarray, embeddings: np.ndarray, made: MemoryFormat) -> str | None:
    """What is wrong with a part's token ids and embeddings, if anything."""
    num_chunks = len(token_ids)
    if token_ids.dtype != np.int32 or token_ids.shape != (num_chunks, made.chunk_size):
        return f"token_ids are {token_ids.dtype} {token_ids.shape}, not int32 [num_chunks, {made.chunk_size}]"
    if embeddings.dtype != np.float32 or embeddings.shape != (num_chunks, made.dimension):
        return f"embeddings are {embeddings.dtype} {embeddings.shape}, not float32 [{num_chunks}, {made.dimension}]"
    if num_chunks and int(token_ids.min()) < 0:
        return "a token id is negative"
    if not np.isfinite(embeddings).all():
        return "an embedding is not finite"
    return None


def read_chunks(folder: Path, part: Part, made: MemoryFormat) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and embeddings of a part; see :func:`write_chunks`.

    Raises:
        MemoryDamagedError: naming the file.
    """
    file = folder / part.chunks_file
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise MemoryDamagedError(f"{file}: {error}") from error
    if tensors.keys() != {TOKEN_IDS, EMBEDDINGS} or any(array.ndim != 2 for array in tensors.values()):
        raise MemoryDamagedError(f"{file}: does not hold 'token_ids' and 'embeddings' of two dimensions")
    token_ids, embeddings = tensors[TOKEN_IDS], tensors[EMBEDDINGS]
    if problem := check_chunks(token_ids, embeddings, made):
        raise MemoryDamagedError(f"{file}: {problem}")
    if len(token_ids) != part.num_chunks:
        raise MemoryDamagedError(f"{file}: holds {len(token_ids)} chunks instead of {part.num_chunks}")
    return token_ids, embeddings


def check_shard(folder: Path, path: str, num_chunks: int, num_ranks: int, made: MemoryFormat) -> None:
    """Check from the headers that a shard's files hold all heads of its chunks.

    Raises:
        ShardError: naming the file.
    """
    heads: set[int] = set()
    for file in shard_files(str(folder / path), num_ranks):
        header = read_header(file)
        expected = (num_chunks, 2, header.num_heads, made.chunk_size, made.head_dim)
        if header.shape != expected or header.dtype != SAFETENSORS_DTYPES[made.dtype]:
            stored = f"{header.dtype} {list(header.shape)}"
            raise ShardError(f"{file}: holds {stored} instead of {made.dtype} {list(expected)}")
        if header.first_head + header.num_heads > made.num_kv_heads:
            raise ShardError(f"{file}: holds heads beyond the model's {made.num_kv_heads}")
        heads.update(range(header.first_head, header.first_head + header.num_heads))
    if len(heads) != made.num_kv_heads:
        raise ShardError(f"{folder / path}: its files hold {len(heads)} of {made.num_kv_heads} key-value heads")


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file that had the right contents; it has them still if nothing here changed."""

    sha256: str
    inode: int
    num_bytes: int
    changed_ns: int


class Verifier:
    """Checks files against their checksums. A file is read again only if it was touched."""

    def __init__(self) -> None:
        self._seen: dict[Path, _Seen] = {}

    def describe(self, path: Path) -> StoredFile:
        """A file as it is now, which counts as the right contents from here on.

        Raises:
            OSError: if it cannot be read.
        """
        status = path.stat()
        sha256 = file_sha256(path)
        self._seen[path] = _seen(sha256, status)
        return StoredFile(path.name, sha256, status.st_size)

    def describe_shard(self, folder: Path, path: str, num_chunks: int, num_ranks: int) -> ShardEntry:
        """A shard's files as they are now; see :meth:`describe`."""
        files = [self.describe(Path(file)) for file in shard_files(str(folder / path), num_ranks)]
        sums, sizes = tuple(file.sha256 for file in files), tuple(file.num_bytes for file in files)
        return ShardEntry(path, num_chunks, num_ranks, sums, sizes)

    def verify(self, folder: Path, manifest: Manifest) -> None:
        """Check all data files of a memory.

        Raises:
            MemoryDamagedError: naming the first file that is missing or not as it was written.
        """
        for part in manifest.parts:
            self._verify_file(folder, StoredFile(part.chunks_file, part.sha256, part.num_bytes))
            for shard in part.shards:
                was_read = {self._verify_file(folder, file) for file in shard.files()}
                if True in was_read:
                    self._check_shard(folder, shard, manifest.format)

    def _check_shard(self, folder: Path, shard: ShardEntry, made: MemoryFormat) -> None:
        try:
            check_shard(folder, shard.path, shard.num_chunks, shard.ranks, made)
        except ShardError as error:
            self.forget(folder, {file.name for file in shard.files()})
            raise MemoryDamagedError(str(error)) from error

    def forget(self, folder: Path, names: set[str]) -> None:
        """Forget files of a folder that were removed."""
        for name in names:
            self._seen.pop(folder / name, None)

    def _verify_file(self, folder: Path, file: StoredFile) -> bool:
        """Returns whether the file was read: it had not been verified before."""
        path = folder / file.name
        try:
            status = path.stat()
            if status.st_size != file.num_bytes:
                raise MemoryDamagedError(f"{path}: has {status.st_size} bytes instead of {file.num_bytes}")
            now = _seen(file.sha256, status)
            if self._seen.get(path) == now:
                return False
            if file_sha256(path) != file.sha256:
                raise MemoryDamagedError(f"{path}: is not as it was written: its checksum differs")
        except OSError as error:
            raise MemoryDamagedError(f"{path}: {error.strerror or error}") from error
        self._seen[path] = now
        return True


def _seen(sha256: str, status: os.stat_result) -> _Seen:
    return _Seen(sha256, status.st_ino, status.st_size, max(status.st_mtime_ns, status.st_ctime_ns))
