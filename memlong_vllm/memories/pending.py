"""A write to a memory: first the workers save shards, then it is committed as one part."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from memlong_vllm.memories.catalogue import Key, Reservation
from memlong_vllm.memories.contents import check_chunks, check_shard, write_chunks
from memlong_vllm.memories.errors import MemoryLibraryError, MemoryWriteError
from memlong_vllm.memories.manifest import CHUNKS_SUFFIX, Manifest, Part
from memlong_vllm.memories.memory_format import MemoryFormat
from memlong_vllm.memories.shard_layout import shard_files
from memlong_vllm.memories.store import MemoryStore, WriteFailure

logger = logging.getLogger(__name__)

SHARD_WAIT_S = 60.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class _Request:
    """What a commit was called with.

    Attributes:
        shards: (name in the folder, number of chunks).
        has_spare_shards: whether paths of further shards were given out.
    """

    made: MemoryFormat
    token_ids: np.ndarray
    embeddings: np.ndarray
    shards: tuple[tuple[str, int], ...]
    num_ranks: int
    has_spare_shards: bool


class PendingWrite:
    """Chunks on their way into a memory. Ends with :meth:`commit` or :meth:`abandon`.

    Attributes:
        tenant, name: the memory's.
        max_chunks: chunks that were reserved.
    """

    def __init__(self, store: MemoryStore, key: Key, made: MemoryFormat, max_chunks: int, write: Reservation) -> None:
        self.tenant, self.name = key
        self.max_chunks = max_chunks
        self._store, self._key, self._made, self._write = store, key, made, write
        self._shards: list[str] = []
        self._state: Literal["open", "committing", "done", "failed"] = "open"
        self._error: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether the write is over: committed, failed or abandoned."""
        return self._state in ("done", "failed")

    @property
    def error(self) -> str | None:
        """Why the write failed, if it did."""
        return self._error

    def new_shard_path(self) -> str:
        """An absolute path that a shard of this write may be saved to, without a rank's suffix.

        Raises:
            MemoryLibraryError: if the write has ended.
        """
        self._require_open()
        token = new_token(self._store, self._write)
        self._shards.append(token)
        return str(self._store.folder(self._key) / token)

    def abandon(self) -> None:
        """Write nothing. Files of its shards are removed, also those that workers are about to
        write. Without effect once the write was committed or abandoned."""
        if self._state == "open":
            self._state, self._error = "failed", "abandoned"
            self._store.give_up(self._key, self._write)

    def commit(
        self, token_ids: np.ndarray, embeddings: np.ndarray, shards: Sequence[tuple[str, int]], num_ranks: int
    ) -> None:
        """Append the chunks, all or none, as soon as all ranks have written all shards.

        Returns at once. Commits to one memory happen in the order of these calls. One that fails
        (shards do not appear within 60 s or are not what they should be, the disk is full, the
        memory was deleted) is told of by ``MemoryLibrary.take_failures``.

        Args:
            token_ids: [num_chunks, chunk_size] int32; copied.
            embeddings: [num_chunks, dimension] float32; copied.
            shards: paths from :meth:`new_shard_path` and the number of chunks in each, in the
                order of the chunks. Paths that were asked for but are not named are given up.
            num_ranks: tensor-parallel ranks that write a file of each shard.

        Raises:
            MemoryWriteError: if the arguments contradict each other or the reservation, or the
                write has ended. It is then still as before the call.
        """
        self._require_open()
        counts = [(os.path.basename(path), count) for path, count in shards]
        self._check_arguments(token_ids, embeddings, [path for path, _ in shards], counts, num_ranks)
        self._state = "committing"
        copies = np.array(token_ids, order="C"), np.array(embeddings, order="C")
        request = _Request(self._made, *copies, tuple(counts), num_ranks, len(counts) < len(self._shards))
        self._store.background.submit(_Commit(self, self._store, self._write, request), lane=self._key)

    def _require_open(self) -> None:
        if self._state != "open":
            raise MemoryWriteError(f"the write to '{self.name}' has been committed or abandoned already")

    def _check_arguments(
        self,
        token_ids: np.ndarray,
        embeddings: np.ndarray,
        paths: list[str],
        counts: list[tuple[str, int]],
        num_ranks: int,
    ) -> None:
        num_chunks = len(token_ids)
        problem = check_chunks(token_ids, embeddings, self._made)
        names = [name for name, _ in counts]
        if problem is None and not 1 <= num_chunks <= self.max_chunks:
            problem = f"{num_chunks} chunks cannot be written: 1 to {self.max_chunks} were reserved"
        if problem is None and (num_ranks < 1 or any(count < 1 for _, count in counts)):
            problem = "a shard has at least one chunk and one rank"
        if problem is None and sum(count for _, count in counts) != num_chunks:
            problem = f"the shards hold {sum(count for _, count in counts)} chunks, not {num_chunks}"
        folder = self._store.folder(self._key)
        is_own = set(names) <= set(self._shards) and all(Path(path).parent == folder for path in paths)
        if problem is None and (not is_own or len(set(names)) != len(names)):
            problem = "a shard's path is not of this write, or named twice"
        if problem is not None:
            raise MemoryWriteError(f"the write to '{self.name}' cannot be committed: {problem}")

    def end(self, error: str | None) -> None:
        """Say how the commit went. For the library."""
        self._state, self._error = ("done" if error is None else "failed"), error
        if error is not None:
            with self._store.lock:
                self._store.failures.append(WriteFailure(self.tenant, self.name, error))


