"""Random use of the library against a dictionary of what each name should hold."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memlong_vllm.memories.errors import MemoryExistsError, UnknownMemoryError
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder
from memlong_vllm.memories.pending import PendingWrite
from memlong_vllm.memories.snapshot import OpenMemory
from tests.memory_files import (
    FORMAT,
    PLENTY,
    WAIT_S,
    commit,
    files_expected,
    files_under,
    opened,
    save_shards,
    seeds_in,
)

TENANTS = (tenant_folder(None), tenant_folder("salt"))
NAMES = ("a", "b", "c")
Key = tuple[str, str]
keys = st.tuples(st.sampled_from(TENANTS), st.sampled_from(NAMES))
ranks = st.sampled_from([1, 2])


class LibraryMachine(RuleBasedStateMachine):
    """``stored`` is what every name holds; writes and snapshots are kept over other operations."""

    @initialize()
    def make(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="memories-"))
        self.root = self.folder / "m"
        self.named_library = MemoryLibrary(self.root, FORMAT, PLENTY)
        self.stored: dict[Key, tuple[int, ...]] = {}
        self.writes: list[tuple[Key, PendingWrite, bool]] = []  # True: the name was deleted since.
        self.open: list[tuple[OpenMemory, tuple[int, ...]]] = []
        self.next_seed = 1

    def seeds(self, count: int) -> tuple[int, ...]:
        self.next_seed += count
        return tuple(range(self.next_seed - count, self.next_seed))

    @rule(key=keys)
    def begin(self, key: Key) -> None:
        self.writes.append((key, self.named_library.begin_write(*key, 3), False))

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), count=st.integers(1, 3), per_shard=st.integers(1, 3), num_ranks=ranks)
    def commit(self, data: st.DataObject, count: int, per_shard: int, num_ranks: int) -> None:
        key, write, is_refused = self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1)))
        seeds = self.seeds(count)
        if data.draw(st.booleans()):
            save_shards(write, self.seeds(1), 1, 1)  # Spare: not committed.
        commit(write, seeds, per_shard, num_ranks)
        assert self.named_library.flush(WAIT_S)
        assert len(self.named_library.take_failures()) == int(is_refused)
        if not is_refused:
            self.stored[key] = self.stored.get(key, ()) + seeds

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), num_ranks=ranks)
    def abandon(self, data: st.DataObject, num_ranks: int) -> None:
        _, write, _ = self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1)))
        save_shards(write, self.seeds(2), 1, num_ranks)
        write.abandon()

    @rule(key=keys)
    def delete(self, key: Key) -> None:
        if key not in self.stored and not any(key == other for other, _, _ in self.writes):
            with pytest.raises(UnknownMemoryError):
                self.named_library.delete(*key)
            return
        self.named_library.delete(*key)
        self.stored.pop(key, None)
        self.writes = [(other, write, gone or other == key) for other, write, gone in self.writes]

    @rule(key=keys)
    def open_snapshot(self, key: Key) -> None:
        if key in self.stored:
            self.open.append((opened(self.named_library, key[1], key[0]), self.stored[key]))
        else:
            with pytest.raises(UnknownMemoryError):
                self.named_library.open(*key)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        memory, seeds = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        assert seeds_in(memory) == seeds
        self.named_library.release(memory)

    @rule(key=keys)
    def open_and_release_at_once(self, key: Key) -> None:
        if key in self.stored:
            self.named_library.release(self.named_library.open(*key))

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), copied_to=keys)
    def copy(self, data: st.DataObject, copied_to: Key) -> None:
        source = data.draw(st.sampled_from(sorted(self.stored)))
        self.named_library.export_archive(*source, self.folder / "archive.tar")
        if copied_to in self.stored or any(copied_to == key for key, _, _ in self.writes):
            with pytest.raises(MemoryExistsError):
                self.named_library.import_archive(*copied_to, self.folder / "archive.tar")
        else:
            self.named_library.import_archive(*copied_to, self.folder / "archive.tar")
            self.stored[copied_to] = self.stored[source]

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), nlist=st.integers(1, 9))
    def set_index(self, data: st.DataObject, nlist: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.stored)))
        self.named_library.set_index(*key, f"IVF{nlist},Flat", {"nprobe": nlist})
        memory = opened(self.named_library, key[1], key[0])
        assert (memory.index_factory, memory.index_parameters) == (f"IVF{nlist},Flat", {"nprobe": nlist})
        self.named_library.release(memory)

    @rule()
    def reopen(self) -> None:
        self.named_library.close()
        self.writes, self.open = [], []
        self.named_library = MemoryLibrary(self.root, FORMAT, PLENTY)
        self.check_files()

    @invariant()
    def lists_what_is_stored(self) -> None:
        for tenant in TENANTS:
            infos = {(tenant, info.name): info for info in self.named_library.names(tenant)}
            assert {key: info.num_chunks for key, info in infos.items()} == {
                key: len(seeds) for key, seeds in self.stored.items() if key[0] == tenant
            }

    def check_files(self) -> None:
        assert self.named_library.flush(WAIT_S)
        assert files_under(self.root) == files_expected(self.named_library, self.root)
        for key, seeds in self.stored.items():
            memory = opened(self.named_library, key[1], key[0])
            assert seeds_in(memory) == seeds
            self.named_library.release(memory)

    def teardown(self) -> None:
        if not hasattr(self, "named_library"):
            return
        for memory, seeds in self.open:
            assert seeds_in(memory) == seeds
            self.named_library.release(memory)
        for _, write, _ in self.writes:
            write.abandon()
        self.check_files()
        usages = [self.named_library._store.catalogue.usage(tenant) for tenant in TENANTS]
        stored = [sum(info.num_bytes for info in self.named_library.names(tenant)) for tenant in TENANTS]
        assert [usage.num_bytes for usage in usages] == stored
        assert [usage.reserved for usage in usages] == [0, 0]
        self.named_library.close()
        shutil.rmtree(self.folder)


TestLibrary = LibraryMachine.TestCase
TestLibrary.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
