"""The library of named memories: writing, snapshots, deletion, quotas, tenants, formats."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memlong_vllm.memories import pending
from memlong_vllm.memories.errors import (
    MemoryLibraryError,
    MemoryWriteError,
    UnknownMemoryError,
)
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder
from memlong_vllm.memories.shards import write_shard
from tests.memory_files import (
    FORMAT,
    PLENTY,
    WAIT_S,
    Chunks,
    append,
    commit,
    files_expected,
    files_under,
    opened,
    read,
    reopen,
    save_shards,
    seeds_in,
)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened_library:
        yield opened_library


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_appended_is_read_back_also_by_the_next_process(library: MemoryLibrary) -> None:
    append(library, "a", 1, 2, 3)
    append(library, "a", 4)
    append(library, "b", 5)
    assert read(library, "a") == (1, 2, 3, 4)
    with reopen(library) as again:
        assert read(again, "a") == (1, 2, 3, 4)
        assert read(again, "b") == (5,)
        info = again.info("default", "a")
        assert (info.num_chunks, info.num_tokens, info.error) == (4, 16, None)
        sizes = sum(
            (again._root / f).stat().st_size for f in files_under(again._root) if "a/" in f and ".json" not in f
        )
        assert info.num_bytes == sizes
        assert 0 < info.created < info.updated <= time.time()
        assert [i.name for i in again.names("default")] == ["a", "b"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_shards_of_any_number_of_ranks_in_one_memory(library: MemoryLibrary, num_ranks: int) -> None:
    append(library, "a", 1, 2, 3, num_ranks=num_ranks)
    append(library, "a", 4, 5, num_ranks=3 - num_ranks)
    assert read(library, "a") == (1, 2, 3, 4, 5)


def test_a_commit_waits_for_the_files_of_all_ranks_and_others_do_not_wait_for_it(library: MemoryLibrary) -> None:
    write = library.begin_write("default", "slow", 1)
    path = write.new_shard_path()
    chunks = Chunks((9,))
    write.commit(chunks.token_ids, chunks.embeddings, [(path, 1)], 2)
    write_shard(path, 0, 2, 0, chunks.kv[:, :, :1])
    other = library.begin_write("default", "fast", 1)
    commit(other, (1,))
    wait_until(lambda: other.is_done)
    assert read(library, "fast") == (1,)
    assert library.is_busy("default", "slow")
    assert not library.is_busy("default", "fast")
    assert [info.name for info in library.names("default")] == ["fast"]
    assert not library.flush(0.05)
    write_shard(path, 1, 2, 1, chunks.kv[:, :, 1:])
    assert library.flush(WAIT_S)
    assert not library.is_busy("default", "slow")
    assert read(library, "slow") == (9,)


def test_commits_to_one_memory_happen_in_the_order_of_the_calls(library: MemoryLibrary) -> None:
    first, second = (library.begin_write("default", "a", 1) for _ in range(2))
    path, chunks = second.new_shard_path(), Chunks((2,))
    second.commit(chunks.token_ids, chunks.embeddings, [(path, 1)], 1)
    commit(first, (1,))
    # What was begun after it and is not of this memory is done; it waits.
    other = library.begin_write("default", "b", 1)
    commit(other, (3,))
    wait_until(lambda: other.is_done)
    assert not first.is_done
    write_shard(path, 0, 1, 0, chunks.kv)
    assert library.flush(WAIT_S)
    assert read(library, "a") == (2, 1)


def test_shards_that_never_come_fail_the_commit(library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    append(library, "a", 1)
    before = files_under(library._root)
    monkeypatch.setattr(pending, "SHARD_WAIT_S", 0.1)
    write = library.begin_write("default", "a", 2)
    shards = save_shards(write, (2, 3), 1, 1)
    Path(shards[1][0] + ".rank0of1.safetensors").unlink()
    chunks = Chunks((2, 3))
    write.commit(chunks.token_ids, chunks.embeddings, shards, 1)
    assert library.flush(WAIT_S)
    (failure,) = library.take_failures()
    assert (failure.tenant, failure.name) == ("default", "a")
    assert "rank0of1" in failure.reason
    assert write.error == failure.reason
    assert library.take_failures() == []
    assert read(library, "a") == (1,)
    assert files_under(library._root) == before


def test_shards_of_another_shape_fail_the_commit(library: MemoryLibrary) -> None:
    write = library.begin_write("default", "a", 2)
    chunks = Chunks((1, 2))
    for kv in (chunks.kv[:1], chunks.kv[:, :, :1], chunks.kv.half()):
        write = library.begin_write("default", "a", 2)
        path = write.new_shard_path()
        write_shard(path, 0, 1, 0, kv)
        write.commit(chunks.token_ids, chunks.embeddings, [(path, 2)], 1)
        assert library.flush(WAIT_S)
        (failure,) = library.take_failures()
        assert Path(path).name in failure.reason
    assert library.names("default") == []


@pytest.mark.parametrize("wrong", ["tokens", "dtype", "embeddings", "nan", "negative", "count", "path", "twice", "max"])
def test_commits_that_contradict_themselves_are_refused_and_may_be_repeated(library: MemoryLibrary, wrong: str) -> None:
    write = library.begin_write("default", "a", 2)
    shards = save_shards(write, (1, 2), 1, 1)
    good = Chunks((1, 2)).token_ids, Chunks((1, 2)).embeddings, list(shards)
    token_ids, embeddings, named = Chunks((1, 2)).token_ids, Chunks((1, 2)).embeddings, list(shards)
    match wrong:
        case "tokens":
            token_ids = token_ids[:, :-1]
        case "dtype":
            token_ids = token_ids.astype(np.int64)
        case "embeddings":
            embeddings = embeddings[:1]
        case "nan":
            embeddings[0, 0] = np.nan
        case "negative":
            token_ids[1, 0] = -1
        case "count":
            named = [(path, 2) for path, _ in shards]
        case "path":
            named[0] = ("/etc/" + Path(shards[0][0]).name, 1)
        case "twice":
            named[1] = named[0]
        case "max":
            token_ids, embeddings, named = token_ids[:0], embeddings[:0], []
    with pytest.raises(MemoryWriteError, match="'a'"):
        write.commit(token_ids, embeddings, named, 1)
    write.commit(*good, 1)
    with pytest.raises(MemoryWriteError):
        write.commit(*good, 1)
    assert library.flush(WAIT_S)
    assert read(library, "a") == (1, 2)


def test_nothing_is_left_of_an_abandoned_write(library: MemoryLibrary) -> None:
    write = library.begin_write("default", "a", 2)
    save_shards(write, (1,), 1, 1)
    late = write.new_shard_path()
    write.abandon()
    write.abandon()
    assert library.flush(WAIT_S)
    assert files_under(library._root) == set()
    # A worker that was still writing; its folder is swept again when none can be.
    write_shard(late, 0, 1, 0, Chunks((2,)).kv)
    assert files_under(library._root)
    library._store.end_late(("default", "a"))
    assert files_under(library._root) == set()
    wait_until(lambda: not (library._root / "default" / "a").exists())
    assert library.take_failures() == []
    append(library, "a", 3)
    assert read(library, "a") == (3,)


def test_writes_that_look_alike_are_told_apart(library: MemoryLibrary) -> None:
    """Two of one size and nothing written yet: the end of one is not the other's."""
    first, second = (library.begin_write("default", "a", 2) for _ in range(2))
    shards = save_shards(first, (1, 2), 1, 1)
    second.abandon()
    library.begin_write("default", "a", 2).abandon()
    chunks = Chunks((1, 2))
    first.commit(chunks.token_ids, chunks.embeddings, shards, 1)
    assert library.flush(WAIT_S)
    assert first.error is None
    assert read(library, "a") == (1, 2)
    assert not library.is_written("default", "a")


