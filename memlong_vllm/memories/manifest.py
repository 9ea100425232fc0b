"""The manifest of a memory: the one file that says what the memory is, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from memlong_vllm.memories.errors import MemoryDamagedError, MemoryNameError
from memlong_vllm.memories.memory_format import MemoryFormat
from memlong_vllm.memories.names import validate_name
from memlong_vllm.memories.shard_layout import shard_files
from memlong_vllm.memories.strict_json import StrictObject, load_object

FILE_NAME = "manifest.json"
VERSION = 1
MAX_BYTES = 64 << 20
MAX_RANKS = 1024
DEFAULT_FACTORY = "Flat"
CHUNKS_SUFFIX = ".chunks.safetensors"
_TOKEN = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FACTORY = re.compile(r"[ -~]{1,200}")

Parameter = str | int | float | bool


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A data file of a memory's folder, as it was written."""

    name: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A shard of ``num_chunks`` chunks. ``sha256`` and ``num_bytes`` are of its files, by rank."""

    path: str
    num_chunks: int
    ranks: int
    sha256: tuple[str, ...]
    num_bytes: tuple[int, ...]

    def files(self) -> Iterator[StoredFile]:
        yield from map(StoredFile, shard_files(self.path, self.ranks), self.sha256, self.num_bytes)


@dataclass(frozen=True, slots=True)
class Part:
    """What one write added: a file of token ids and embeddings, and the shards with its chunks."""

    chunks_file: str
    num_chunks: int
    sha256: str
    num_bytes: int
    shards: tuple[ShardEntry, ...]

    def files(self) -> Iterator[StoredFile]:
        yield StoredFile(self.chunks_file, self.sha256, self.num_bytes)
        for shard in self.shards:
            yield from shard.files()


@dataclass(frozen=True)
class Manifest:
    """What a memory is. Data files are never changed; an append adds a part.

    Attributes:
        created, updated: Unix time in seconds.
        index_factory: FAISS's index factory string for searching the embeddings.
        index_parameters: settings of that index, by name.
    """

    name: str
    created: float
    updated: float
    format: MemoryFormat
    parts: tuple[Part, ...]
    index_factory: str = DEFAULT_FACTORY
    index_parameters: dict[str, Parameter] = field(default_factory=dict)

    @cached_property
    def num_chunks(self) -> int:
        return sum(part.num_chunks for part in self.parts)

    @cached_property
    def num_bytes(self) -> int:
        """Of the data files."""
        return sum(file.num_bytes for file in self.files())

    def files(self) -> Iterator[StoredFile]:
        for part in self.parts:
            yield from part.files()

    @cached_property
    def tokens(self) -> frozenset[str]:
        """What the names of the data files begin with; unique to one shard or chunks file."""
        return frozenset(file_token(file.name) for file in self.files())

    @cached_property
    def version(self) -> str:
        """64 hexadecimal digits that no other state of any memory has."""
        return hashlib.sha256(_canonical(self._body())).hexdigest()

    def encode(self) -> bytes:
        """The file's contents: canonical JSON with the checksum of all the rest."""
        return _canonical(self._body() | {"sha256": self.version})

    def _body(self) -> dict[str, Any]:
        return {"format_version": VERSION} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def file_token(name: str) -> str:
    """The part of a data file's name that its memory refers to it by."""
    return name.partition(".")[0]


def is_token(text: str) -> bool:
    return _TOKEN.fullmatch(text) is not None


def check_index(factory: object, parameters: object) -> str | None:
    """What is wrong with the settings of an index, if anything."""
    if not isinstance(factory, str) or not _FACTORY.fullmatch(factory):
        return "the index factory must be 1 to 200 printable ASCII characters"
    if not isinstance(parameters, dict) or not all(isinstance(name, str) and name for name in parameters):
        return "index parameters must be an object of named values"
    for name, value in parameters.items():
        if type(value) is not int or not 0 < value < 1 << 31:
            return f"the index parameter {name[:40]!r} must be a positive integer"
    return None


