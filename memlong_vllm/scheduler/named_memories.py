"""What requests read from named memories and write to them, as the scheduler sees it.

The library of memories is on disk. A chunk that a retrieval chose is brought into a slot of the
bank, where other requests find it until the slot is needed; a chunk that a request completes is
copied from its slot to a new shard, and all of them become part of the memory when it has ended.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from memlong_vllm.memories.errors import MemoryWriteError
from memlong_vllm.memories.index import CorpusIndex
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.pending import PendingWrite
from memlong_vllm.memories.snapshot import OpenMemory
from memlong_vllm.plan import ChunkLoad, ChunkSave
from memlong_vllm.process_cpus import use_process_cpus
from memlong_vllm.request_settings import RequestSettings
from memlong_vllm.scheduler.events import NamedChunk
from memlong_vllm.scheduler.slots import Chunk, SlotPool

logger = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 10.0
# Of embeddings whose trained indexes are kept although nobody reads them.
_IDLE_BYTES = 1 << 30


@dataclass
class NamedUse:
    """What one request has to do with named memories; outlives preemption.

    Attributes:
        tenant: folder of the tenant.
        names: of the memories it reads; ``reads``: these, once they are open, in this order and as
            they were then; ``indexes``: of their embeddings.
        awaited: writes by requests that had ended when it came.
        write: the write under way, if any; ``shards``: what was saved for it so far, with the
            number of chunks in each; ``num_saved``: their sum.
        versions: what the memories it reads are, for as long as none of their files is lost.
        damage: why what it has read is not to be trusted, if so.
    """

    tenant: str
    names: tuple[str, ...]
    awaited: list[PendingWrite]
    write: PendingWrite | None
    reads: list[OpenMemory] = field(default_factory=list)
    indexes: list[Future[CorpusIndex]] = field(default_factory=list)
    shards: list[tuple[str, int]] = field(default_factory=list)
    num_saved: int = 0
    versions: tuple[str, ...] = ()
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class _IdleIndex:
    index: Future[CorpusIndex]
    embeddings: np.ndarray


@dataclass(frozen=True, slots=True)
class NamedIndex:
    """A memory's index as one request searches it: a search that fails ends that request only.

    Attributes:
        fail: called with the error.
    """

    index: CorpusIndex
    fail: Callable[[Exception], None]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`CorpusIndex.search`; nothing is found where that fails."""
        try:
            return self.index.search(queries, k)
        except Exception as error:  # noqa: BLE001 (FAISS raises all sorts, and the engine goes on)
            self.fail(error)
            shape = (len(queries), k)
            return np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)

    @property
    def num_bytes(self) -> int:
        """Of the embeddings."""
        return 4 * len(self.index) * self.index.dimension