class _Stubborn:
    """A job that fails, and then fails to say so."""

    is_awaited = True

    def delay(self, now: float) -> float:
        return 0.0

    def run(self) -> None:
        raise ValueError("cannot run")

    def fail(self, error: Exception) -> None:
        raise ValueError("cannot fail") from error


def test_no_job_ends_the_librarys_thread(library: MemoryLibrary) -> None:
    library._store.background.submit(_Stubborn())
    append(library, "a", 1)
    assert read(library, "a") == (1,)


def test_shards_that_were_not_committed_are_removed(library: MemoryLibrary) -> None:
    write = library.begin_write("default", "a", 2)
    save_shards(write, (7,), 1, 1)
    commit(write, (1, 2))
    assert library.flush(WAIT_S)
    assert files_under(library._root) == files_expected(library, library._root)


def test_a_snapshot_stays_as_it_was(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    old = opened(library, "a")
    append(library, "a", 2)
    new = opened(library, "a")
    assert (seeds_in(old), seeds_in(new)) == ((1,), (1, 2))
    assert old.version != new.version
    library.delete("default", "a")
    append(library, "a", 3)
    newest = opened(library, "a")
    assert library.flush(WAIT_S)
    assert (seeds_in(old), seeds_in(new), seeds_in(newest)) == ((1,), (1, 2), (3,))
    library.release(new)
    library.release(new)
    assert library.flush(WAIT_S)
    assert seeds_in(old) == (1,)
    library.release(old)
    assert library.flush(WAIT_S)
    assert files_under(library._root) == files_expected(library, library._root)
    assert seeds_in(newest) == (3,)
    with pytest.raises(MemoryLibraryError, match="released"):
        _ = old.token_ids


def test_equal_contents_have_different_versions(library: MemoryLibrary) -> None:
    versions = set()
    for _ in range(3):
        append(library, "a", 1)
        versions.add(opened(library, "a").version)
        library.delete("default", "a")
    assert len(versions) == 3


def test_snapshots_of_one_state_share_their_arrays(library: MemoryLibrary) -> None:
    append(library, "a", 1, 2)
    one, two = opened(library, "a"), opened(library, "a")
    assert one.token_ids is two.token_ids
    assert not one.embeddings.flags.writeable
    library.release(one)
    assert seeds_in(two) == (1, 2)
    with pytest.raises(IndexError):
        two.location(2)


def test_deleting_frees_the_name_at_once_and_the_files_soon(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    library.delete("default", "a")
    for call in (library.open, library.delete, library.info):
        with pytest.raises(UnknownMemoryError, match="'a'"):
            call("default", "a")
    assert library.flush(WAIT_S)
    assert files_under(library._root) == set()
    assert not (library._root / "default" / "a").exists()


def test_deleting_fails_the_writes_under_way(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    begun, waiting = (library.begin_write("default", "a", 1) for _ in range(2))
    path = waiting.new_shard_path()
    waiting.commit(Chunks((2,)).token_ids, Chunks((2,)).embeddings, [(path, 1)], 1)
    library.delete("default", "a")
    append_after = library.begin_write("default", "a", 1)
    commit(begun, (3,))
    commit(append_after, (4,))
    assert library.flush(WAIT_S)
    assert ["deleted" in failure.reason for failure in library.take_failures()] == [True, True]
    assert read(library, "a") == (4,)
    write_shard(path, 0, 1, 0, Chunks((2,)).kv)
    with reopen(library) as again:
        assert files_under(again._root) == files_expected(again, again._root)


def test_deleting_a_name_that_is_only_being_written(library: MemoryLibrary) -> None:
    write = library.begin_write("default", "a", 1)
    library.delete("default", "a")
    commit(write, (1,))
    assert library.flush(WAIT_S)
    assert len(library.take_failures()) == 1
    assert library.names("default") == []


def test_the_index_settings_are_part_of_the_state(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    before = opened(library, "a")
    assert (before.index_factory, before.index_parameters) == ("Flat", {})
    parameters: dict[str, str | int | float | bool] = {"nprobe": 8, "efSearch": 64}
    library.set_index("default", "a", "IVF16,Flat", parameters)
    append(library, "a", 2)
    with reopen(library) as again:
        after = opened(again, "a")
        assert (after.index_factory, after.index_parameters) == ("IVF16,Flat", parameters)
        assert after.version != before.version
        with pytest.raises(UnknownMemoryError):
            again.set_index("default", "b", "Flat", {})


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        ("", {}),
        ("Flat\n", {}),
        (3, {}),
        ("Flat", []),
        ("Flat", {"a": None}),
        ("Flat", {"a": float("inf")}),
        ("Flat", {"a": 0.5}),
        ("Flat", {"a": True}),
        ("Flat", {"a": "4"}),
        ("Flat", {"a": 0}),
        ("Flat", {"a": 1 << 31}),
    ],
)
def test_index_settings_of_other_types(library: MemoryLibrary, factory: object, parameters: object) -> None:
    append(library, "a", 1)
    with pytest.raises(MemoryLibraryError):
        library.set_index("default", "a", factory, parameters)  # type: ignore[arg-type]


def test_tenants_do_not_see_each_other(library: MemoryLibrary) -> None:
    tenants = [tenant_folder(salt) for salt in (None, "", "alice", "default", "t-0")]
    assert len(set(tenants)) == 5
    for i, tenant in enumerate(tenants):
        append(library, "shared-name", i, tenant=tenant)
    for i, tenant in enumerate(tenants):
        assert read(library, "shared-name", tenant) == (i,)
    library.delete(tenants[2], "shared-name")
    assert [len(library.names(tenant)) for tenant in tenants] == [1, 1, 0, 1, 1]
    assert library.flush(WAIT_S)
    assert library.tenants() == sorted(set(tenants) - {tenants[2]})
