"""The library's folders on disk: ``<root>/<tenant>/<name>/``, and the lock of the one who writes.

A folder is a memory exactly if it has a manifest, so memories appear and vanish with that one file
and data files never move: readers of a deleted memory keep their paths. Data files that no
manifest, reader or writer refers to are leftovers; only files named as this package names them
are ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from memlong_vllm.memories import manifest as manifests
from memlong_vllm.memories.catalogue import Found, Key
from memlong_vllm.memories.durable import UNFINISHED, sync
from memlong_vllm.memories.errors import (
    MemoryDamagedError,
    MemoryLibraryBusyError,
    MemoryLibraryError,
    MemoryNameError,
)
from memlong_vllm.memories.manifest import file_token, is_token
from memlong_vllm.memories.names import validate_name, validate_tenant

LOCK_NAME = ".lock"
_RANK_SUFFIX = re.compile(r"rank[0-9]+of[0-9]+\.safetensors")


def lock(root: Path) -> int:
    """Become the one process that writes to a library. Returns the lock's file descriptor.

    Raises:
        MemoryLibraryBusyError: if another has it.
        MemoryLibraryError: if the folder cannot be written to.
    """
    try:
        descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise MemoryLibraryError(f"{root}: cannot be used for memories: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        advice = "give each engine a folder of its own, or stop the other one first"
        raise MemoryLibraryBusyError(f"{root}: in use by another process (id {holder}): {advice}") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def unlock(descriptor: int) -> None:
    # Explicitly, because forked children may hold copies of the descriptor.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def read_manifest(folder: Path) -> Found | None:
    """A folder's manifest, what is wrong with it, or None if it has none."""
    file = folder / manifests.FILE_NAME
    try:
        with open(file, "rb", opener=_no_links) as opened:
            data = opened.read(manifests.MAX_BYTES + 1)
        if len(data) > manifests.MAX_BYTES:
            raise MemoryDamagedError(f"{file}: larger than {manifests.MAX_BYTES} bytes")
        found = manifests.decode(data, str(file))
        if found.name != folder.name:
            raise MemoryDamagedError(f"{file}: field 'name' is '{found.name}', not the folder's")
        return found
    except FileNotFoundError:
        return None
    except OSError as error:
        return MemoryDamagedError(f"{file}: {error.strerror or error}")
    except MemoryDamagedError as error:
        return error


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def folders(root: Path) -> Iterator[Key]:
    """All folders that are or were a memory's."""
    for tenant in _subfolders(root, validate_tenant):
        for name in _subfolders(root / tenant, validate_name):
            yield tenant, name


def _subfolders(folder: Path, validate: Callable[[str], str]) -> list[str]:
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(MemoryNameError):
                if entry.is_dir(follow_symlinks=False):
                    found.append(validate(entry.name))
    return sorted(found)


def data_files(folder: Path) -> list[str]:
    """Names of the files in a memory's folder that are named as data files are."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if _is_data_file(entry.name)]
    except FileNotFoundError:
        return []


def _is_data_file(name: str) -> bool:
    token, _, suffix = name.removesuffix(UNFINISHED).partition(".")
    is_known = suffix == manifests.CHUNKS_SUFFIX[1:] or _RANK_SUFFIX.fullmatch(suffix) is not None
    return is_token(token) and is_known


def remove_unused(folder: Path, listed: list[str], used: set[str]) -> list[str]:
    """Remove those of the ``listed`` files whose names begin with none of the tokens ``used``.

    Returns:
        The names of the removed.
    """
    removed = [name for name in listed if file_token(name) not in used]
    for name in removed:
        with contextlib.suppress(OSError):
            os.unlink(folder / name)
    return removed


def remove_folder(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_manifest(folder: Path) -> None:
    """Make a memory vanish, at once and durably.

    Raises:
        OSError: if it cannot be removed.
    """
    (folder / manifests.FILE_NAME).unlink()
    sync(folder)


def remove_unfinished_manifest(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (folder / (manifests.FILE_NAME + UNFINISHED)).unlink()
