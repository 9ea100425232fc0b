"""Names, tenants' folders and manifests as an attacker would make them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong_vllm.memories import manifest as manifests
from memlong_vllm.memories.errors import (
    MemoryDamagedError,
    MemoryNameError,
)
from memlong_vllm.memories.manifest import decode
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder, validate_name, validate_tenant
from tests.memory_files import (
    FORMAT,
    PLENTY,
    append,
    manifest_of,
    read,
    with_right_checksum,
)

BAD_NAMES = ["", ".", "..", "a..b", "../a", "a/b", "/etc", "a\\b", "a\0b", "a\n", "\na", " a", "a b", "-a", ".a", "_a"]
BAD_NAMES += ["é", "ａ", "a\u202eb", "a\u0301", "٣", "x" * 65, "~", "$HOME", "a%2fb", "a:b", "a*", "\ud800"]


@pytest.mark.parametrize("name", [*BAD_NAMES, None, 3, b"a"])
def test_names_that_could_be_more_than_a_name(tmp_path: Path, name: Any) -> None:
    with MemoryLibrary(tmp_path, FORMAT, PLENTY) as library:
        calls: list[Callable[[], object]] = [
            lambda: validate_name(name),
            lambda: library.begin_write("default", name, 1),
            lambda: library.open("default", name),
            lambda: library.delete("default", name),
            lambda: library.info("default", name),
            lambda: library.is_busy("default", name),
            lambda: library.set_index("default", name, "Flat", {}),
            lambda: library.export_archive("default", name, tmp_path / "out"),
            lambda: library.import_archive("default", name, tmp_path / "in"),
        ]
        for call in calls:
            with pytest.raises(MemoryNameError, match=r"1 to 64 of A-Z") as caught:
                call()
            assert str(caught.value).isascii()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["a", "A9", "notes-2024_v1.2", "x" * 64, "manifest.json", "0", "a."])
def test_names_that_are_fine(tmp_path: Path, name: str) -> None:
    with MemoryLibrary(tmp_path, FORMAT, PLENTY) as library:
        append(library, name, 1)
        assert read(library, name) == (1,)


@settings(max_examples=100, deadline=None)
@given(st.text() | st.from_regex(r"[A-Za-z0-9._/-]{1,70}", fullmatch=True))
def test_a_valid_name_is_one_plain_part_of_a_path(name: str) -> None:
    try:
        validate_name(name)
    except MemoryNameError:
        return
    assert Path("/root/tenant", name).resolve() == Path("/root/tenant") / name
    assert 1 <= len(name.encode()) <= 64


@settings(max_examples=300, deadline=None)
@given(st.none() | st.text() | st.sampled_from(["default", "../../etc", "t-" + "0" * 32, "\0", "\ud800"]))
def test_a_tenants_folder_tells_nothing_of_the_salt(salt: str | None) -> None:
    folder = tenant_folder(salt)
    assert validate_tenant(folder) == folder
    assert (folder == "default") == (salt is None)
    assert salt is None or re.fullmatch("t-[0-9a-f]{32}", folder)
    # A few characters of a salt may well be among those of a digest.
    assert salt is None or len(salt) < 16 or salt not in folder


@pytest.mark.parametrize("tenant", ["", "Default", "default/", "..", "t-", "t-" + "G" * 32, "t-" + "a" * 33, None, 1])
def test_tenants_are_given_by_their_folder(tmp_path: Path, tenant: Any) -> None:
    with MemoryLibrary(tmp_path, FORMAT, PLENTY) as library:
        for call in (lambda: library.names(tenant), lambda: library.begin_write(tenant, "a", 1)):
            with pytest.raises(MemoryNameError) as caught:
                call()
            assert not tenant or str(tenant) == "t-" or f"'{tenant}'" not in str(caught.value)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened_library:
        append(opened_library, "a", 1, 2, 3)
        append(opened_library, "a", 4)
        yield opened_library


PATHS = [
    "../x",
    "/etc/passwd",
    "a/b",
    "0" * 31,
    "0" * 33,
    "0" * 31 + "G",
    "",
    "0" * 31 + "/",
    "." * 32,
    "0" * 32 + "\n",
]


def changed(body: dict[str, Any], where: str, value: object) -> dict[str, Any]:
    """``body`` with a dotted field set, or removed if ``value`` is ``...``."""
    *parents, leaf = where.split(".")
    target: Any = body
    for parent in parents:
        target = target[int(parent)] if parent.isdigit() else target[parent]
    if value is ...:
        del target[leaf]
    else:
        target[leaf] = value
    return body


def field_paths(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if where != "index_parameters.":
                yield where + name
            yield from field_paths(inner, f"{where}{name}.")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from field_paths(inner, f"{where}{i}.")


def test_every_field_of_a_manifest_must_be_there_and_of_its_type(library: MemoryLibrary) -> None:
    data = manifest_of(library, "a").encode()
    assert decode(with_right_checksum(json.loads(data)), "f").encode() == data
    paths = [path for path in field_paths(json.loads(data)) if path != "sha256"]
    assert len(paths) > 30
    for path in paths:
        leaf = path.split(".")[-1]
        for value in (..., None, [], {"a": 1}, -1, True, "x", 1.5):
            body = changed(json.loads(data), path, value)
            if leaf in ("query_instruction", "pooling", "model_fingerprint", "name", "index_factory") and (
                isinstance(value, str) or (leaf == "query_instruction" and value is None)
            ):
                continue
            if (leaf in ("created", "updated") and value == 1.5) or (leaf == "index_parameters" and value == {"a": 1}):
                continue
            with pytest.raises(MemoryDamagedError, match=f"^f: field.*{leaf}|^f: fields.*{leaf}"):
                decode(with_right_checksum(body), "f")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", ["parts.0.chunks_file", "parts.0.shards.0.path"])
def test_a_manifest_names_no_paths(library: MemoryLibrary, where: str, path: str) -> None:
    value = path + manifests.CHUNKS_SUFFIX if where.endswith("chunks_file") else path
    body = changed(json.loads(manifest_of(library, "a").encode()), where, value)
    with pytest.raises(MemoryDamagedError, match=where.split(".")[-1]):
        decode(with_right_checksum(body), "f")


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"3", b"\xff", b"{" * 100_000, b'{"a": NaN}', b'{"format_version": 2}', b'{"format_version": 1.0}'],
)
def test_what_is_not_a_manifest(data: bytes) -> None:
    with pytest.raises(MemoryDamagedError, match=r"^f: "):
        decode(data, "f")


def test_other_spellings_of_the_same_manifest_are_not_accepted(library: MemoryLibrary) -> None:
    data = manifest_of(library, "a").encode()
    for other in (data + b"\n", data.replace(b"\n", b"\r\n"), json.dumps(json.loads(data)).encode()):
        with pytest.raises(MemoryDamagedError, match="sha256"):
            decode(other, "f")


def test_files_may_not_be_shared_between_parts(library: MemoryLibrary) -> None:
    found = manifest_of(library, "a")
    with pytest.raises(MemoryDamagedError, match="parts"):
        decode(replace(found, parts=(found.parts[0], found.parts[0])).encode(), "f")
