"""Files that a crash leaves whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

UNFINISHED = ".tmp"


def sync(path: str | Path) -> None:
    """Bring a file's contents, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish(unfinished: str | Path, path: str | Path) -> None:
    """Give a file that was written under another name of the same folder its own, durably."""
    sync(unfinished)
    os.replace(unfinished, path)
    sync(Path(path).parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file, or replace it, at once.

    Raises:
        OSError: the file is then as it was before, unless only the last sync of the folder failed.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        unfinished.write_bytes(data)
        finish(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def make_folders(path: Path) -> None:
    """Make a folder and those above it, readable by their owner only, durably."""
    if not path.is_dir():
        make_folders(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        sync(path.parent)


def file_sha256(path: str | Path) -> str:
    """64 hexadecimal digits.

    Raises:
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
