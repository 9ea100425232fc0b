"""A memory as one file to carry elsewhere: an uncompressed tar of the manifest and its data files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from memlong_vllm.memories import manifest as manifests
from memlong_vllm.memories.durable import UNFINISHED, finish, sync
from memlong_vllm.memories.errors import MemoryDamagedError
from memlong_vllm.memories.manifest import Manifest, Part, StoredFile, file_token

_BLOCK_BYTES = 1 << 20


def write_archive(folder: Path, manifest: Manifest, target: Path) -> None:
    """Write a memory to ``target``, which appears complete or not at all and replaces what is there.

    Raises:
        MemoryDamagedError: naming the file that is not as it was written.
        OSError: if ``target`` cannot be written.
    """
    unfinished = target.with_name(target.name + UNFINISHED)
    try:
        with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
            data = manifest.encode()
            tar.addfile(_member(manifests.FILE_NAME, len(data)), io.BytesIO(data))
            for file in manifest.files():
                _add(tar, folder, file)
        finish(unfinished, target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def _add(tar: tarfile.TarFile, folder: Path, file: StoredFile) -> None:
    path = folder / file.name
    try:
        source = path.open("rb")
    except OSError as error:
        raise MemoryDamagedError(f"{path}: {error.strerror}") from error
    with source:
        if os.fstat(source.fileno()).st_size != file.num_bytes:
            raise MemoryDamagedError(f"{path}: does not have {file.num_bytes} bytes")
        if hashlib.file_digest(source, "sha256").hexdigest() != file.sha256:
            raise MemoryDamagedError(f"{path}: is not as it was written: its checksum differs")
        source.seek(0)
        tar.addfile(_member(file.name, file.num_bytes), source)


class ArchiveReader:
    """Reads an archive that anybody may have made. Nothing in it names a path.

    Attributes:
        manifest: the archive's, valid in itself; its files were not read yet.
    """

    def __init__(self, source: Path) -> None:
        """Open an archive.

        Raises:
            MemoryDamagedError: if it does not begin with a manifest.
            OSError: if the file cannot be opened.
        """
        self._source = source
        self._file = source.open("rb")
        self._next_header = 0
        try:
            self.manifest = self._read_manifest()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def extract(self, folder: Path, tokens: dict[str, str]) -> Manifest:
        """Write the data files to ``folder`` and check them against their checksums.

        Args:
            tokens: what each file's token becomes, so that no file of the folder can be meant.

        Returns:
            The manifest with the new names.

        Raises:
            MemoryDamagedError: naming the member that is missing, unexpected or damaged.
            OSError: if a file cannot be written.
        """
        missing = {file.name: file for file in self.manifest.files()}
        while (member := self._next()) is not None:
            file = missing.pop(member.name, None)
            if file is None:
                raise self._damaged(member, "is not a file of the memory, or there twice")
            self._check(member, file.num_bytes)
            old = file_token(file.name)
            self._extract(member, file, folder / (tokens[old] + file.name.removeprefix(old)))
        if missing:
            raise MemoryDamagedError(f"{self._source}: '{min(missing)}' is missing")
        sync(folder)
        return replace(self.manifest, parts=tuple(_renamed(part, tokens) for part in self.manifest.parts))

    def _read_manifest(self) -> Manifest:
        member = self._next()
        if member is None or member.name != manifests.FILE_NAME:
            raise MemoryDamagedError(f"{self._source}: does not begin with '{manifests.FILE_NAME}'")
        if member.size > manifests.MAX_BYTES:
            raise self._damaged(member, f"is larger than {manifests.MAX_BYTES} bytes")
        self._check(member, member.size)
        data = b"".join(self._blocks(member))
        return manifests.decode(data, f"{self._source}: {manifests.FILE_NAME}")

    def _next(self) -> tarfile.TarInfo | None:
        """The next member, a plain file. No TarFile, which reads what some headers of other types
        announce (long names, for one), however much that is."""
        with self._complaints():
            self._file.seek(self._next_header)
            header = self._file.read(tarfile.BLOCKSIZE)
            if header.count(0) == len(header):  # The end: zeros, or nothing.
                return None
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise self._damaged(member, "is not a plain file")
        if member.size < 0:
            raise self._damaged(member, "has a size below 0")
        member.offset_data = self._next_header + tarfile.BLOCKSIZE
        self._next_header = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return member

    def _check(self, member: tarfile.TarInfo, size: int) -> None:
        if member.size != size:
            raise self._damaged(member, f"has {member.size} bytes instead of {size}")

    def _extract(self, member: tarfile.TarInfo, file: StoredFile, target: Path) -> None:
        digest = hashlib.sha256()
        with target.open("xb") as output:
            for block in self._blocks(member):
                digest.update(block)
                output.write(block)
        if digest.hexdigest() != file.sha256:
            raise self._damaged(member, "is not as it was written: its checksum differs")
        sync(target)

    def _blocks(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        self._file.seek(member.offset_data)
        left = member.size
        while left:
            with self._complaints():
                block = self._file.read(min(left, _BLOCK_BYTES))
            if not block:
                raise self._damaged(member, "is cut short")
            left -= len(block)
            yield block

    def _damaged(self, member: tarfile.TarInfo, problem: str) -> MemoryDamagedError:
        return MemoryDamagedError(f"{self._source}: {member.name[:80]!a} {problem}")

    @contextlib.contextmanager
    def _complaints(self) -> Iterator[None]:
        """tarfile raises all sorts of errors on what is not an archive."""
        try:
            yield
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, ArithmeticError) as error:
            raise MemoryDamagedError(f"{self._source}: not an archive of a memory: {error}") from error


def _renamed(part: Part, tokens: dict[str, str]) -> Part:
    shards = tuple(replace(shard, path=tokens[shard.path]) for shard in part.shards)
    chunks_file = tokens[file_token(part.chunks_file)] + manifests.CHUNKS_SUFFIX
    return replace(part, chunks_file=chunks_file, shards=shards)
