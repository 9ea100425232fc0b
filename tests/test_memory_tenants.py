"""Who a call's tenant is, by key or header, and that no body or header says otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from memlong_vllm.config import MemoryConfigError
from memlong_vllm.endpoints import middleware
from memlong_vllm.endpoints.tenants import HeaderTenants, KeyTenants
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder, tenant_salt
from tests.endpoints_app import MEMORIES, bearer, kind, make_client, names
from tests.memory_files import FORMAT, PLENTY, append

KEYS = {"key-of-alice": "alice", "key-of-alices-phone": "alice", "key-of-bob": "bob"}
# Close code of a refused web socket, RFC 6455 section 7.4.1; one without a route is closed with 1000.
POLICY_VIOLATION = 1008
ALICE, BOB = tenant_salt("alice"), tenant_salt("bob")


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened:
        yield opened


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
    for content in (text.encode("utf-16"), text.encode("utf-8-sig")):
        answer = keyed.post("/v1/completions", content=content, headers=headers)
        assert answer.json()["body"] == {"cache_salt": BOB, "prompt": "ä"}
    cut_short = (text.encode()[i : i + 9] for i in (0, 9))
    assert keyed.post("/v1/completions", content=cut_short, headers=headers).status_code == 400
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
    for path in ("/v1/realtime", "/health"):
        with pytest.raises(WebSocketDisconnect) as closed, keyed.websocket_connect(path, headers=headers):
            pass
        assert closed.value.code == POLICY_VIOLATION


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
