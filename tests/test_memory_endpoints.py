"""Routes of named memories and the middleware before them, over a real library, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from memlong_vllm.endpoints.archives import FOLDER, ArchiveTransfers
from memlong_vllm.endpoints.errors import EndpointError
from memlong_vllm.endpoints.tenants import OwnSalts
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder
from memlong_vllm.memories.quota import Quota
from tests.endpoints_app import MEMORIES, STATS, bearer, kind, make_client, names
from tests.memory_files import FORMAT, PLENTY, append, read


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened:
        yield opened


@pytest.fixture
def client(library: MemoryLibrary) -> TestClient:
    return make_client(library, memory_dir=library._root)


# Routes.


def test_list_show_delete(client: TestClient, library: MemoryLibrary) -> None:
    append(library, "a", 1, 2)
    append(library, "b", 3)
    assert names(client) == ["a", "b"]
    shown = client.get(f"{MEMORIES}/a").json()
    assert (shown["name"], shown["num_chunks"], shown["parts"][0]["num_chunks"]) == ("a", 2, 2)
    assert client.delete(f"{MEMORIES}/a").json() == {"name": "a", "deleted": True}
    assert names(client) == ["b"]
    assert kind(client.delete(f"{MEMORIES}/a")) == (404, "UnknownMemoryError")
    assert kind(client.get(f"{MEMORIES}/a")) == (404, "UnknownMemoryError")


def test_an_archive_goes_out_and_comes_in(client: TestClient, library: MemoryLibrary) -> None:
    append(library, "a", 1, 2)
    archive = client.get(f"{MEMORIES}/a/archive")
    assert archive.status_code == 200
    assert archive.headers["content-type"] == "application/x-tar"
    made = client.put(f"{MEMORIES}/b", content=archive.content, headers={"X-Cache-Salt": "s"})
    assert (made.status_code, made.json()["name"]) == (201, "b")
    assert read(library, "b", tenant_folder("s")) == (1, 2)
    assert names(client) == ["a"]
    again = client.put(f"{MEMORIES}/a", content=archive.content)
    assert kind(again) == (409, "MemoryExistsError")
    assert kind(client.get(f"{MEMORIES}/none/archive")) == (404, "UnknownMemoryError")
    assert list((library._root / FOLDER).iterdir()) == []


def test_archives_that_are_none(client: TestClient, library: MemoryLibrary) -> None:
    append(library, "a", 1)
    archive = client.get(f"{MEMORIES}/a/archive").content
    for content in (b"", b"x" * 5000, archive[:3000], archive[:600] + b"?" + archive[601:]):
        assert kind(client.put(f"{MEMORIES}/b", content=content)) == (422, "MemoryDamagedError")
    assert names(client) == ["a"]
    assert list((library._root / FOLDER).iterdir()) == []


def test_a_damaged_memory_is_not_sent(client: TestClient, library: MemoryLibrary) -> None:
    append(library, "a", 1)
    (shard,) = (library._root / "default" / "a").glob("*.rank0of1.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert kind(client.get(f"{MEMORIES}/a/archive")) == (422, "MemoryDamagedError")


def test_quotas(library: MemoryLibrary, tmp_path: Path) -> None:
    append(library, "a", 1, 2)
    archive = make_client(library, memory_dir=library._root).get(f"{MEMORIES}/a/archive").content
    with MemoryLibrary(tmp_path / "small", FORMAT, Quota(max_bytes=100, max_names=3)) as small:
        client = make_client(small, memory_dir=small._root)
        assert kind(client.put(f"{MEMORIES}/a", content=archive)) == (413, "QuotaExceededError")


def test_an_upload_ends_where_the_quota_does(library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = ArchiveTransfers(str(library._root), 100)
    client = make_client(library, memory_dir=library._root, max_bytes=100)
    limit = transfers._max_bytes or 0
    said = client.put(f"{MEMORIES}/a", content=b"x", headers={"Content-Length": str(limit + 1)})
    assert kind(said) == (413, "QuotaExceededError")
    monkeypatch.setattr(client.app.state.memlong.archives, "_max_bytes", 5000)  # type: ignore[attr-defined]
    unsaid = client.put(f"{MEMORIES}/a", content=(b"x" * 1000 for _ in range(6)))
    assert kind(unsaid) == (413, "QuotaExceededError")
    assert list((library._root / FOLDER).iterdir()) == []


def test_one_archive_at_a_time_for_each_tenant(client: TestClient, library: MemoryLibrary) -> None:
    append(library, "a", 1)
    _, transfer = client.app.state.memlong.archives._begin("default")  # type: ignore[attr-defined]
    assert kind(client.get(f"{MEMORIES}/a/archive")) == (409, "MemoryLibraryBusyError")
    assert kind(client.put(f"{MEMORIES}/b", content=b"x")) == (409, "MemoryLibraryBusyError")
    transfer.close()
    assert client.get(f"{MEMORIES}/a/archive").status_code == 200


def test_leftovers_of_killed_servers_are_removed_but_not_what_is_under_way(library: MemoryLibrary) -> None:
    transfers = ArchiveTransfers(str(library._root), None)
    path, transfer = transfers._begin("default")
    left = library._root / FOLDER / "left"
    left.mkdir()
    (left / "memory.tar").write_text("x")
    ArchiveTransfers(str(library._root), None).remove_leftovers()
    assert not left.exists()
    assert path.parent.exists()
    transfer.close()
    assert not path.parent.exists()


def test_without_a_folder_there_are_no_archives(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    client = make_client(library)
    assert kind(client.get(f"{MEMORIES}/a/archive"))[0] == 409
    assert kind(client.put(f"{MEMORIES}/b", content=b""))[0] == 409


def test_the_index(client: TestClient, library: MemoryLibrary) -> None:
    append(library, "a", 1)
    url = f"{MEMORIES}/a/index"
    answer = client.post(url, json={"factory": "IVF4,Flat", "parameters": {"nprobe": 2}})
    assert answer.json()["index"] == {"factory": "IVF4,Flat", "parameters": {"nprobe": 2}}
    for body in ({"factory": "IVF9999999,Flat"}, {"factory": "Flat", "x": 1}, {"factory": 3}, [1]):
        assert client.post(url, json=body).status_code == 400
    assert client.post(url, content=b"{").status_code == 400
    assert client.post(url, content=b"[" * 10_000).status_code == 400
    assert client.post(url, content=b" " * 100_000).status_code == 413
    assert client.post(f"{MEMORIES}/b/index", json={"factory": "Flat"}).status_code == 404


BAD_NAMES = ["..", ".a", "a..b", "%2e%2e", "a%00b", "%C3%A4", "a b", "x" * 65, "a%0a"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(client: TestClient, name: str) -> None:
    for answer in (client.get(f"{MEMORIES}/{name}"), client.put(f"{MEMORIES}/{name}", content=b"")):
        assert answer.status_code in (400, 404, 405)
    assert names(client) == []


@pytest.mark.parametrize("name", ["..%2f..%2fa", "t-0%2Fa", "%2Fetc%2Fpasswd", "a%2Farchive%2F.."])
def test_encoded_slashes_name_nothing(client: TestClient, library: MemoryLibrary, name: str) -> None:
    append(library, "a", 1)
    assert client.get(f"{MEMORIES}/{name}").status_code == 404
    assert client.delete(f"{MEMORIES}/{name}").status_code == 404
    assert client.put(f"{MEMORIES}/{name}", content=b"x").status_code in (404, 405)
    assert names(client) == ["a"]


def test_stats_and_metrics(client: TestClient) -> None:
    assert client.get("/memlong/stats").json() == STATS
    answer = client.get("/memlong/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name: (f.type, f.samples[0].value) for name, f in families.items()} == {
        "memlong_running": ("gauge", 1.0),
        "memlong_holds": ("counter", 3.0),
        "memlong_held_seconds": ("counter", 0.5),
        "memlong_something_new": ("gauge", 7.0),
    }
    assert "memlong_holds_total 3.0" in answer.text


# Own salts.


def test_a_salt_separates_memories(client: TestClient, library: MemoryLibrary) -> None:
    append(library, "a", 1)
    append(library, "b", 2, tenant=tenant_folder("s"))
    append(library, "c", 3, tenant=tenant_folder("ä"))
    assert names(client) == ["a"]
    assert names(client, **{"X-CACHE-SALT": "s"}) == ["b"]
    assert names(client, **{"X-Cache-Salt": "S"}) == []
    assert [e["name"] for e in client.get(MEMORIES, headers={"X-Cache-Salt": "ä".encode()}).json()["data"]] == ["c"]
    assert client.delete(f"{MEMORIES}/b").status_code == 404
    with pytest.raises(EndpointError, match="UTF-8"):  # The test client cannot send it.
        OwnSalts().salt([(b"x-cache-salt", b"\xff")])
    for salt in (b"", b"x" * 2000):
        assert kind(client.get(MEMORIES, headers={"X-Cache-Salt": salt})) == (400, "TenantError")
    assert client.get(MEMORIES, headers=[("X-Cache-Salt", "s"), ("x-cache-salt", "t")]).status_code == 400


def test_bodies_pass_as_they_are_where_clients_choose_their_salts(client: TestClient) -> None:
    body = b'{"cache_salt": "s",  "prompt": "x", "memory_read": NaN}'
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "text/plain"})
    assert answer.json()["body"]["cache_salt"] == "s"
    assert answer.json()["length"] == str(len(body))


def test_an_unknown_memory_is_told_before_the_engine_is_asked(client: TestClient, library: MemoryLibrary) -> None:
    append(library, "a", 1, tenant=tenant_folder("s"))
    write = library.begin_write(tenant_folder("s"), "new", 1)

    def post(read: Any, salt: str | None) -> Any:
        return client.post("/v1/completions", json={"cache_salt": salt, "vllm_xargs": {"memory_read": read}})

    assert post(["a", "new"], "s").status_code == 200
    assert post("a", "s").status_code == 200
    assert kind(post(["a"], None)) == (404, "UnknownMemoryError")
    assert kind(post("a", "t")) == (404, "UnknownMemoryError")
    assert kind(post(["a", "b"], "s")) == (404, "UnknownMemoryError")
    assert kind(post(["../a"], "s")) == (400, "MemoryNameError")
    for odd in (3, [3], {}, [["a"]], None, []):  # For vLLM to complain about.
        assert post(odd, "s").status_code in (200, 400)
    # Too many to read: vLLM's check says so, and the engine looks none of them up.
    assert post(["none"] * 17, "s").status_code == 200
    write.abandon()


def test_vllms_own_keys_guard_our_routes_too(library: MemoryLibrary) -> None:
    client = make_client(library, api_keys=("one", "two"))
    for path in (MEMORIES, "/memlong/stats", "/memlong/metrics", f"{MEMORIES}/a"):
        assert kind(client.get(path)) == (401, "AuthenticationError")
        assert client.get(path, headers=bearer("three")).status_code == 401
    assert client.get(MEMORIES, headers=bearer("two")).status_code == 200
    assert client.get("/health").status_code == 200
