"""The catalogue and the disk, kept in step. What the library's parts share; not for its users."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memlong_vllm.memories import folders
from memlong_vllm.memories.background import Background
from memlong_vllm.memories.catalogue import Catalogue, Key, Reservation
from memlong_vllm.memories.contents import Verifier, read_chunks
from memlong_vllm.memories.durable import write_durably
from memlong_vllm.memories.errors import MemoryDamagedError, MemoryLibraryError, MemoryWriteError
from memlong_vllm.memories.manifest import FILE_NAME, MAX_BYTES, Manifest
from memlong_vllm.memories.memory_format import MemoryFormat

logger = logging.getLogger(__name__)

# A write was given up, but its plan may have reached the workers: they may write files until then.
LATE_WRITE_S = 60.0


@dataclass(frozen=True, slots=True)
class WriteFailure:
    """A write that did not become part of its memory, which is as it was before."""

    tenant: str
    name: str
    reason: str


class Contents:
    """Token ids [num_chunks, chunk_size] int32 and embeddings [num_chunks, dimension] float32 of
    a state of a memory. Read-only, shared by its readers."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        made = manifest.format
        self.token_ids = np.empty((manifest.num_chunks, made.chunk_size), np.int32)
        self.embeddings = np.empty((manifest.num_chunks, made.dimension), np.float32)
        start = 0
        for part in manifest.parts:
            rows = slice(start, start + part.num_chunks)
            self.token_ids[rows], self.embeddings[rows] = read_chunks(folder, part, made)
            start = rows.stop
        self.token_ids.flags.writeable = False
        self.embeddings.flags.writeable = False


class MemoryStore:
    """A library's state.

    Attributes:
        lock: held, briefly and never while touching files, around every use of ``catalogue`` and
            ``failures``.
        failures: writes that failed and nobody was told of yet.
        made: the engine's format, or None for one that only lists, exports and deletes.
    """

    def __init__(self, root: Path, made: MemoryFormat | None) -> None:
        self.root, self.made = root, made
        self.lock = threading.RLock()
        self.catalogue = Catalogue()
        self.verifier = Verifier()
        self.failures: list[WriteFailure] = []
        self.background = Background("memlong-memories")
        self._manifests = threading.Lock()  # Held while a manifest is replaced or removed.
        self._late: Counter[Key] = Counter()
        self._contents: weakref.WeakValueDictionary[str, Contents] = weakref.WeakValueDictionary()

    def folder(self, key: Key) -> Path:
        return self.root / key[0] / key[1]

    def load(self, tenant: str | None = None) -> None:
        """Read all manifests; or a tenant's again, which another process may have changed."""
        keys = [key for key in folders.folders(self.root) if tenant in (None, key[0])]
        found = [(key, folders.read_manifest(self.folder(key))) for key in keys]
        with self.lock:
            if tenant is not None:
                self.catalogue.clear(tenant)
            for key, memory in found:
                if memory is not None:
                    self.catalogue.put(key, memory)

    def collect_garbage(self) -> None:
        """Remove what a process that was killed has left. Nothing may be open or under way."""
        for key in folders.folders(self.root):
            folders.remove_unfinished_manifest(self.folder(key))
            self.sweep(key)
            folders.remove_folder(self.folder(key).parent)

    def publish(self, key: Key, write: Reservation | None, change: Callable[[Manifest | None], Manifest]) -> Manifest:
        """Replace a memory's manifest by what ``change`` makes of it, and end the write.

        Raises:
            MemoryWriteError: if the write can no longer succeed.
            MemoryDamagedError: if the manifest cannot be read.
            OSError: if the new one cannot be written. The old one is then still in place.
        """
        with self._manifests:
            with self.lock:
                if write is not None and write.refusal is not None:
                    raise MemoryWriteError(write.refusal)
                found = self.catalogue.find(key)
            if isinstance(found, MemoryDamagedError):
                raise MemoryDamagedError(str(found))
            manifest = change(found)
            self._write_manifest(key, manifest)
            with self.lock:
                self.catalogue.put(key, manifest)
                if write is not None:
                    self.catalogue.end(key, write)
        return manifest

    def _write_manifest(self, key: Key, manifest: Manifest) -> None:
        data = manifest.encode()
        if len(data) > MAX_BYTES:
            raise MemoryLibraryError(f"the memory '{key[1]}' has too many parts ({len(manifest.parts)})")
        try:
            write_durably(self.folder(key) / FILE_NAME, data)
        except OSError:
            # What counts is what a restart would find: it may be in place although a sync failed.
            if folders.read_manifest(self.folder(key)) != manifest:
                raise
            logger.exception("the manifest of a memory may not survive a power failure")

    def remove(self, key: Key, reason: str) -> None:
        """Delete a memory. Its files go when nobody reads them.

        Raises:
            OSError: if its manifest cannot be removed.
        """
        with self._manifests:
            with contextlib.suppress(FileNotFoundError):
                folders.remove_manifest(self.folder(key))
            with self.lock:
                self.catalogue.remove(key, reason)
        self.sweep_soon(key)

    def give_up(self, key: Key, write: Reservation) -> None:
        """End a write that did not succeed; its files go, also those that workers still write."""
        with self.lock:
            self.catalogue.end(key, write)
        self.sweep_late(key)
        self.sweep_soon(key)

    def sweep_late(self, key: Key) -> None:
        """Remove unused files once no worker can write more of them."""
        with self.lock:
            self._late[key] += 1
        self.background.submit(_LateSweep(self, key))

    def sweep_soon(self, key: Key) -> None:
        self.background.submit(_Sweep(self, key))

    def sweep(self, key: Key) -> None:
        """Remove the files of a folder that nobody refers to."""
        # Listed before asking who uses what: a file that comes later is not in the list, and one
        # that is unused now is never used again, as names are not.
        listed = folders.data_files(self.folder(key))
        with self.lock:
            used = self.catalogue.tokens_in_use(key)
        if used is None:
            return
        removed = folders.remove_unused(self.folder(key), listed, used)
        self.verifier.forget(self.folder(key), set(removed))
        with self.lock:
            if self.catalogue.is_unused(key) and not self._late[key]:
                folders.remove_folder(self.folder(key))

    def end_late(self, key: Key) -> None:
        """Workers write no more files for one of the writes that were given up."""
        with self.lock:
            self._late[key] -= 1
            if not self._late[key]:
                del self._late[key]
        self.sweep(key)

    def contents(self, key: Key, manifest: Manifest) -> Contents:
        """Verify a memory and read it.

        Raises:
            MemoryDamagedError: naming the file.
        """
        self.verifier.verify(self.folder(key), manifest)
        contents = self._contents.get(manifest.version)
        if contents is None:
            contents = Contents(self.folder(key), manifest)
            self._contents[manifest.version] = contents
        return contents


@dataclass(slots=True)
class _Sweep:
    store: MemoryStore
    key: Key
    is_awaited: bool = True

    def delay(self, now: float) -> float:
        return 0.0

    def run(self) -> None:
        self.store.sweep(self.key)

    def fail(self, error: Exception) -> None:
        logger.debug("unused files stay until the next start: %s", error)


class _LateSweep:
    is_awaited = False

    def __init__(self, store: MemoryStore, key: Key) -> None:
        self._store, self._key, self._due = store, key, time.monotonic() + LATE_WRITE_S

    def delay(self, now: float) -> float:
        return self._due - now

    def run(self) -> None:
        self._store.end_late(self._key)

    def fail(self, error: Exception) -> None:
        logger.debug("unused files stay until the next start: %s", error)
