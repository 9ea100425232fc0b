"""Routes of named memories and the middleware before them, over a real library, without an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from memlong_vllm.config import MemoryConfigError
from memlong_vllm.endpoints import middleware
from memlong_vllm.endpoints.archives import FOLDER, ArchiveTransfers
from memlong_vllm.endpoints.errors import EndpointError
from memlong_vllm.endpoints.tenants import HeaderTenants, KeyTenants, OwnSalts
from memlong_vllm.memories.library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder, tenant_salt
from memlong_vllm.memories.quota import Quota
from tests.endpoints_app import STATS, make_client
from tests.memory_files import FORMAT, PLENTY, append, read

KEYS = {"key-of-alice": "alice", "key-of-alices-phone": "alice", "key-of-bob": "bob"}
MEMORIES = "/memlong/memories"
ALICE, BOB = tenant_salt("alice"), tenant_salt("bob")


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened:
        yield opened


@pytest.fixture
def client(library: MemoryLibrary) -> TestClient:
    return make_client(library, memory_dir=library._root)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def kind(response: Any) -> tuple[int, str]:
    """Status and type of an error in OpenAI's shape."""
    error = response.json()["error"]
    assert error["message"]
    assert error["code"] == response.status_code
    return response.status_code, error["type"]


def names(client: TestClient, **headers: str) -> list[str]:
    answer = client.get(MEMORIES, headers=headers)
    assert answer.status_code == 200
    return [entry["name"] for entry in answer.json()["data"]]


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
    write.abandon()


def test_vllms_own_keys_guard_our_routes_too(library: MemoryLibrary) -> None:
    client = make_client(library, api_keys=("one", "two"))
    for path in (MEMORIES, "/memlong/stats", "/memlong/metrics", f"{MEMORIES}/a"):
        assert kind(client.get(path)) == (401, "AuthenticationError")
        assert client.get(path, headers=bearer("three")).status_code == 401
    assert client.get(MEMORIES, headers=bearer("two")).status_code == 200
    assert client.get("/health").status_code == 200


# Tenants by key.


@pytest.fixture
def keyed(library: MemoryLibrary, tmp_path: Path) -> TestClient:
    (tmp_path / "keys.json").write_text(json.dumps(KEYS))
    tenancy = KeyTenants.read(str(tmp_path / "keys.json"))
    return make_client(library, tenancy=tenancy, memory_dir=library._root)


def salt_of(client: TestClient, body: Any, **headers: str) -> Any:
    answer = client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["length"] == str(len(json.dumps(answer.json()["body"])))
    return answer.json()["body"]["cache_salt"]


def test_a_key_is_needed_for_everything_but_health(keyed: TestClient) -> None:
    assert keyed.get("/health").status_code == 200
    for headers in ({}, bearer("nobody's"), bearer(""), {"Authorization": "Basic key-of-bob"}, bearer("KEY-OF-BOB")):
        for path in (MEMORIES, "/memlong/stats", "/memlong/metrics", "/v1/models", "/nothing"):
            assert kind(keyed.get(path, headers=headers)) == (401, "AuthenticationError")
        assert keyed.post("/v1/completions", json={}, headers=headers).status_code == 401
    twice = [("Authorization", "Bearer key-of-bob"), ("Authorization", "Bearer key-of-alice")]
    assert keyed.get(MEMORIES, headers=twice).status_code == 400
    assert keyed.get(MEMORIES, headers={"authorization": "bearer key-of-bob"}).status_code == 200
    assert keyed.get("/v1/models", headers=bearer("key-of-bob")).status_code == 200


def test_the_key_decides_on_the_salt(keyed: TestClient) -> None:
    assert salt_of(keyed, {"prompt": "x"}, **bearer("key-of-alice")) == ALICE
    assert salt_of(keyed, {"cache_salt": BOB}, **bearer("key-of-alices-phone")) == ALICE
    assert salt_of(keyed, {"cache_salt": None}, **bearer("key-of-bob")) == BOB
    assert ALICE != BOB


def test_keys_separate_memories(keyed: TestClient, library: MemoryLibrary) -> None:
    append(library, "a", 1, tenant=tenant_folder(ALICE))
    append(library, "b", 2)
    assert names(keyed, **bearer("key-of-alice")) == ["a"]
    assert names(keyed, **bearer("key-of-bob")) == []
    bob = bearer("key-of-bob") | {"X-Cache-Salt": ALICE}
    assert keyed.get(f"{MEMORIES}/a", headers=bob).status_code == 404
    assert keyed.delete(f"{MEMORIES}/a", headers=bob).status_code == 404
    assert keyed.get(f"{MEMORIES}/a/archive", headers=bob).status_code == 404
    body = {"cache_salt": ALICE, "vllm_xargs": {"memory_read": "a"}}
    assert keyed.post("/v1/completions", json=body, headers=bob).status_code == 404
    assert keyed.post("/v1/completions", json=body, headers=bearer("key-of-alice")).status_code == 200