class _Commit:
    """Makes a part of what was written. A job of the library's thread."""

    is_awaited = True

    def __init__(self, pending: PendingWrite, store: MemoryStore, write: Reservation, request: _Request) -> None:
        self._pending, self._store, self._write, self._request = pending, store, write, request
        self._key = (pending.tenant, pending.name)
        self._folder = self._store.folder(self._key)
        names = [name for name, _ in request.shards]
        self._missing = [file for name in names for file in shard_files(str(self._folder / name), request.num_ranks)]
        self._deadline = time.monotonic() + SHARD_WAIT_S

    def delay(self, now: float) -> float:
        while self._missing and os.path.exists(self._missing[-1]):
            self._missing.pop()
        is_over = not self._missing or self._write.refusal is not None or now >= self._deadline
        return 0.0 if is_over else _POLL_S

    def run(self) -> None:
        if self._write.refusal is not None:
            raise MemoryWriteError(self._write.refusal)
        if self._missing:
            raise MemoryWriteError(f"a worker did not write {self._missing[-1]} within {SHARD_WAIT_S:g} s")
        part = self._part()
        self._store.publish(self._key, self._write, lambda found: self._appended(found, part))
        self._pending.end(None)
        if self._request.has_spare_shards:
            self._store.sweep_soon(self._key)
            self._store.sweep_late(self._key)

    def fail(self, error: Exception) -> None:
        self._store.give_up(self._key, self._write)
        self._pending.end(str(error) if isinstance(error, MemoryLibraryError) else f"{type(error).__name__}: {error}")

    def _part(self) -> Part:
        request, verifier = self._request, self._store.verifier
        shards = []
        for name, count in request.shards:
            check_shard(self._folder, name, count, request.num_ranks, request.made)
            shards.append(verifier.describe_shard(self._folder, name, count, request.num_ranks))
        file = self._folder / (new_token(self._store, self._write) + CHUNKS_SUFFIX)
        write_chunks(file, request.token_ids, request.embeddings)
        stored = verifier.describe(file)
        return Part(stored.name, len(request.token_ids), stored.sha256, stored.num_bytes, tuple(shards))

    def _appended(self, found: Manifest | None, part: Part) -> Manifest:
        now = time.time()
        if found is None:
            return Manifest(self._key[1], now, now, self._request.made, (part,))
        return replace(found, updated=now, parts=(*found.parts, part))


def new_token(store: MemoryStore, write: Reservation) -> str:
    """A name that no file has or will have, whose files stay as long as the write goes on."""
    token = secrets.token_hex(16)
    with store.lock:
        write.tokens.add(token)
    return token
