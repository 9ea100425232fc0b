"""Archives of memories on their way in and out, by way of files beside the library."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from memlong_vllm.endpoints.errors import EndpointError, library_error
from memlong_vllm.memories.errors import MemoryDamagedError, MemoryLibraryError
from memlong_vllm.memories.manifest import MAX_BYTES
from memlong_vllm.memories.named_library import MemoryLibrary

# In the library's folder: a tenant's folder is never called so.
FOLDER = ".uploads"
_FILE = "memory.tar"
_BUFFER_BYTES = 1 << 20
# Of an archive beside its data files: the manifest and the tar file's headers.
_SLACK_BYTES = MAX_BYTES + (1 << 20)


class ArchiveResponse(FileResponse):
    """A file that is removed when it was sent, or was not."""

    def __init__(self, path: Path, name: str, transfer: ExitStack) -> None:
        super().__init__(path, media_type="application/x-tar", filename=f"{name}.tar")
        self._transfer = transfer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._transfer.close()


class ArchiveTransfers:
    """One transfer of an archive for each tenant at a time.

    Args:
        memory_dir: the library's folder, or None if it has none of its own.
        max_bytes: a tenant's quota, or None.
    """

    def __init__(self, memory_dir: str | None, max_bytes: int | None) -> None:
        self._root = None if memory_dir is None else Path(memory_dir).absolute()
        self._max_bytes = None if max_bytes is None else max_bytes + _SLACK_BYTES
        self._busy: set[str] = set()

    def remove_leftovers(self) -> None:
        """Remove the files of servers that were killed."""
        if self._root is None or not (self._root / FOLDER).is_dir():
            return
        for folder in (self._root / FOLDER).iterdir():
            with contextlib.suppress(OSError), _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)

    async def receive(self, tenant: str, body: AsyncIterator[bytes], length: int) -> tuple[Path, ExitStack]:
        """Write an archive to a file.

        Args:
            length: of the body in bytes as the client says, or 0.

        Returns:
            The file, and what is to be closed when it was used.

        Raises:
            EndpointError: if it is too large, or the tenant transfers another one.
        """
        path, transfer = self._begin(tenant)
        try:
            self._check_size(length)
            await self._write(path, body)
        except BaseException as error:
            transfer.close()
            if isinstance(error, OSError):
                raise _disk_error(error) from error
            raise
        return path, transfer

    async def send(self, tenant: str, name: str) -> ArchiveResponse:
        """Read a memory from the library's folder, which the engine goes on using.

        Raises:
            EndpointError: if there is no such memory, or it cannot be read; or the tenant
                transfers another one.
        """
        path, transfer = self._begin(tenant)
        try:
            await run_in_threadpool(self._export, tenant, name, path)
        except BaseException as error:
            transfer.close()
            if isinstance(error, MemoryLibraryError):
                raise library_error(str(error), type(error).__name__) from error
            raise
        return ArchiveResponse(path, name, transfer)

    def _begin(self, tenant: str) -> tuple[Path, ExitStack]:
        if self._root is None:
            rule = "archives need a server with memory_dir: its memories end with it"
            raise EndpointError(409, rule, "MemoryLibraryError")
        if tenant in self._busy:
            raise EndpointError(409, "another archive is being transferred: wait for it", "MemoryLibraryBusyError")
        folder = self._root / FOLDER / secrets.token_hex(16)
        transfer = ExitStack()
        try:
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700)
            transfer.callback(shutil.rmtree, folder, ignore_errors=True)
            transfer.enter_context(_locked(folder))
        except OSError as error:
            transfer.close()
            raise _disk_error(error) from error
        self._busy.add(tenant)
        transfer.callback(self._busy.discard, tenant)
        return folder / _FILE, transfer

    def _check_size(self, size: int) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            rule = f"the archive has more than the {self._max_bytes} bytes that the quota allows"
            raise EndpointError(413, rule, "QuotaExceededError")

    async def _write(self, path: Path, body: AsyncIterator[bytes]) -> None:
        buffer, size = bytearray(), 0
        with path.open("xb") as file:
            async for data in body:
                buffer += data
                size += len(data)
                self._check_size(size)
                if len(buffer) >= _BUFFER_BYTES:
                    await run_in_threadpool(file.write, bytes(buffer))
                    buffer.clear()
            await run_in_threadpool(file.write, bytes(buffer))

    def _export(self, tenant: str, name: str, path: Path) -> None:
        assert self._root is not None
        with MemoryLibrary(self._root, None, None, read_only=True) as library:
            try:
                library.export_archive(tenant, name, path)
            except MemoryDamagedError:
                library.info(tenant, name)  # Not damaged but deleted meanwhile: UnknownMemoryError.
                raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process. Raises OSError if another has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _disk_error(error: OSError) -> EndpointError:
    status = 507 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 500
    return EndpointError(status, f"the archive cannot be written: {error.strerror}", "MemoryLibraryError")