def decode(data: bytes, file: str) -> Manifest:
    """Read a manifest. Only what :meth:`Manifest.encode` writes is accepted, byte for byte.

    Args:
        file: what errors call it.

    Raises:
        MemoryDamagedError: naming file and field.
    """
    top = load_object(data, file)
    if (version := top.take("format_version")) != VERSION or type(version) is not int:
        raise top.wrong("format_version", f"{VERSION} (this is the version that can be read)")
    manifest = _manifest(top)
    if top.matching("sha256", _SHA256) != manifest.version or manifest.encode() != data:
        raise MemoryDamagedError(f"{file}: field 'sha256' does not match: the file is not as it was written")
    return manifest


def _manifest(top: StrictObject) -> Manifest:
    parts = tuple(map(_part, top.objects("parts")))
    factory, parameters = top.take("index_factory"), top.take("index_parameters")
    if problem := check_index(factory, parameters):
        raise MemoryDamagedError(f"{top.file}: fields 'index_factory', 'index_parameters': {problem}")
    name = top.text("name")
    try:
        validate_name(name)
    except MemoryNameError as error:
        raise MemoryDamagedError(f"{top.file}: field 'name': {error}") from error
    created, updated = top.number("created"), top.number("updated")
    manifest = Manifest(name, created, updated, _format(top.object("format")), parts, factory, parameters)
    top.end("sha256")
    names = [file_token(file.name) for part in parts for file in part.files()]
    if not parts or len(set(names)) != sum(1 + len(part.shards) for part in parts):
        raise top.wrong("parts", "at least one, no two of which share a file")
    return manifest


def _format(entry: StrictObject) -> MemoryFormat:
    instruction = entry.take("query_instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise entry.wrong("query_instruction", "a string or null")
    values: dict[str, Any] = {name: entry.text(name) for name in ("model_fingerprint", "pooling", "dtype")}
    for name in ("max_length", "dimension", "chunk_size", "num_kv_heads", "head_dim"):
        values[name] = entry.count(name, 1)
    layer, probe = entry.count("memory_layer", 0), entry.numbers("probe")
    entry.end()
    try:
        return MemoryFormat(query_instruction=instruction, memory_layer=layer, probe=probe, **values)
    except ValueError as error:
        raise MemoryDamagedError(f"{entry.file}: field 'format': {error}") from error


def _part(entry: StrictObject) -> Part:
    chunks_file = entry.text("chunks_file")
    if not chunks_file.endswith(CHUNKS_SUFFIX) or not is_token(chunks_file.removesuffix(CHUNKS_SUFFIX)):
        raise entry.wrong("chunks_file", f"32 hexadecimal digits and {CHUNKS_SUFFIX!r}, without a path")
    num_chunks = entry.count("num_chunks", 1)
    sha256, num_bytes = entry.matching("sha256", _SHA256), entry.count("num_bytes", 1)
    shards = tuple(map(_shard, entry.objects("shards")))
    entry.end()
    if sum(shard.num_chunks for shard in shards) != num_chunks:
        raise entry.wrong("num_chunks", "the sum of its shards'")
    return Part(chunks_file, num_chunks, sha256, num_bytes, shards)


def _shard(entry: StrictObject) -> ShardEntry:
    path, ranks = entry.matching("path", _TOKEN), entry.count("ranks", 1)
    num_chunks = entry.count("num_chunks", 1)
    sums, sizes = entry.take("sha256"), entry.take("num_bytes")
    if ranks > MAX_RANKS:
        raise entry.wrong("ranks", f"at most {MAX_RANKS}")
    if not _is_list(sums, ranks) or not all(isinstance(s, str) and _SHA256.fullmatch(s) for s in sums):
        raise entry.wrong("sha256", "64 hexadecimal digits a rank")
    if not _is_list(sizes, ranks) or not all(type(size) is int and size > 0 for size in sizes):
        raise entry.wrong("num_bytes", "a number of bytes a rank")
    entry.end()
    return ShardEntry(path, num_chunks, ranks, tuple(sums), tuple(sizes))


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _plain(value: Any) -> Any:
    if isinstance(value, MemoryFormat):
        return asdict(value) | {"probe": list(map(float, value.probe))}
    if isinstance(value, tuple):
        return [asdict(item) for item in value]
    return value


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
