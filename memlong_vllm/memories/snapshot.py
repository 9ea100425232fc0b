"""A state of a memory, opened for reading."""

from __future__ import annotations

import threading
from bisect import bisect_right
from itertools import accumulate

import numpy as np

from memlong_vllm.memories.catalogue import Key
from memlong_vllm.memories.errors import MemoryDamagedError, MemoryLibraryError
from memlong_vllm.memories.manifest import Manifest, Parameter
from memlong_vllm.memories.store import Contents, MemoryStore


class OpenMemory:
    """A memory as it was when it was opened, whatever happens to it later.

    Its files are being verified until either :attr:`ready` is true or :attr:`error` is set; both
    may be read from any thread. ``MemoryLibrary.release`` gives it back, also after an error.

    Attributes:
        num_chunks: at least 1.
        version: 64 hexadecimal digits, another for every state of any memory.
        index_factory, index_parameters: as set by ``MemoryLibrary.set_index``.
    """

    def __init__(self, store: MemoryStore, key: Key, manifest: Manifest) -> None:
        self.tenant, self.name = key
        self.num_chunks = manifest.num_chunks
        self.version = manifest.version
        self.index_factory = manifest.index_factory
        self.index_parameters: dict[str, Parameter] = dict(manifest.index_parameters)
        self.manifest = manifest
        self._folder = store.folder(key)
        self._shards = [shard for part in manifest.parts for shard in part.shards]
        self._starts = [0, *accumulate(shard.num_chunks for shard in self._shards)]
        self._finished = threading.Event()
        self._contents: Contents | None = None
        self._error: MemoryLibraryError | None = None
        self._released = False

    @property
    def ready(self) -> bool:
        """Whether everything was verified."""
        return self._contents is not None

    @property
    def error(self) -> MemoryLibraryError | None:
        """Why the memory cannot be read, if so."""
        return self._error

    def wait(self, timeout: float) -> None:
        """Block until the memory is ready.

        Raises:
            MemoryLibraryError: ``error``, or that it is not ready after ``timeout`` seconds.
        """
        if not self._finished.wait(timeout):
            raise MemoryLibraryError(f"the memory '{self.name}' is not ready after {timeout:g} s")
        if self._error is not None:
            raise self._error

    @property
    def token_ids(self) -> np.ndarray:
        """[num_chunks, chunk_size] int32, read-only.

        Raises:
            MemoryLibraryError: if not ready.
        """
        return self._ready_contents().token_ids

    @property
    def embeddings(self) -> np.ndarray:
        """[num_chunks, dimension] float32, read-only.

        Raises:
            MemoryLibraryError: if not ready.
        """
        return self._ready_contents().embeddings

    def location(self, chunk: int) -> tuple[str, int]:
        """Where a chunk's keys and values are: the shard's absolute path, without a rank's
        suffix, and the row in it.

        Raises:
            IndexError: if there is no such chunk.
        """
        if not 0 <= chunk < self.num_chunks:
            raise IndexError(f"the memory '{self.name}' has no chunk {chunk}, only {self.num_chunks}")
        i = bisect_right(self._starts, chunk) - 1
        return str(self._folder / self._shards[i].path), chunk - self._starts[i]

    def missing_file(self, chunk: int) -> str | None:
        """A file of the chunk's shard that was there when the memory was opened and no longer is,
        or has another size. Cheap: contents are not read again."""
        i = bisect_right(self._starts, chunk) - 1
        for file in self._shards[i].files():
            try:
                size = (self._folder / file.name).stat().st_size
            except OSError:
                size = -1
            if size != file.num_bytes:
                return file.name
        return None

    def _ready_contents(self) -> Contents:
        if self._contents is None:
            raise self._error or MemoryLibraryError(f"the memory '{self.name}' is not ready yet")
        return self._contents

    def drop(self) -> bool:
        """Let go of the contents. Returns whether this was the first time. For the library."""
        is_first, self._released = not self._released, True
        self._contents = None
        self._error = self._error or MemoryLibraryError(f"the memory '{self.name}' was released")
        self._finished.set()
        return is_first

    def finish(self, result: Contents | MemoryLibraryError) -> None:
        """Say how opening went. For the library."""
        if isinstance(result, Contents):
            self._contents = result
        else:
            self._error = result
        self._finished.set()


class Opening:
    """Verifies and reads an open memory. A job of the library's thread."""

    is_awaited = True

    def __init__(self, store: MemoryStore, opened: OpenMemory) -> None:
        self._store, self._opened = store, opened
        self._key = (opened.tenant, opened.name)

    def delay(self, now: float) -> float:
        return 0.0

    def run(self) -> None:
        if self._opened.error is None:  # Else it was released meanwhile.
            self._finish(self._store.contents(self._key, self._opened.manifest))

    def fail(self, error: Exception) -> None:
        if not isinstance(error, MemoryLibraryError):
            reason = f"the memory '{self._opened.name}' cannot be read ({type(error).__name__}: {error})"
            error = MemoryLibraryError(reason)
        self._finish(error)

    def _finish(self, result: Contents | MemoryLibraryError) -> None:
        with self._store.lock:
            if self._opened.error is not None:
                return  # Released: that files are missing says nothing.
            if isinstance(result, MemoryDamagedError):
                self._store.catalogue.note_damage(self._key, self._opened.manifest, str(result))
            elif isinstance(result, Contents):
                self._store.catalogue.note_damage(self._key, self._opened.manifest, None)
            self._opened.finish(result)
