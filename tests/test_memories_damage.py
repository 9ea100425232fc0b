"""Damage anywhere in any file of a memory is found when it is opened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong_vllm.memories.errors import MemoryDamagedError, UnknownMemoryError
from memlong_vllm.memories.named_library import MemoryLibrary
from tests.memory_files import FORMAT, PLENTY, WAIT_S, append, files_expected, files_under, opened, read, seeds_in


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memories")
    with MemoryLibrary(root, FORMAT, PLENTY) as library:
        append(library, "a", 1, 2, 3, num_ranks=2)
        append(library, "a", 4)
        append(library, "whole", 5)
    return root


def files_of_a(root: Path) -> list[Path]:
    return sorted((root / "default" / "a").iterdir())


def refused(root: Path, file: Path) -> None:
    """The memory is refused with the file's name, and the others can be read."""
    with MemoryLibrary(root, FORMAT, PLENTY) as library:
        with pytest.raises(MemoryDamagedError, match=file.name):
            opened(library, "a")
        (info,) = [info for info in library.names("default") if info.name == "a"]
        assert info.error is not None
        assert file.name in info.error
        with pytest.raises(MemoryDamagedError, match=file.name):
            library.begin_write("default", "a", 1)
        assert read(library, "whole") == (5,)


def test_the_memory_has_all_kinds_of_files(root: Path) -> None:
    suffixes = sorted(path.name.partition(".")[2] for path in files_of_a(root))
    ranks = ["rank0of1.safetensors", *["rank0of2.safetensors"] * 2, *["rank1of2.safetensors"] * 2]
    assert suffixes == ["chunks.safetensors"] * 2 + ["json"] + ranks


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_changed_byte_anywhere(root: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(files_of_a(root)))
    good = file.read_bytes()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(bad)
    try:
        refused(root, file)
    finally:
        file.write_bytes(good)


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("kept", [0, 1, 100, -1, None])
def test_files_cut_short_or_gone(root: Path, tmp_path: Path, number: int, kept: int | None) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    file = files_of_a(copy)[number]
    if kept is not None:
        file.write_bytes(file.read_bytes()[:kept])
        refused(copy, file)
        return
    file.unlink()
    if file.name != "manifest.json":
        refused(copy, file)
        return
    # Without its manifest there is no memory, and what is left of it goes when the next engine starts.
    with MemoryLibrary(copy, FORMAT, PLENTY) as library:
        assert [info.name for info in library.names("default")] == ["whole"]
        with pytest.raises(UnknownMemoryError, match="'a'"):
            library.open("default", "a")
        assert files_under(copy) == files_expected(library, copy)


def test_files_exchanged(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    one, two = [file for file in files_of_a(copy) if "rank0of2" in file.name]
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with MemoryLibrary(copy, FORMAT, PLENTY) as library, pytest.raises(MemoryDamagedError, match="rank0of2"):
        opened(library, "a")


def test_damage_is_found_also_in_what_this_process_wrote_or_read_before(tmp_path: Path) -> None:
    with MemoryLibrary(tmp_path, FORMAT, PLENTY) as library:
        append(library, "a", 1)
        for file in files_of_a(tmp_path):
            if file.name == "manifest.json":
                continue
            assert read(library, "a") == (1,)
            good = file.read_bytes()
            file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
            with pytest.raises(MemoryDamagedError, match=file.name):
                opened(library, "a")
            assert library.info("default", "a").error is not None
            file.write_bytes(good)
            assert read(library, "a") == (1,)
            assert library.info("default", "a").error is None


def test_files_that_were_not_touched_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryLibrary(tmp_path, FORMAT, PLENTY) as library:
        append(library, "a", 1, 2, 3)
    with MemoryLibrary(tmp_path, FORMAT, PLENTY) as library:
        assert read(library, "a") == (1, 2, 3)
        digested: list[str] = []
        monkeypatch.setattr("memlong_vllm.memories.contents.file_sha256", lambda path: digested.append(str(path)))
        assert read(library, "a") == (1, 2, 3)
        assert digested == []
        os.utime(next(file for file in files_of_a(tmp_path) if "rank" in file.name))
        with pytest.raises(MemoryDamagedError):
            opened(library, "a")
        assert len(digested) == 1


def test_a_snapshot_that_was_verified_outlives_damage_to_its_manifest(tmp_path: Path) -> None:
    with MemoryLibrary(tmp_path, FORMAT, PLENTY) as library:
        append(library, "a", 1)
        memory = opened(library, "a")
        (tmp_path / "default" / "a" / "manifest.json").write_bytes(b"")
        assert seeds_in(memory) == (1,)
        library.release(memory)
    with MemoryLibrary(tmp_path, FORMAT, PLENTY) as library:
        assert "not JSON" in str(library.info("default", "a").error)
        assert len(files_under(tmp_path)) == 3  # What a damaged manifest may refer to is kept.
        library.delete("default", "a")
        assert library.flush(WAIT_S)
        assert files_under(tmp_path) == set()
