"""What the library holds and who uses it. Decides and counts; touches no file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from memlong_vllm.memories.errors import MemoryDamagedError, MemoryFormatError, UnknownMemoryError
from memlong_vllm.memories.manifest import Manifest, file_token
from memlong_vllm.memories.memory_format import MemoryFormat
from memlong_vllm.memories.quota import Usage

Key = tuple[str, str]  # Tenant's folder and name.
Found = Manifest | MemoryDamagedError


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """A memory as it is listed.

    Attributes:
        num_bytes: of its data files.
        created, updated: Unix time in seconds; 0 if its manifest cannot be read.
        error: why it cannot be used (damaged, or of another format), or None.
    """

    name: str
    num_chunks: int
    num_tokens: int
    num_bytes: int
    created: float
    updated: float
    error: str | None


def describe(name: str, found: Found, made: MemoryFormat | None, damage: str | None = None) -> MemoryInfo:
    """List a memory for an engine of the format ``made``, or for none in particular."""
    if isinstance(found, MemoryDamagedError):
        return MemoryInfo(name, 0, 0, 0, 0.0, 0.0, str(found))
    num_chunks, num_bytes = found.num_chunks, found.num_bytes
    error = damage or format_problem(name, found, made)
    num_tokens = num_chunks * found.format.chunk_size
    return MemoryInfo(name, num_chunks, num_tokens, num_bytes, found.created, found.updated, error)


def format_problem(name: str, manifest: Manifest, made: MemoryFormat | None) -> str | None:
    """Why an engine of the format ``made`` cannot use a memory, if so."""
    differences = made.mismatches(manifest.format) if made is not None else []
    if not differences:
        return None
    return f"the memory '{name}' does not fit this engine; here and there differ: {'; '.join(differences)}"


@dataclass(slots=True, eq=False)
class Reservation:
    """A write under way: bytes it may take and the tokens of the files it makes. Equal to itself only."""

    num_bytes: int
    is_import: bool = False
    tokens: set[str] = field(default_factory=set)
    refusal: str | None = None  # Why it can no longer succeed.


class Catalogue:
    """Memories, the snapshots that are open and the writes under way.

    Not thread-safe: the library's lock is held around every call.
    """

    def __init__(self) -> None:
        self._memories: dict[Key, Found] = {}
        self._damage: dict[Key, str] = {}
        self._open: dict[Key, dict[str, Manifest]] = {}
        self._num_open: Counter[str] = Counter()
        self._writes: dict[Key, list[Reservation]] = {}

    def put(self, key: Key, found: Found) -> None:
        """Add a memory or its new state, which has the files of the old."""
        self._memories[key] = found

    def remove(self, key: Key, reason: str) -> None:
        """A memory is gone; writes to it can no longer succeed."""
        self._memories.pop(key, None)
        self._damage.pop(key, None)
        for write in self._writes.get(key, ()):
            write.refusal = reason

    def find(self, key: Key) -> Found | None:
        return self._memories.get(key)

    def clear(self, tenant: str) -> None:
        """Forget a tenant's memories, to list them anew."""
        for key in [key for key in self._memories if key[0] == tenant]:
            del self._memories[key]

    def get(self, key: Key, made: MemoryFormat | None) -> Manifest:
        """A memory that an engine of the format ``made`` can use.

        Raises:
            UnknownMemoryError, MemoryDamagedError, MemoryFormatError
        """
        found = self._memories.get(key)
        if found is None:
            raise UnknownMemoryError(f"there is no memory named '{key[1]}'")
        if isinstance(found, MemoryDamagedError):
            raise MemoryDamagedError(str(found))
        if problem := format_problem(key[1], found, made):
            raise MemoryFormatError(problem)
        return found

    def note_damage(self, key: Key, manifest: Manifest, reason: str | None) -> None:
        """A state of a memory was found damaged, or whole (None)."""
        current = self._memories.get(key)
        if not isinstance(current, Manifest):
            return
        if reason is not None and manifest.tokens <= current.tokens:
            self._damage[key] = reason
        elif reason is None and manifest.version == current.version:
            self._damage.pop(key, None)

    def damage(self, key: Key) -> str | None:
        return self._damage.get(key)

    def infos(self, tenant: str, made: MemoryFormat | None) -> list[MemoryInfo]:
        """A tenant's memories, by name."""
        keys = sorted(key for key in self._memories if key[0] == tenant)
        return [self.info(key, made) for key in keys]

    def info(self, key: Key, made: MemoryFormat | None) -> MemoryInfo:
        return describe(key[1], self._memories[key], made, self._damage.get(key))

    def tenants(self) -> list[str]:
        return sorted({tenant for tenant, _ in self._memories})

    def pin(self, key: Key, manifest: Manifest) -> None:
        """A snapshot is open: its files stay."""
        self._open.setdefault(key, {})[manifest.version] = manifest
        self._num_open[manifest.version] += 1

    def unpin(self, key: Key, manifest: Manifest) -> bool:
        """A snapshot was released. Returns whether files may have become unused."""
        self._num_open[manifest.version] -= 1
        if self._num_open[manifest.version]:
            return False
        del self._num_open[manifest.version]
        del self._open[key][manifest.version]
        if not self._open[key]:
            del self._open[key]
        current = self._memories.get(key)
        return not (isinstance(current, Manifest) and manifest.tokens <= current.tokens)

    def reserve(self, key: Key, write: Reservation) -> None:
        self._writes.setdefault(key, []).append(write)

    def end(self, key: Key, write: Reservation) -> None:
        """A write is over, one way or the other."""
        self._writes[key].remove(write)
        if not self._writes[key]:
            del self._writes[key]

    def writes(self, key: Key) -> list[Reservation]:
        return list(self._writes.get(key, ()))

    def usage(self, tenant: str) -> Usage:
        reserved = sum(write.num_bytes for key, writes in self._writes.items() if key[0] == tenant for write in writes)
        names = {key for key in self._memories.keys() | self._writes.keys() if key[0] == tenant}
        num_bytes = sum(self._kept_bytes(key) for key in self._memories.keys() | self._open.keys() if key[0] == tenant)
        return Usage(num_bytes + reserved, reserved, len(names))

    def _kept_bytes(self, key: Key) -> int:
        """Bytes of the current state and of what only open snapshots keep."""
        current = self._memories.get(key)
        kept = current if isinstance(current, Manifest) else None
        tokens = kept.tokens if kept else frozenset()
        older = [manifest for manifest in self._open.get(key, {}).values() if not manifest.tokens <= tokens]
        lingering = {file for manifest in older for file in manifest.files() if file_token(file.name) not in tokens}
        return (kept.num_bytes if kept else 0) + sum(file.num_bytes for file in lingering)

    def tokens_in_use(self, key: Key) -> set[str] | None:
        """What the names of a folder's files may begin with, or None if that cannot be known."""
        if isinstance(self._memories.get(key), MemoryDamagedError):
            return None
        used = {token for write in self._writes.get(key, ()) for token in write.tokens}
        current = self._memories.get(key)
        kept = [*self._open.get(key, {}).values(), *([current] if isinstance(current, Manifest) else [])]
        return used.union(*(manifest.tokens for manifest in kept))

    def is_unused(self, key: Key) -> bool:
        """Whether a folder is needed by nobody."""
        return key not in self._memories and key not in self._open and key not in self._writes
