"""What the library of named memories refuses or survives: others' formats, quotas, full disks, a second writer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memlong_vllm.memories import store
from memlong_vllm.memories.errors import (
    MemoryDamagedError,
    MemoryExistsError,
    MemoryFormatError,
    MemoryLibraryBusyError,
    MemoryLibraryError,
    QuotaExceededError,
)
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder
from memlong_vllm.memories.quota import Quota
from tests.memory_files import (
    FORMAT,
    OTHER_MODEL,
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
    seeds_in,
)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened_library:
        yield opened_library


def test_a_second_writer_is_refused_until_the_first_has_closed(library: MemoryLibrary) -> None:
    for _ in range(2):
        with pytest.raises(MemoryLibraryBusyError, match="another process"):
            MemoryLibrary(library._root, FORMAT, PLENTY)
    append(library, "a", 1)
    with MemoryLibrary(library._root, None, None, read_only=True) as reader:
        assert [info.num_chunks for info in reader.names("default")] == [1]
        append(library, "a", 2)
        assert reader.info("default", "a").num_chunks == 2
        with pytest.raises(MemoryLibraryError, match="reading only"):
            reader.delete("default", "a")
        with pytest.raises(MemoryLibraryError, match="model"):
            reader.open("default", "a")
    with MemoryLibrary(library._root, FORMAT, None, read_only=True) as reader:
        assert read(reader, "a") == (1, 2)
        with pytest.raises(MemoryLibraryError, match="reading only"):
            reader.begin_write("default", "a", 1)
    library.close()
    with pytest.raises(MemoryLibraryError, match="closed"):
        library.names("default")
    with MemoryLibrary(library._root, FORMAT, PLENTY) as again:
        assert read(again, "a") == (1, 2)


def test_a_reader_makes_no_folder(tmp_path: Path) -> None:
    with MemoryLibrary(tmp_path / "none", None, None, read_only=True) as reader:
        assert (reader.tenants(), reader.names("default")) == ([], [])
    assert not (tmp_path / "none").exists()


DIFFERENT = [
    ({"model_fingerprint": "1" * 64}, "weights"),
    ({"pooling": "cls"}, "pooling"),
    ({"max_length": 33}, "max_length"),
    ({"query_instruction": "Q: "}, "query_instruction"),
    ({"dimension": 2, "probe": (1.0, 0.0)}, "dimension"),
    ({"probe": (0.9, 0.1, 0.0)}, "cosine"),
    ({"probe": (0.0, 0.0, 0.0)}, "cosine"),
    ({"chunk_size": 8}, "chunk_size"),
    ({"memory_layer": 0}, "memory_layer"),
    ({"num_kv_heads": 4}, "key-value heads"),
    ({"head_dim": 4}, "head_dim"),
    ({"dtype": "bfloat16"}, "dtype"),
]


@pytest.mark.parametrize(("changes", "named"), DIFFERENT)
def test_memories_of_another_format_are_listed_and_refused(
    library: MemoryLibrary, changes: dict[str, object], named: str
) -> None:
    append(library, "a", 1)
    with reopen(library, format=replace(FORMAT, **changes)) as other:  # type: ignore[arg-type]
        for call in (lambda: other.open("default", "a"), lambda: other.begin_write("default", "a", 1)):
            with pytest.raises(MemoryFormatError, match=named):
                call()
        (info,) = other.names("default")
        assert info.error is not None
        assert named in info.error
        other.delete("default", "a")
        assert other.names("default") == []


def test_the_same_embedder_elsewhere_is_the_same(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    with reopen(library, format=replace(FORMAT, probe=(0.999, 0.01, 0.0))) as other:
        append(other, "a", 2)
        assert read(other, "a") == (1, 2)


def test_quota_counts_names_and_bytes_also_of_writes_under_way(library: MemoryLibrary) -> None:
    size = FORMAT.chunk_bytes
    with reopen(library, quota=Quota(max_bytes=10 * size, max_names=2)) as limited:
        first = limited.begin_write("default", "a", 6)
        with pytest.raises(QuotaExceededError, match=rf"{5 * size} .*{6 * size} .*{10 * size}"):
            limited.begin_write("default", "a", 5)
        second = limited.begin_write("default", "b", 4)
        second.abandon()
        third = limited.begin_write("default", "c", 1)
        with pytest.raises(QuotaExceededError, match=r"2 memories .* 2"):
            limited.begin_write("default", "d", 1)
        limited.begin_write(tenant_folder("else"), "d", 10)
        third.abandon()
        commit(first, (1,))
        assert limited.flush(WAIT_S)
        used = limited.info("default", "a").num_bytes
        rest = (10 * size - used) // size
        with pytest.raises(QuotaExceededError):
            limited.begin_write("default", "a", rest + 1)
        if rest:
            limited.begin_write("default", "a", rest).abandon()


def test_what_is_deleted_counts_as_long_as_it_is_read(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    used = library.info("default", "a").num_bytes
    with reopen(library, quota=Quota(max_bytes=used, max_names=9)) as limited:
        memory = opened(limited, "a")
        limited.delete("default", "a")
        with pytest.raises(QuotaExceededError):
            limited.begin_write("default", "b", 1)
        limited.release(memory)
        limited.begin_write("default", "b", 1).abandon()


def test_a_full_disk_fails_the_write_and_leaves_the_memory(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(library, "a", 1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for target in ("memlong_vllm.memories.contents.write_durably", "memlong_vllm.memories.store.write_durably"):
        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            write = library.begin_write("default", "a", 1)
            commit(write, (2,))
            assert library.flush(WAIT_S)
        (failure,) = library.take_failures()
        assert "No space left" in failure.reason
        assert read(library, "a") == (1,)
        assert files_under(library._root) == files_expected(library, library._root)
    append(library, "a", 3)
    assert read(library, "a") == (1, 3)


def test_what_counts_after_a_failed_sync_is_what_a_restart_would_find(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(library, "a", 1)
    original = store.write_durably

    def fail_late(path: Path, data: bytes) -> None:
        original(path, data)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_durably", fail_late)
        append(library, "a", 2)
    with reopen(library) as again:
        assert read(again, "a") == (1, 2)


def test_nothing_is_written_to_a_name_while_it_is_imported(
    library: MemoryLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(library, "a", 1)
    library.export_archive("default", "a", tmp_path / "a.tar")
    original, refused = store.write_durably, []

    def write_meanwhile(path: Path, data: bytes) -> None:
        assert [info.name for info in library.names("default")] == ["a"]
        for call in (lambda: library.begin_write("default", "b", 1), lambda: import_again()):
            with pytest.raises(MemoryExistsError):
                call()
            refused.append(path)
        original(path, data)

    def import_again() -> object:
        return library.import_archive("default", "b", tmp_path / "a.tar")

    monkeypatch.setattr(store, "write_durably", write_meanwhile)
    library.import_archive("default", "b", tmp_path / "a.tar")
    assert len(refused) == 2
    assert read(library, "b") == (1,)


def test_a_memorys_folder_is_not_moved_by_hand(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    library.close()
    (library._root / "default" / "a").rename(library._root / "default" / "b")
    with MemoryLibrary(library._root, FORMAT, PLENTY) as again, pytest.raises(MemoryDamagedError, match="'name'"):
        again.open("default", "b")


def test_a_write_that_outlives_the_library_fails(library: MemoryLibrary) -> None:
    write = library.begin_write("default", "a", 1)
    path = write.new_shard_path()
    write.commit(Chunks((1,)).token_ids, Chunks((1,)).embeddings, [(path, 1)], 1)
    library.close(timeout=0.05)
    assert write.is_done
    assert write.error is not None
    assert "closed" in write.error
    library.close()


def test_listing_does_not_wait_for_a_slow_disk(library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scheduler asks every step takes no lock that is held while files are written."""
    append(library, "a", 1)
    entered, leave = threading.Event(), threading.Event()
    original = store.write_durably

    def slow(path: Path, data: bytes) -> None:
        entered.set()
        assert leave.wait(WAIT_S)
        original(path, data)

    monkeypatch.setattr(store, "write_durably", slow)
    write = library.begin_write("default", "a", 1)
    commit(write, (2,))
    assert entered.wait(WAIT_S)
    assert library.is_busy("default", "a")
    assert library.info("default", "a").num_chunks == 1
    assert library.take_failures() == []
    memory = library.open("default", "a")
    library.begin_write("default", "b", 1).abandon()
    assert not memory.ready
    leave.set()
    memory.wait(WAIT_S)
    assert seeds_in(memory) == (1,)