class NamedMemories:
    """Reads and writes of all requests.

    Args:
        open_library: makes the library; called once, when it is first needed.
        pool: slots that chunks are brought into.
        chunk_size: tokens.
        num_ranks: tensor-parallel ranks, each of which writes its part of every shard.

    Attributes:
        num_loads: chunks brought into the bank so far; ``num_saves``: chunks saved.
        num_failed_writes: writes that were lost after their request had ended well.
    """

    def __init__(
        self, open_library: Callable[[], MemoryLibrary], pool: SlotPool, chunk_size: int, num_ranks: int
    ) -> None:
        self._open_library = open_library
        self._library: MemoryLibrary | None = None
        self._pool = pool
        self._chunk_size = chunk_size
        self._num_ranks = num_ranks
        self._resident: dict[tuple[str, int], Chunk] = {}
        self._indexes: dict[str, Future[CorpusIndex]] = {}
        self._index_users: Counter[str] = Counter()
        self._idle: OrderedDict[str, _IdleIndex] = OrderedDict()
        self._builder = ThreadPoolExecutor(1, "memlong-index", use_process_cpus)
        self._committer = ThreadPoolExecutor(1, "memlong-commit", use_process_cpus)
        self._commits: list[Future[None]] = []
        self._writes: dict[tuple[str, str], PendingWrite] = {}
        self._losses: Counter[str] = Counter()
        self._loads: list[ChunkLoad] = []
        self._saves: list[ChunkSave] = []
        self.num_loads = 0
        self.num_saves = 0
        self.num_failed_writes = 0

    @property
    def named_library(self) -> MemoryLibrary:
        if self._library is None:
            self._library = self._open_library()
        return self._library

    def begin(self, settings: RequestSettings, tenant: str, max_chunks: int) -> NamedUse | None:
        """Prepare what a request reads and writes; None if that is nothing.

        Args:
            max_chunks: the most it can write.

        Raises:
            MemoryLibraryError: if it may not write what it wants to, or there is nothing of a
                name that it reads.
        """
        if not settings.memory_read and settings.memory_write is None:
            return None
        under_way = {name: self._write_under_way(tenant, name) for name in settings.memory_read}
        for name, write_under_way in under_way.items():
            if write_under_way is None:
                self.named_library.info(tenant, name)
        write = None
        if settings.memory_write is not None:
            if max_chunks < 1:
                least = f"a chunk ({self._chunk_size} tokens)"
                raise MemoryWriteError(f"memory_write: prompt and answer together have less than {least}")
            write = self.named_library.begin_write(tenant, settings.memory_write, max_chunks)
        awaited = [pending for pending in under_way.values() if pending is not None]
        return NamedUse(tenant, settings.memory_read, awaited, write)

    def _write_under_way(self, tenant: str, name: str) -> PendingWrite | None:
        """The last write to a memory by a request that has ended, if it is still on its way."""
        write = self._writes.get((tenant, name))
        return None if write is None or write.is_done else write

    def is_ready(self, use: NamedUse) -> bool:
        """Whether everything a request reads can be searched.

        What was written by requests that ended before it came is part of it.

        Raises:
            MemoryLibraryError: if one of its memories cannot be read.
        """
        if not all(write.is_done for write in use.awaited):
            return False
        for name in use.names[len(use.reads) :]:
            use.reads.append(self.named_library.open(use.tenant, name))
        for memory in use.reads:
            if memory.error is not None:
                raise memory.error
        if not all(memory.ready for memory in use.reads):
            return False
        if not use.indexes:
            use.indexes = [self._index(memory) for memory in use.reads]
            use.versions = tuple(f"{memory.version} {self._losses[memory.version]}" for memory in use.reads)
        return all(index.done() for index in use.indexes)

    def _index(self, memory: OpenMemory) -> Future[CorpusIndex]:
        version = memory.version
        self._index_users[version] += 1
        if version in self._idle:
            self._indexes[version] = self._idle.pop(version).index
        if version not in self._indexes:
            # Of what is open now, not of the memory, which this reader may release before the others.
            settings = memory.index_factory, {name: int(value) for name, value in memory.index_parameters.items()}
            self._indexes[version] = self._builder.submit(CorpusIndex, memory.embeddings, *settings)
        return self._indexes[version]

    def indexes(self, use: NamedUse) -> list[NamedIndex]:
        """Of the memories a request reads, once :meth:`is_ready`.

        Raises:
            Exception: whatever building one raised.
        """
        return [
            NamedIndex(index.result(), partial(self._fail, use, memory))
            for memory, index in zip(use.reads, use.indexes, strict=True)
        ]

    def _fail(self, use: NamedUse, memory: OpenMemory, error: Exception) -> None:
        self._damage(use, memory, f"the memory '{memory.name}' cannot be searched: {error}")

    def _damage(self, use: NamedUse, memory: OpenMemory, reason: str) -> None:
        """The plan stands, but its request ends, and nothing that it computes is met again."""
        self._losses[memory.version] += 1
        use.damage = reason

    def borrow(self, use: NamedUse, chunk: NamedChunk) -> Chunk:
        """A chunk's slot, held once more for the caller; brought in with this step if need be."""
        memory = use.reads[chunk.memory]
        place = memory.location(chunk.row)
        resident = self._resident.get(place)
        if resident is not None:
            self._pool.hold(resident)
            return resident
        brought = self._pool.new()
        self._loads.append(ChunkLoad(brought.slot, *place))
        if missing := memory.missing_file(chunk.row):
            self._damage(use, memory, f"the memory '{memory.name}' was damaged while it was open: {missing} is gone")
            return brought
        self._resident[place] = brought
        brought.on_evict = lambda: self._forget(place)
        return brought

    def _forget(self, place: tuple[str, int]) -> None:
        del self._resident[place]

    def save(self, use: NamedUse, completed: Mapping[int, int]) -> None:
        """Save what a step completes and earlier ones, before a preemption, did not.

        Args:
            completed: {chunk id: slot}, ascending without gaps.
        """
        slots = tuple(slot for chunk_id, slot in completed.items() if chunk_id >= use.num_saved)
        if use.write is None or use.write.is_done or not slots:
            return
        try:
            path = use.write.new_shard_path()
        except MemoryWriteError:  # The memory was deleted meanwhile.
            return
        self._saves.append(ChunkSave(slots, path))
        use.shards.append((path, len(slots)))
        use.num_saved += len(slots)
        self.num_saves += len(slots)

    def take_transfers(self) -> tuple[tuple[ChunkLoad, ...], tuple[ChunkSave, ...]]:
        """What the step being planned brings in and saves."""
        transfers = tuple(self._loads), tuple(self._saves)
        self.num_loads += len(self._loads)
        self._loads, self._saves = [], []
        return transfers

    def end(self, use: NamedUse, token_ids: Sequence[int] | None, embeddings: Callable[[], np.ndarray]) -> bool:
        """A request has ended.

        Args:
            token_ids: of the whole sequence, or None if it did not end well: nothing is written.
            embeddings: [num_chunks, dimension] of its chunks. May block: called on a thread.

        Returns:
            Whether ``embeddings`` will be called.
        """
        for memory in use.reads[: len(use.indexes)]:
            self._index_users[memory.version] -= 1
            if not self._index_users[memory.version]:
                del self._index_users[memory.version]
                self._retire(self._indexes.pop(memory.version), memory)
        for memory in use.reads:
            self.named_library.release(memory)
        write = use.write
        if write is None:
            return False
        if token_ids is None or use.num_saved == 0 or write.is_done:
            write.abandon()
            return False
        size = self._chunk_size
        tokens = np.asarray(token_ids[: use.num_saved * size], dtype=np.int32).reshape(-1, size)
        self._commits = [commit for commit in self._commits if not commit.done()]
        self._commits.append(self._committer.submit(self._commit, write, tokens, embeddings, use.shards))
        self._writes = {key: other for key, other in self._writes.items() if not other.is_done}
        self._writes[write.tenant, write.name] = write
        return True

    def _retire(self, index: Future[CorpusIndex], memory: OpenMemory) -> None:
        """Keep an index that was or is being trained for whoever reads the memory next."""
        if index.done() and (index.exception() is not None or index.result().is_exact):
            return
        self._idle[memory.version] = _IdleIndex(index, memory.embeddings)
        num_bytes = sum(idle.embeddings.nbytes for idle in self._idle.values())
        while num_bytes > _IDLE_BYTES:
            num_bytes -= self._idle.popitem(last=False)[1].embeddings.nbytes

    def _commit(
        self,
        write: PendingWrite,
        token_ids: np.ndarray,
        embeddings: Callable[[], np.ndarray],
        shards: list[tuple[str, int]],
    ) -> None:
        try:
            write.commit(token_ids, embeddings(), shards, self._num_ranks)
        except Exception as error:  # noqa: BLE001 (whatever an embedder raises loses this write only)
            logger.error("The write to the memory %r was lost: %s", write.name, error)
            self.num_failed_writes += 1
            write.abandon()

    def stats(self) -> dict[str, float]:
        if self._library is not None:
            for failure in self._library.take_failures():
                logger.error("The write to the memory %r was lost: %s", failure.name, failure.reason)
                self.num_failed_writes += 1
        return {
            "named_chunks_resident": len(self._resident),
            "named_chunks_loaded": self.num_loads,
            "named_chunks_saved": self.num_saves,
            "failed_memory_writes": self.num_failed_writes,
        }

    def flush(self, timeout: float) -> bool:
        """Wait until the writes of requests that have ended are on disk or have failed."""
        _, missing = wait(self._commits, timeout)
        return not missing and (self._library is None or self._library.flush(timeout))

    def shutdown(self) -> None:
        """Finish the writes of requests that have ended, as far as that takes little time."""
        if not self.flush(_SHUTDOWN_TIMEOUT_S):
            logger.error("The engine ends before all writes to named memories were on disk: they are lost")
        self._builder.shutdown(wait=False, cancel_futures=True)
        self._committer.shutdown(wait=False, cancel_futures=True)
        if self._library is not None:
            self._library.close()