TRICKS = [
    (b'{"cache_salt": "%b", "cache_salt": "%b"}', 200),
    (b'{"cache\\u005fsalt": "%b", "CACHE_SALT": "%b"}', 200),
    (b'[{"cache_salt": "%b"}, {"cache_salt": "%b"}]', 400),
    (b'{"cache_salt": "%b"}{"cache_salt": "%b"}', 400),
    (b'"%b%b"', 400),
    (b'{"a": "%b%b", "n": NaN}', 400),
    (b'{"a": "%b%b", "n": 1e999}', 400),
    (b'{"previous_response_id": "%b%b"}', 400),
    (b'{"cache_salt": "%b%b"', 400),
]


@pytest.mark.parametrize(("body", "status"), TRICKS)
def test_tricks_with_bodies(keyed: TestClient, body: bytes, status: int) -> None:
    content = body.replace(b"%b", ALICE.encode())
    headers = bearer("key-of-bob") | {"Content-Type": "application/json"}
    answer = keyed.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == status
    if status == 200:
        assert answer.json()["body"]["cache_salt"] == BOB


def test_other_encodings_and_chunked_bodies(keyed: TestClient) -> None:
    headers = bearer("key-of-bob") | {"Content-Type": "Application/JSON; charset=utf-16"}
    text = json.dumps({"cache_salt": ALICE, "prompt": "ä"})
    for content in (text.encode("utf-16"), text.encode("utf-8-sig"), (text.encode()[i : i + 9] for i in (0, 9))):
        answer = keyed.post("/v1/completions", content=content, headers=headers)
        if answer.status_code == 200:
            assert answer.json()["body"] == {"cache_salt": BOB, "prompt": "ä"}
    pieces = [text.encode()[i : i + 9] for i in range(0, len(text), 9)]
    answer = keyed.post("/v1/completions", content=iter(pieces), headers=headers)
    assert answer.json()["body"] == {"cache_salt": BOB, "prompt": "ä"}


def test_other_content_types_are_refused(keyed: TestClient) -> None:
    for kind_of_content in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""):
        headers = bearer("key-of-bob") | {"Content-Type": kind_of_content}
        assert keyed.post("/v1/completions", content=b"{}", headers=headers).status_code == 415


def test_large_and_deep_bodies_are_refused(keyed: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", 200_000)
    headers = bearer("key-of-bob") | {"Content-Type": "application/json"}
    deep = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
    assert keyed.post("/v1/completions", content=deep, headers=headers).status_code == 400
    large = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    assert keyed.post("/v1/completions", content=large, headers=headers).status_code == 413
    assert keyed.post("/v1/completions", content=iter([large]), headers=headers).status_code == 413


def test_routes_that_cannot_carry_a_salt_are_refused(keyed: TestClient) -> None:
    headers = bearer("key-of-bob")
    for path in ("/invocations", "/generative_scoring", "/v1/audio/transcriptions", "/v1/completions/", "//v1/x"):
        assert kind(keyed.post(path, json={}, headers=headers)) == (403, "TenantError")
    assert keyed.get("/v1/responses/abc", headers=headers).status_code == 403
    assert keyed.get("/v1/completions", headers=headers).status_code == 403
    with pytest.raises(WebSocketDisconnect), keyed.websocket_connect("/v1/realtime", headers=headers):
        pass
    with pytest.raises(WebSocketDisconnect), keyed.websocket_connect("/health"):
        pass


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"a": 1}', '{"": "a"}', '{"a": ""}', '{"a b": "c"}', '{"ä": "b"}']
)
def test_files_of_keys_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(MemoryConfigError, match="tenant_keys"):
        KeyTenants.read(str(tmp_path / "keys.json"))
    with pytest.raises(MemoryConfigError, match="tenant_keys"):
        KeyTenants.read(str(tmp_path / "none.json"))


# Tenants by header.


def test_a_header_separates_memories(library: MemoryLibrary) -> None:
    client = make_client(library, tenancy=HeaderTenants("X-Team"), memory_dir=library._root)
    append(library, "a", 1, tenant=tenant_folder(ALICE))
    assert names(client, **{"X-TEAM": "alice"}) == ["a"]
    assert names(client, **{"x-team": "bob"}) == []
    assert names(client, **{"x-team": "Alice"}) == []
    assert salt_of(client, {"cache_salt": BOB}, **{"X-Team": "alice"}) == ALICE
    for headers in ({}, {"X-Cache-Salt": ALICE}, {"X-Team": ""}):
        assert kind(client.get(MEMORIES, headers=headers)) == (400, "TenantError")
        assert kind(client.post("/v1/completions", json={}, headers=headers)) == (400, "TenantError")
    assert client.get(MEMORIES, headers=[("X-Team", "alice"), ("x-team", "bob")]).status_code == 400
    assert client.get("/memlong/stats").status_code == 200
    assert client.get("/v1/models").status_code == 200
    assert client.post("/invocations", json={}, headers={"X-Team": "alice"}).status_code == 403


def test_a_header_needs_a_name() -> None:
    for name in ("", "a b", "x:", "ä"):
        with pytest.raises(MemoryConfigError, match="tenant_header"):
            HeaderTenants(name)
