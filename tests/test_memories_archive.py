"""Archives of memories: carried elsewhere, damaged, and as an attacker would make them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from memlong_vllm.memories.errors import (
    MemoryDamagedError,
    MemoryExistsError,
    MemoryFormatError,
    MemoryLibraryError,
    QuotaExceededError,
)
from memlong_vllm.memories.index_settings import IndexSettingsError
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
    files_expected,
    files_under,
    manifest_of,
    opened,
    read,
    seeds_in,
    with_right_checksum,
)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened_library:
        append(opened_library, "a", 1, 2, 3)
        append(opened_library, "a", 4)
        yield opened_library


def test_an_archive_carries_a_memory_to_another_name_tenant_and_library(library: MemoryLibrary, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    library.set_index("default", "a", "IVF2,Flat", {"nprobe": 2})
    library.export_archive("default", "a", archive)
    tenant = tenant_folder("secret")
    info = library.import_archive(tenant, "b", archive)
    assert (info.name, info.num_chunks) == ("b", 4)
    assert read(library, "b", tenant) == (1, 2, 3, 4)
    with MemoryLibrary(tmp_path / "other", FORMAT, PLENTY) as other:
        other.import_archive("default", "a", archive)
        append(other, "a", 5)
        memory = opened(other, "a")
        assert seeds_in(memory) == (1, 2, 3, 4, 5)
        assert memory.index_factory == "IVF2,Flat"
        other.release(memory)
        assert files_under(tmp_path / "other") == files_expected(other, tmp_path / "other")
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_importing_what_was_deleted_but_is_still_read(library: MemoryLibrary, tmp_path: Path) -> None:
    library.export_archive("default", "a", tmp_path / "a.tar")
    old = opened(library, "a")
    library.delete("default", "a")
    library.import_archive("default", "a", tmp_path / "a.tar")
    library.release(old)
    assert library.flush(WAIT_S)
    assert read(library, "a") == (1, 2, 3, 4)
    assert files_under(library._root) == files_expected(library, library._root)


def test_an_export_is_of_one_state_and_needs_no_model(library: MemoryLibrary, tmp_path: Path) -> None:
    library.close()
    with MemoryLibrary(library._root, None, None, read_only=True) as reader:
        reader.export_archive("default", "a", tmp_path / "a.tar")
    with MemoryLibrary(library._root, FORMAT, PLENTY) as again:
        with pytest.raises(MemoryLibraryError, match="cannot be written"):
            again.export_archive("default", "a", tmp_path / "gone" / "a.tar")
        file = next((again._root / "default" / "a").glob("*.chunks.*"))
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
        with pytest.raises(MemoryDamagedError, match="chunks"):
            again.export_archive("default", "a", tmp_path / "b.tar")
    assert [path.name for path in tmp_path.glob("b.tar*")] == []


Members = list[tuple[tarfile.TarInfo, bytes]]


def members(archive: Path) -> Members:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def pack(target: Path, content: Members) -> None:
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in content:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))


def extra(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member, b"owned" if kind == tarfile.REGTYPE else b""


def linked(content: Members, kind: bytes) -> Members:
    """The second file replaced by a link to something outside."""
    content[2] = extra(content[2][0].name, kind, "/etc/passwd")
    return content


# What is changed, and what the refusal says.
UNEXPECTED, NOT_PLAIN = "is not a file of the memory, or there twice", "is not a plain file"
NO_MANIFEST, OTHER_SIZE, OTHER_CONTENT = "does not begin with 'manifest.json'", "bytes instead of", "checksum differs"
ATTACKS: dict[str, tuple[str, Callable[[Members], Members]]] = {
    "a path upwards": (UNEXPECTED, lambda c: [*c, extra("../../evil")]),
    "an absolute path": (UNEXPECTED, lambda c: [*c, extra("/tmp/evil")]),
    "a path upwards first": (NO_MANIFEST, lambda c: [extra("../evil"), *c]),
    "a folder": (NOT_PLAIN, lambda c: [*c, extra("sub", tarfile.DIRTYPE)]),
    "a symlink": (NOT_PLAIN, lambda c: [*c, extra("link", tarfile.SYMTYPE, "/etc")]),
    "a symlink in a file's place": (NOT_PLAIN, lambda c: linked(c, tarfile.SYMTYPE)),
    "a hard link in a file's place": (NOT_PLAIN, lambda c: linked(c, tarfile.LNKTYPE)),
    "a device in a file's place": (NOT_PLAIN, lambda c: linked(c, tarfile.CHRTYPE)),
    "a pipe in a file's place": (NOT_PLAIN, lambda c: linked(c, tarfile.FIFOTYPE)),
    "a symlink as manifest": (NOT_PLAIN, lambda c: [extra("manifest.json", tarfile.SYMTYPE, "/etc/passwd"), *c[1:]]),
    "a file twice": (UNEXPECTED, lambda c: [*c, c[1]]),
    "two manifests": (UNEXPECTED, lambda c: [c[0], *c]),
    "a file of nobody": (UNEXPECTED, lambda c: [*c, extra("0" * 32 + ".rank0of1.safetensors")]),
    "a missing file": ("is missing", lambda c: c[:-1]),
    "a path before a file's name": (
        UNEXPECTED,
        lambda c: [c[0], *((renamed_member(m, "./" + m.name), d) for m, d in c[1:])],
    ),
    "no manifest": (NO_MANIFEST, lambda c: c[1:]),
    "nothing": (NO_MANIFEST, lambda c: []),
    "a longer file": (OTHER_SIZE, lambda c: [*c[:-1], (c[-1][0], c[-1][1] + b"x")]),
    "a shorter file": (OTHER_SIZE, lambda c: [*c[:-1], (c[-1][0], c[-1][1][:-1])]),
    "another file": (OTHER_CONTENT, lambda c: [*c[:-1], (c[-1][0], c[-1][1][:-1] + bytes([c[-1][1][-1] ^ 1]))]),
    "files exchanged": ("instead of|checksum", lambda c: [c[0], (c[1][0], c[2][1]), (c[2][0], c[1][1]), *c[3:]]),
}


def renamed_member(member: tarfile.TarInfo, name: str) -> tarfile.TarInfo:
    member.name = name
    return member


@pytest.mark.parametrize("attack", ATTACKS)
def test_archives_with_more_or_less_than_a_memory(library: MemoryLibrary, tmp_path: Path, attack: str) -> None:
    library.export_archive("default", "a", tmp_path / "a.tar")
    problem, change = ATTACKS[attack]
    pack(tmp_path / "bad.tar", change(members(tmp_path / "a.tar")))
    before = files_under(tmp_path)
    with pytest.raises(MemoryDamagedError, match=rf"bad\.tar: .*({problem})"):
        library.import_archive("default", "b", tmp_path / "bad.tar")
    assert library.flush(WAIT_S)
    assert files_under(tmp_path) == before
    assert [info.name for info in library.names("default")] == ["a"]
    library.import_archive("default", "b", tmp_path / "a.tar")
    assert read(library, "b") == (1, 2, 3, 4)


@pytest.mark.parametrize("index", [("PQ1x24", {}), ("HNSW32", {"efSearch": 1 << 30}), ("PQ1x4", {"ht": 1})])
def test_an_index_that_may_not_be_asked_for_is_not_imported(
    library: MemoryLibrary, tmp_path: Path, index: tuple[str, dict[str, int]]
) -> None:
    library.export_archive("default", "a", tmp_path / "a.tar")
    content, body = members(tmp_path / "a.tar"), json.loads(manifest_of(library, "a").encode())
    body["index_factory"], body["index_parameters"] = index
    content[0] = (content[0][0], with_right_checksum(body))
    pack(tmp_path / "bad.tar", content)
    with pytest.raises(IndexSettingsError, match="the index "):
        library.import_archive("default", "b", tmp_path / "bad.tar")
    assert library.flush(WAIT_S)
    assert [info.name for info in library.names("default")] == ["a"]
    assert files_under(library._root) == files_expected(library, library._root)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_what_a_header_announces_is_not_read(library: MemoryLibrary, tmp_path: Path, kind: bytes) -> None:
    """100 GB of a name: refused by its header."""
    library.export_archive("default", "a", tmp_path / "a.tar")
    announced = tarfile.TarInfo("././@LongLink")
    announced.type, announced.size = kind, 100 << 30
    header = announced.tobuf(tarfile.GNU_FORMAT)
    good = (tmp_path / "a.tar").read_bytes()
    first = tarfile.BLOCKSIZE * (1 - (-members(tmp_path / "a.tar")[0][0].size // tarfile.BLOCKSIZE))
    for bad in (header, header + good, good[:first] + header + good[first:]):
        with (tmp_path / "bad.tar").open("wb") as file:
            file.write(bad)
            file.truncate(200 << 30)  # Of which the disk holds next to nothing.
        with pytest.raises(MemoryDamagedError, match="is not a plain file"):
            library.import_archive("default", "b", tmp_path / "bad.tar")
    (tmp_path / "bad.tar").unlink()


def test_archives_that_are_right_in_themselves_but_not_a_memory(library: MemoryLibrary, tmp_path: Path) -> None:
    """Checksums are the attacker's own; what they are of is checked too."""
    library.export_archive("default", "a", tmp_path / "a.tar")
    good, found = members(tmp_path / "a.tar"), manifest_of(library, "a")
    bad_embeddings = Chunks((1, 2, 3)).embeddings
    bad_embeddings[0, 0] = float("nan")
    three = Chunks((1, 2, 3))
    replacements = [
        (1, b"not safetensors at all", "header"),
        (1, save({"token_ids": Chunks((1, 2)).token_ids, "embeddings": Chunks((1, 2)).embeddings}), "holds 2 chunks"),
        (1, save({"token_ids": -three.token_ids, "embeddings": three.embeddings}), "token id is negative"),
        (1, save({"token_ids": three.token_ids, "embeddings": bad_embeddings}), "embedding is not finite"),
        (2, save({"kv": bad_embeddings}), "has the shape"),
        (2, save({"kv": Chunks((1, 2)).kv.numpy()}, metadata={"first_head": "1", "num_heads": "2"}), "heads beyond"),
        (
            2,
            save({"kv": Chunks((1,)).kv.numpy()}, metadata={"first_head": "0", "num_heads": "2"}),
            "instead of float32",
        ),
    ]
    for i, data, problem in replacements:
        body = json.loads(found.encode())
        entry, digest = body["parts"][0], hashlib.sha256(data).hexdigest()
        if i == 1:
            entry["sha256"], entry["num_bytes"] = digest, len(data)
        else:
            entry["shards"][0]["sha256"], entry["shards"][0]["num_bytes"] = [digest], [len(data)]
        content = [*good]
        content[0], content[i] = (good[0][0], with_right_checksum(body)), (good[i][0], data)
        pack(tmp_path / "bad.tar", content)
        for _ in range(2):
            with pytest.raises(MemoryDamagedError, match=problem):
                library.import_archive("default", "b", tmp_path / "bad.tar")
    assert library.flush(WAIT_S)
    assert files_under(library._root) == files_expected(library, library._root)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_an_archive_changed_or_cut_anywhere_is_refused_or_the_same_memory(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Padding and member times of a tar mean nothing, so a change there may pass."""
    base = archive_once(tmp_path_factory)
    raw = bytearray((base / "a.tar").read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    (base / "bad.tar").write_bytes(raw)
    with MemoryLibrary(base / "target", FORMAT, PLENTY) as library:
        try:
            library.import_archive("default", "b", base / "bad.tar")
        except MemoryDamagedError:
            assert library.names("default") == []
        else:
            assert read(library, "b") == (1, 2, 3)
            library.delete("default", "b")
        assert library.flush(WAIT_S)
        assert files_under(base / "target") == set()


ARCHIVES: list[Path] = []


def archive_once(factory: pytest.TempPathFactory) -> Path:
    if not ARCHIVES:
        base = factory.mktemp("archive")
        with MemoryLibrary(base / "source", FORMAT, PLENTY) as library:
            append(library, "a", 1, 2, 3)
            library.export_archive("default", "a", base / "a.tar")
        ARCHIVES.append(base)
    return ARCHIVES[0]


def test_imports_obey_names_quota_and_format(library: MemoryLibrary, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    library.export_archive("default", "a", archive)
    with pytest.raises(MemoryExistsError):
        library.import_archive("default", "a", archive)
    write = library.begin_write("default", "b", 1)
    with pytest.raises(MemoryExistsError):
        library.import_archive("default", "b", archive)
    write.abandon()
    with pytest.raises(MemoryLibraryError, match=r"none\.tar"):
        library.import_archive("default", "b", tmp_path / "none.tar")
    size = library.info("default", "a").num_bytes
    library.close()
    for quota, error in ((Quota(2 * size - 1, 9), QuotaExceededError), (Quota(2 * size, 1), QuotaExceededError)):
        with MemoryLibrary(library._root, FORMAT, quota) as limited, pytest.raises(error):
            limited.import_archive("default", "b", archive)
    with (
        MemoryLibrary(library._root, OTHER_MODEL, PLENTY) as other,
        pytest.raises(MemoryFormatError, match="weights"),
    ):
        other.import_archive("default", "b", archive)
    with MemoryLibrary(library._root, FORMAT, Quota(2 * size, 2)) as enough:
        enough.import_archive("default", "b", archive)
        assert read(enough, "b") == (1, 2, 3, 4)


def test_symlinks_in_the_library_are_not_followed(library: MemoryLibrary, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    orphan = outside / ("0" * 32 + ".chunks.safetensors")
    orphan.write_text("x")
    (library._root / "default" / "link").symlink_to(outside)
    (library._root / tenant_folder("s")).symlink_to(tmp_path)
    library.close()
    with MemoryLibrary(library._root, FORMAT, PLENTY) as again:
        assert [info.name for info in again.names("default")] == ["a"]
        assert again.names(tenant_folder("s")) == []
    assert orphan.exists()
    manifest = library._root / "default" / "a" / "manifest.json"
    manifest.rename(tmp_path / "elsewhere.json")
    manifest.symlink_to(tmp_path / "elsewhere.json")
    with MemoryLibrary(library._root, FORMAT, PLENTY) as again, pytest.raises(MemoryDamagedError, match=r"manifest"):
        again.open("default", "a")