def test_files_that_others_put_there_are_not_removed(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    root = library._root
    foreign = [root / "README", root / "default" / "notes.txt", root / "default" / "a" / "mine.safetensors"]
    foreign += [root / "other" / "b" / ("0" * 32 + ".chunks.safetensors"), root / "default" / "x y" / "z"]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    orphan = root / "default" / "a" / ("0" * 32 + ".rank0of1.safetensors")
    orphan.write_text("left by a kill")
    (root / "default" / "a" / "manifest.json.tmp").write_text("left by a kill")
    (root / "default" / "link").symlink_to(root / "default" / "a")
    with reopen(library) as again:
        assert all(file.exists() for file in foreign)
        assert not orphan.exists()
        assert not (root / "default" / "a" / "manifest.json.tmp").exists()
        assert [info.name for info in again.names("default")] == ["a"]


def test_a_damaged_memory_is_listed_and_can_be_deleted_only(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    (library._root / "default" / "a" / "manifest.json").write_text("{}")
    with reopen(library) as again:
        (info,) = again.names("default")
        assert info.error is not None
        assert "manifest.json" in info.error
        for call in (lambda: again.open("default", "a"), lambda: again.begin_write("default", "a", 1)):
            with pytest.raises(MemoryDamagedError, match=r"manifest\.json"):
                call()
        again.delete("default", "a")
        assert again.flush(WAIT_S)
        assert files_under(again._root) == set()


def test_other_models_are_told_apart() -> None:
    assert FORMAT.mismatches(FORMAT) == []
    assert len(FORMAT.mismatches(OTHER_MODEL)) == 1
