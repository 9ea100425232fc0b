"""Named memories on disk: listing, writing, opening, deleting, carrying them elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from memlong_vllm.memories import folders
from memlong_vllm.memories.archive import ArchiveReader, write_archive
from memlong_vllm.memories.catalogue import Key, MemoryInfo, Reservation, format_problem
from memlong_vllm.memories.contents import read_chunks
from memlong_vllm.memories.durable import make_folders
from memlong_vllm.memories.errors import (
    MemoryDamagedError,
    MemoryExistsError,
    MemoryFormatError,
    MemoryLibraryError,
    MemoryWriteError,
    UnknownMemoryError,
)
from memlong_vllm.memories.index_settings import check_index_settings
from memlong_vllm.memories.manifest import Manifest, Parameter, check_index
from memlong_vllm.memories.memory_format import MemoryFormat
from memlong_vllm.memories.names import validate_name, validate_tenant
from memlong_vllm.memories.pending import PendingWrite, new_token
from memlong_vllm.memories.quota import Quota
from memlong_vllm.memories.snapshot import Opening, OpenMemory
from memlong_vllm.memories.store import MemoryStore, WriteFailure
from memlong_vllm.memories.tickets import Tickets

CLOSE_TIMEOUT_S = 10.0


class MemoryLibrary:
    """The named memories under ``root``, of all tenants.

    Tenants are given by their folder, see :func:`memlong_vllm.memories.names.tenant_folder`. All
    methods are thread-safe. Those that take time return at once and go on on the library's own
    thread, but for :meth:`export_archive` and :meth:`import_archive`. Every method that takes a
    name raises MemoryNameError if it is not valid.

    Attributes:
        tickets: calls of methods that block, on threads of their own. :meth:`close` waits for them.

    Args:
        root: made if missing, unless ``read_only``.
        format: the engine's. None for a process that has no engine: it can list, export and
            delete, but neither open nor write nor import.
        quota: limits of each tenant, or None.
        read_only: list, open and export what another process may be writing. Nothing keeps that
            process from deleting what is open here.

    Raises:
        MemoryLibraryBusyError: if another process has the library, unless ``read_only``.
        MemoryLibraryError: if the folder cannot be used.
    """

    def __init__(self, root: Path, format: MemoryFormat | None, quota: Quota | None, read_only: bool = False) -> None:
        self._root = Path(root).absolute()
        self._quota, self._read_only = quota, read_only
        self._lock: int | None = None
        self._closed = False
        self.tickets = Tickets()
        if not read_only:
            try:
                make_folders(self._root)
            except OSError as error:
                raise MemoryLibraryError(f"{root}: cannot be used for memories: {error.strerror}") from error
            self._lock = folders.lock(self._root)
        self._store = MemoryStore(self._root, format)
        if not read_only:
            self._load()

    def _load(self) -> None:
        try:
            self._store.load()
            self._store.collect_garbage()
        except OSError as error:
            self.close()
            raise MemoryLibraryError(f"{self._root}: cannot be used for memories: {error}") from error

    def __enter__(self) -> MemoryLibrary:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Finish what can be finished within ``timeout`` seconds and let others have the library.
        What cannot fails; memories are whole in any case."""
        if self._closed:
            return
        self._closed = True
        self._store.background.flush(timeout)
        reason = MemoryWriteError("the memory library was closed")
        has_ended = self.tickets.stop(CLOSE_TIMEOUT_S)
        has_ended = self._store.background.stop(reason, CLOSE_TIMEOUT_S) and has_ended
        if has_ended and self._lock is not None:  # Else it may still write: the lock ends with the process.
            folders.unlock(self._lock)
            self._lock = None

    @property
    def format(self) -> MemoryFormat | None:
        """The engine's, if there is one."""
        return self._store.made

    def tenants(self) -> list[str]:
        """Folders of the tenants that have memories."""
        return sorted({tenant for tenant, _ in folders.folders(self._root)})

    def names(self, tenant: str) -> list[MemoryInfo]:
        """A tenant's memories, by name; also those that cannot be used, with the reason."""
        validate_tenant(tenant)
        self._refresh(tenant)
        with self._store.lock:
            return self._store.catalogue.infos(tenant, self._store.made)

    def info(self, tenant: str, name: str) -> MemoryInfo:
        """One memory, as :meth:`names` lists it.

        Raises:
            UnknownMemoryError: if there is none.
        """
        key = self._key(tenant, name)
        with self._store.lock:
            if self._store.catalogue.find(key) is None:
                raise UnknownMemoryError(f"there is no memory named '{name}'")
            return self._store.catalogue.info(key, self._store.made)

    def is_known(self, tenant: str, name: str) -> bool:
        """Whether there is a memory of this name, or a write that may make it."""
        key = self._key(tenant, name)
        with self._store.lock:
            return self._store.catalogue.find(key) is not None or bool(self._store.catalogue.writes(key))

    def is_written(self, tenant: str, name: str) -> bool:
        """Whether a write to this name is under way."""
        key = self._key(tenant, name)
        with self._store.lock:
            return bool(self._store.catalogue.writes(key))

    def manifest(self, tenant: str, name: str) -> Manifest:
        """What a memory consists of now; its files were not checked.

        Raises:
            UnknownMemoryError, MemoryDamagedError
        """
        key = self._key(tenant, name)
        with self._store.lock:
            return self._store.catalogue.get(key, None)

    def begin_write(self, tenant: str, name: str, max_chunks: int) -> PendingWrite:
        """Start to append to a memory, or to make it.

        Args:
            max_chunks: chunks the write may have; their bytes count from now on.

        Raises:
            MemoryFormatError, MemoryDamagedError: if the memory exists and cannot be appended to.
            MemoryExistsError: if a memory is being imported under this name.
            QuotaExceededError: with the numbers.
        """
        key, made = self._key(tenant, name), self._format()
        self._require_writable()
        if type(max_chunks) is not int or max_chunks < 1:
            raise MemoryWriteError(f"max_chunks = {max_chunks!r}: must be a positive integer")
        write = Reservation(max_chunks * made.chunk_bytes)
        with self._store.lock:
            catalogue = self._store.catalogue
            if catalogue.find(key) is not None:
                catalogue.get(key, made)
            if damage := catalogue.damage(key):
                raise MemoryDamagedError(damage)
            if any(other.is_import for other in catalogue.writes(key)):
                raise MemoryExistsError(f"a memory is being imported as '{name}'")
            self._reserve(key, write)
        self._make_folder(key, write)
        return PendingWrite(self._store, key, made, max_chunks, write)

    def is_busy(self, tenant: str, name: str) -> bool:
        """Whether commits to this name are under way."""
        return self._store.background.num_jobs(self._key(tenant, name, refresh=False)) > 0

    def take_failures(self) -> list[WriteFailure]:
        """Commits that failed since the last call."""
        with self._store.lock:
            failures, self._store.failures = self._store.failures, []
        return failures

    def flush(self, timeout: float) -> bool:
        """Wait until all commits, openings and removals of files are done, ``timeout`` seconds at
        most. Returns whether they are."""
        return self._store.background.flush(timeout)

    def open(self, tenant: str, name: str) -> OpenMemory:
        """Open the memory as it is now; commits under way are not in it.

        Returns:
            A memory that becomes ready, or has an error, soon. It must be released.

        Raises:
            UnknownMemoryError, MemoryFormatError
            MemoryDamagedError: if already the manifest cannot be read.
        """
        key, made = self._key(tenant, name), self._format()
        with self._store.lock:
            manifest = self._store.catalogue.get(key, made)
            self._store.catalogue.pin(key, manifest)
        opened = OpenMemory(self._store, key, manifest)
        self._store.background.submit(Opening(self._store, opened))
        return opened

    def release(self, opened: OpenMemory) -> None:
        """Give an open memory back. Files that only it used are removed. Without effect the second
        time."""
        key = (opened.tenant, opened.name)
        with self._store.lock:
            may_remove = opened.drop() and self._store.catalogue.unpin(key, opened.manifest)
        if may_remove and not self._read_only:
            self._store.sweep_soon(key)

    def delete(self, tenant: str, name: str) -> None:
        """Delete a memory, damaged ones too, and fail the writes to it.

        The name is free when this returns. Open snapshots go on; files are removed with the last.

        Raises:
            UnknownMemoryError: if there is neither a memory nor a write to one.
            MemoryLibraryError: if the disk refuses.
        """
        key = self._key(tenant, name)
        self._require_writable()
        with self._store.lock:
            if self._store.catalogue.find(key) is None and not self._store.catalogue.writes(key):
                raise UnknownMemoryError(f"there is no memory named '{name}'")
        try:
            self._store.remove(key, f"the memory '{name}' was deleted while it was being written")
        except OSError as error:
            raise MemoryLibraryError(f"the memory '{name}' cannot be deleted: {error}") from error

    def set_index(self, tenant: str, name: str, factory: str, parameters: dict[str, Parameter]) -> None:
        """Record by which FAISS index the memory's embeddings are to be searched.

        Args:
            factory: FAISS's index factory string, for example ``"IVF256,Flat"``; not built here.
            parameters: settings of the index, by name.

        Raises:
            UnknownMemoryError, MemoryDamagedError
            MemoryLibraryError: if an argument has another type, or the disk refuses.
        """
        key = self._key(tenant, name)
        self._require_writable()
        if problem := check_index(factory, parameters):
            raise MemoryLibraryError(problem)

        def change(found: Manifest | None) -> Manifest:
            if found is None:
                raise UnknownMemoryError(f"there is no memory named '{name}'")
            return replace(found, updated=time.time(), index_factory=factory, index_parameters=dict(parameters))

        self._publish(key, None, change)

    def export_archive(self, tenant: str, name: str, target_path: Path) -> None:
        """Write the memory, as it is now, to a tar file. Blocks; replaces what is there.

        Raises:
            UnknownMemoryError
            MemoryDamagedError: naming the file. Nothing is then written.
            MemoryLibraryError: if the target cannot be written.
        """
        key = self._key(tenant, name)
        with self._store.lock:
            manifest = self._store.catalogue.get(key, None)
            self._store.catalogue.pin(key, manifest)
        try:
            write_archive(self._store.folder(key), manifest, Path(target_path))
        except OSError as error:
            raise MemoryLibraryError(f"{target_path}: cannot be written: {error}") from error
        finally:
            with self._store.lock:
                may_remove = self._store.catalogue.unpin(key, manifest)
            if may_remove and not self._read_only:
                self._store.sweep_soon(key)

    def import_archive(self, tenant: str, name: str, source_path: Path) -> MemoryInfo:
        """Make a memory of what :meth:`export_archive` wrote, here or elsewhere. Blocks.

        The archive is not trusted: the name appears only after everything was checked.

        Raises:
            MemoryExistsError: if there is a memory of this name, or a write to one.
            MemoryFormatError, QuotaExceededError
            MemoryDamagedError: naming what is wrong with the archive.
            IndexSettingsError: if its index is none that may be asked for.
            MemoryLibraryError: if the archive cannot be read, or the disk refuses.
        """
        key, made = self._key(tenant, name), self._format()
        self._require_writable()
        self._require_absent(key)
        try:
            archive = ArchiveReader(Path(source_path))
        except OSError as error:
            raise MemoryLibraryError(f"{source_path}: cannot be read: {error.strerror}") from error
        try:
            if problem := format_problem(name, archive.manifest, made):
                raise MemoryFormatError(problem)
            write = Reservation(archive.manifest.num_bytes, is_import=True)
            with self._store.lock:
                self._require_absent(key)
                self._reserve(key, write)
            self._make_folder(key, write)
            self._import(key, write, archive)
        finally:
            archive.close()
        return self.info(tenant, name)

    def _import(self, key: Key, write: Reservation, archive: ArchiveReader) -> None:
        folder, made = self._store.folder(key), self._format()
        tokens = {token: new_token(self._store, write) for token in archive.manifest.tokens}
        try:
            manifest = archive.extract(folder, tokens)
            self._store.verifier.verify(folder, manifest)
            for part in manifest.parts:
                read_chunks(folder, part, made)
            check_index_settings(manifest.index_factory, manifest.index_parameters)
            self._publish(key, write, lambda _: replace(manifest, name=key[1], updated=time.time()))
        except BaseException as error:
            self._store.give_up(key, write)
            if isinstance(error, OSError):
                raise MemoryLibraryError(f"the memory '{key[1]}' cannot be imported: {error}") from error
            raise

    def _publish(self, key: Key, write: Reservation | None, change: Callable[[Manifest | None], Manifest]) -> None:
        try:
            self._store.publish(key, write, change)
        except OSError as error:
            raise MemoryLibraryError(f"the memory '{key[1]}' cannot be written: {error}") from error

    def _require_absent(self, key: Key) -> None:
        with self._store.lock:
            if self._store.catalogue.find(key) is not None or self._store.catalogue.writes(key):
                raise MemoryExistsError(f"there is a memory named '{key[1]}' already")

    def _reserve(self, key: Key, write: Reservation) -> None:
        """With the lock held: room for a write, or QuotaExceededError."""
        catalogue = self._store.catalogue
        is_new = catalogue.find(key) is None and not catalogue.writes(key)
        if self._quota is not None:
            catalogue.usage(key[0]).check(self._quota, write.num_bytes, int(is_new))
        catalogue.reserve(key, write)

    def _make_folder(self, key: Key, write: Reservation) -> None:
        folder = self._store.folder(key)
        try:
            if folder.is_symlink() or folder.parent.is_symlink():
                raise OSError(f"{folder} is not a folder of the library's own")
            make_folders(folder)
        except OSError as error:
            with self._store.lock:
                self._store.catalogue.end(key, write)
            raise MemoryLibraryError(f"the memory '{key[1]}' cannot be written: {error}") from error

    def _key(self, tenant: str, name: str, refresh: bool = True) -> Key:
        key = validate_tenant(tenant), validate_name(name)
        if refresh:
            self._refresh(tenant)
        return key

    def _refresh(self, tenant: str) -> None:
        if self._closed:
            raise MemoryLibraryError("the memory library was closed")
        if self._read_only:
            self._store.load(tenant)

    def _format(self) -> MemoryFormat:
        if self._store.made is None:
            raise MemoryLibraryError("memories cannot be read or written without the model they are for")
        return self._store.made

    def _require_writable(self) -> None:
        if self._read_only:
            raise MemoryLibraryError("the memory library was opened for reading only")
