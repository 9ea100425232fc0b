"""Named memories over HTTP: a real server, restarted, whose tenants are told apart in three ways."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from memlong_vllm.cli import main as console
from memlong_vllm.endpoints.metrics import COUNTERS, GAUGES
from memlong_vllm.memories.names import tenant_salt
from tests.checkpoints import novel
from tests.test_server import Server

MEMORIES = "/memlong/memories"
TOLERANCE = 1e-4
CHUNK = 16
QUOTA_GIB = 0.002
KEYS = {"key-of-alice": "alice", "key-of-bob": "bob"}
ALICE, BOB = tenant_salt("alice"), tenant_salt("bob")
# Routes of vLLM and ours that tenants have; no other of the server's description may answer them.
SERVED = {
    *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages"),
    *("/v1/messages/count_tokens", "/v1/models", "/tokenize", "/detokenize", "/load", "/health", "/ping", "/version"),
    *("/metrics", "/memlong/stats", "/memlong/metrics", "/memlong/memories", "/memlong/memories/{name}"),
    *("/memlong/memories/{name}/archive", "/memlong/memories/{name}/index"),
}
AS_ALICE, AS_BOB = {"Authorization": "Bearer key-of-alice"}, {"Authorization": "Bearer key-of-bob"}
WRITTEN, ASKED = novel()[40_000:41_500], novel()[90_000:90_400]


class Stage:
    """One memory folder and the server that has it now. Alice has the memory "book".

    Attributes:
        without, with_memory: log-probabilities of the answer without and with that memory.
        archive: of that memory.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._server: Server | None = None
        self._settings: dict[str, Any] | None = None
        (folder / "keys.json").write_text(json.dumps(KEYS))
        self.without: list[float] = []
        self.with_memory: list[float] = []
        self.archive = b""

    def write_book(self) -> None:
        server = self.with_own_salts()
        self.without = logprobs(server, ASKED, cache_salt=ALICE)
        logprobs(server, WRITTEN, cache_salt=ALICE, memory_write="book")
        written(server, "book", **salt(ALICE))
        self.with_memory = logprobs(server, ASKED, cache_salt=ALICE, memory_read=["book"])
        answer = server.http.get(f"{MEMORIES}/book/archive", headers=salt(ALICE))
        self.archive = answer.raise_for_status().content

    def server(self, **settings: Any) -> Server:
        """A server with these tenants; the one before, if it had others, is stopped."""
        if self._server is None or self._settings != settings:
            self.stop()
            number = len(list(self._folder.glob("log*")))
            limits = {"memory_quota_gib": QUOTA_GIB, "memory_quota_names": 3}
            memlong = {"memory_dir": str(self._folder / "memories")} | limits | settings
            log = self._folder / f"log{number}.txt"
            self._settings = settings
            self._server = Server(self._model, log, "--model", str(self._model), memlong=memlong)
            self._server.wait_until_ready()
        return self._server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def with_own_salts(self) -> Server:
        return self.server()

    def with_header(self) -> Server:
        return self.server(tenant_header="X-Team")

    def with_keys(self) -> Server:
        return self.server(tenant_keys=str(self._folder / "keys.json"))


@pytest.fixture(scope="module")
def stage(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    running = Stage(checkpoints.memlong(), tmp_path_factory.mktemp("http"))
    try:
        running.write_book()
        yield running
    finally:
        running.stop()


def post(server: Server, prompt: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """A completion with log-probabilities; ``memory_…`` go where they belong."""
    arguments = {name: fields.pop(name) for name in list(fields) if name.startswith("memory_")}
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    body |= fields | ({"vllm_xargs": arguments} if arguments else {})
    return server.http.post("/v1/completions", json=body, headers=headers)


def logprobs(server: Server, prompt: str, headers: dict[str, str] | None = None, **fields: Any) -> list[float]:
    answer = post(server, prompt, headers, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"]


def first_line(server: Server, *head: str) -> str:
    """Of the answer to a request whose body never comes."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall("\r\n".join([*head, "Host: x", "", ""]).encode())
        return connection.makefile().readline()


def written(server: Server, name: str, **headers: str) -> dict[str, Any]:
    """A memory once nothing is being written to it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = server.http.get(f"{MEMORIES}/{name}", headers=headers)
        if answer.status_code == 200 and not answer.json()["is_busy"]:
            return answer.json()
        time.sleep(0.05)
    return pytest.fail(f"{name} was not written: {answer.text}")


def names(server: Server, **headers: str) -> list[str]:
    answer = server.http.get(MEMORIES, headers=headers).raise_for_status().json()
    return [entry["name"] for entry in answer["data"]]


def salt(value: str) -> dict[str, str]:
    return {"X-Cache-Salt": value}


# Clients choose their salts.


def test_what_one_request_writes_another_reads(stage: Stage) -> None:
    server = stage.with_own_salts()
    shown = written(server, "book", **salt(ALICE))
    assert shown["num_chunks"] > 10
    assert shown["num_tokens"] == CHUNK * shown["num_chunks"]
    assert stage.with_memory != pytest.approx(stage.without, abs=100 * TOLERANCE)
    again = logprobs(server, ASKED, cache_salt=ALICE, memory_read="book")
    assert again == pytest.approx(stage.with_memory, abs=TOLERANCE)
    assert logprobs(server, ASKED, cache_salt=ALICE) == pytest.approx(stage.without, abs=TOLERANCE)


def test_another_request_appends_and_a_deleted_memory_is_gone(stage: Stage) -> None:
    server = stage.with_own_salts()
    logprobs(server, WRITTEN, memory_write="own")
    before = written(server, "own")
    logprobs(server, ASKED, memory_write="own")
    after = written(server, "own")
    assert [part["num_chunks"] for part in after["parts"]][:1] == [before["num_chunks"]]
    assert after["num_chunks"] > before["num_chunks"]
    assert names(server) == ["own"]
    assert names(server, **salt(ALICE)) == ["book"]
    assert server.http.delete(f"{MEMORIES}/own").json() == {"name": "own", "deleted": True}
    assert names(server) == []
    assert post(server, ASKED, memory_read=["own"]).status_code == 404


def test_a_copy_answers_the_same_under_another_name_tenant_and_index(stage: Stage) -> None:
    server = stage.with_own_salts()
    made = server.http.put(f"{MEMORIES}/copy", content=stage.archive, headers=salt("carol"))
    assert made.status_code == 201, made.text
    copied = logprobs(server, ASKED, cache_salt="carol", memory_read="copy")
    assert copied == pytest.approx(stage.with_memory, abs=TOLERANCE)
    answer = server.http.post(f"{MEMORIES}/copy/index", json={"factory": "HNSW16"}, headers=salt("carol"))
    assert answer.json()["index"] == {"factory": "HNSW16", "parameters": {}}
    found = logprobs(server, ASKED, cache_salt="carol", memory_read="copy")
    assert found == pytest.approx(stage.with_memory, abs=TOLERANCE)


def test_whoever_does_not_know_the_salt_finds_nothing(stage: Stage) -> None:
    server = stage.with_own_salts()
    for headers in ({}, salt("mallory"), salt(ALICE.upper()), salt(f"{ALICE} x")):
        assert "book" not in names(server, **headers)
        for call in ("GET", "DELETE"):
            assert server.http.request(call, f"{MEMORIES}/book", headers=headers).status_code == 404
        assert server.http.get(f"{MEMORIES}/book/archive", headers=headers).status_code == 404
        assert server.http.post(f"{MEMORIES}/book/index", json={"factory": "Flat"}, headers=headers).status_code == 404
    for fields in ({}, {"cache_salt": "mallory"}, {"Cache_Salt": ALICE}):
        answer = post(server, ASKED, salt(ALICE), memory_read=["book"], **fields)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "UnknownMemoryError")
    assert names(server, **salt(ALICE)) == ["book"]


@pytest.mark.parametrize("name", ["..", "..%2f..%2fetc", "%2e%2e%2fx", "a%2fb", "caf%C3%A9", "a%00", "-a", "x" * 65])
def test_names_that_are_paths_or_worse(stage: Stage, name: str) -> None:
    server = stage.with_own_salts()
    before = names(server)
    for call in ("GET", "DELETE", "PUT"):
        answer = server.http.request(call, f"{MEMORIES}/{name}", content=stage.archive if call == "PUT" else None)
        assert answer.status_code in (400, 404, 405)
    assert names(server) == before


@pytest.mark.parametrize("name", ["../book", "a/b", "café", "a\u0000", ""])
def test_requests_with_such_names(stage: Stage, name: str) -> None:
    server = stage.with_own_salts()
    assert "memory_write" in post(server, ASKED, memory_write=name).json()["error"]["message"]
    assert post(server, ASKED, memory_write=name).status_code == 400
    assert post(server, ASKED, memory_read=[name]).status_code == 400


def test_quotas(stage: Stage) -> None:
    server = stage.with_own_salts()
    taken = server.http.put(f"{MEMORIES}/book", content=stage.archive, headers=salt(ALICE))
    assert (taken.status_code, taken.json()["error"]["type"]) == (409, "MemoryExistsError")
    for i in range(3):
        made = server.http.put(f"{MEMORIES}/copy{i}", content=stage.archive, headers=salt("dave"))
        assert made.status_code == 201, made.text
    full = server.http.put(f"{MEMORIES}/copy3", content=stage.archive, headers=salt("dave"))
    assert (full.status_code, full.json()["error"]["type"]) == (413, "QuotaExceededError")
    assert post(server, WRITTEN, cache_salt="dave", memory_write="another").status_code == 500
    assert len(names(server, **salt("dave"))) == 3
    assert "413" in first_line(server, f"PUT {MEMORIES}/huge HTTP/1.1", "Content-Length: 99999999999999")
    assert post(server, ASKED).status_code == 200


def test_a_text_is_imported_by_the_command(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is longer than the model takes at once."""
    server = stage.with_own_salts()
    (tmp_path / "long.txt").write_text(novel()[:7000])
    arguments = ["import", "long", str(tmp_path / "long.txt"), "--url", server.url, "--cache-salt", "frank", "--json"]
    monkeypatch.setattr("sys.argv", ["memlong-vllm", "memory", *arguments])
    assert console.main() == 0
    output = capsys.readouterr()
    shown = json.loads(output.out)
    assert len(shown["parts"]) == 2
    assert shown["parts"][0]["num_chunks"] == 2047 // CHUNK
    assert f"{shown['num_tokens']:,} of {shown['num_tokens']:,} tokens" in output.err
    assert names(server, **salt("frank")) == ["long"]


def test_metrics(stage: Stage) -> None:
    server = stage.with_own_salts()
    logprobs(server, WRITTEN, cache_salt="gina", memory_write="counted")
    written(server, "counted", **salt("gina"))
    assert set(server.stats()) <= {*COUNTERS, *GAUGES}
    text = server.http.get("/memlong/metrics").raise_for_status().text
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers["memlong_named_chunks_saved_total"]) > 10
    assert float(numbers["memlong_running"]) == 0
    server.assert_becomes_empty()


# API keys tell tenants apart.


def test_keys_are_needed(stage: Stage) -> None:
    server = stage.with_keys()
    for path in ("/health", "/version", "/metrics", "/ping"):
        assert server.http.get(path).status_code == 200
    for path in ("/v1/models", "/memlong/stats", "/memlong/metrics", MEMORIES):
        for headers in ({}, {"Authorization": "Bearer nobody"}):
            assert server.http.get(path, headers=headers).status_code == 401
        assert server.http.get(path, headers=AS_BOB).status_code == 200
    assert post(server, ASKED).status_code == 401


def test_a_key_reaches_its_tenants_memories_and_no_others(stage: Stage) -> None:
    """They are those that were written before the restart."""
    server = stage.with_keys()
    found = logprobs(server, ASKED, AS_ALICE, memory_read=["book"])
    assert found == pytest.approx(stage.with_memory, abs=TOLERANCE)
    assert names(server, **AS_ALICE) == ["book"]
    assert names(server, **AS_BOB, **salt(ALICE)) == []
    assert post(server, ASKED, AS_BOB, memory_read=["book"], cache_salt=ALICE).status_code == 404
    made = server.http.put(f"{MEMORIES}/mine", content=stage.archive, headers=AS_BOB)
    assert made.status_code == 201
    assert logprobs(server, ASKED, AS_BOB, memory_read=["mine"]) == pytest.approx(stage.with_memory, abs=TOLERANCE)
    assert server.http.delete(f"{MEMORIES}/mine", headers=AS_BOB).status_code == 200


def test_chat_and_streams_have_their_tenant_too(stage: Stage) -> None:
    server = stage.with_keys()
    messages = [{"role": "user", "content": ASKED}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "vllm_xargs": {"memory_read": ["book"]}}
    for path in ("/v1/chat/completions", "/v1/messages"):
        assert server.http.post(path, json=body, headers=AS_ALICE).status_code == 200
        assert server.http.post(path, json=body | {"cache_salt": ALICE}, headers=AS_BOB).status_code == 404
    with server.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}, headers=AS_ALICE) as stream:
        assert stream.status_code == 200
        assert "[DONE]" in stream.read().decode()
    answer = server.http.post(
        "/v1/responses", json={"model": "tiny", "input": "a", "max_output_tokens": 4}, headers=AS_BOB
    )
    assert answer.status_code == 200


def test_other_routes_of_vllm_that_tenants_have(stage: Stage) -> None:
    server = stage.with_keys()
    tokens = server.http.post("/tokenize", json={"model": "tiny", "prompt": "a b"}, headers=AS_BOB).json()["tokens"]
    text = server.http.post("/detokenize", json={"model": "tiny", "tokens": tokens}, headers=AS_BOB).json()["prompt"]
    assert text.split()[-2:] == ["a", "b"]
    messages = [{"role": "user", "content": "a"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 2}
    counted = server.http.post("/v1/messages/count_tokens", json=body, headers=AS_BOB)
    assert counted.json()["input_tokens"] > 0
    batch = body | {"messages": [messages, messages], "vllm_xargs": {"memory_read": ["book"]}}
    assert server.http.post("/v1/chat/completions/batch", json=batch, headers=AS_ALICE).status_code == 200
    batch["cache_salt"] = ALICE
    assert server.http.post("/v1/chat/completions/batch", json=batch, headers=AS_BOB).status_code == 404
    assert server.http.get("/load", headers=AS_BOB).status_code == 200


def test_what_else_a_tenant_might_try(stage: Stage) -> None:
    server = stage.with_keys()
    read = '"model": "tiny", "prompt": "a", "vllm_xargs": {"memory_read": ["book"]}'
    twice = f'{{"cache_salt": "{ALICE}", {read}, "cache_salt": "{ALICE}"}}'
    json_type = {"Content-Type": "application/json"}
    for content, headers, status in (
        (twice, json_type, 404),
        (f"[{twice}, {twice}]", json_type, 400),
        (twice, {"Content-Type": "text/plain"}, 415),
        ("{", json_type, 400),
    ):
        answer = server.http.post("/v1/completions", content=content, headers=AS_BOB | headers)
        assert answer.status_code == status
    chunked = server.http.post("/v1/completions", content=iter([twice.encode()]), headers=AS_BOB | json_type)
    assert chunked.status_code == 404
    for path in ("/invocations", "/generative_scoring", "/v1/systemone", "/inference/v1/generate", "/cohere/v2/chat"):
        answer = server.http.post(path, json=json.loads(twice), headers=AS_BOB)
        assert (path, answer.status_code) == (path, 403)
    for path in sorted(server.http.get("/openapi.json", headers=AS_BOB).json()["paths"].keys() - SERVED):
        for call in ("GET", "POST"):
            answer = server.http.request(call, path.replace("{", "").replace("}", ""), json={}, headers=AS_BOB)
            assert (path, answer.status_code) == (path, 403)
    server_stats = server.http.get("/memlong/stats", headers=AS_BOB).json()
    assert server_stats["running"] == server_stats["waiting"] == 0


# A gateway's header tells tenants apart.


@pytest.mark.slow
def test_the_header_is_all_that_counts(stage: Stage) -> None:
    server, erin, frank = stage.with_header(), {"X-Team": "erin"}, {"X-Team": "frank"}
    others = tenant_salt("erin")
    for headers in ({}, salt(others), {"X-Team": ""}):
        assert post(server, ASKED, headers, cache_salt=others).status_code == 400
        assert server.http.get(MEMORIES, headers=headers).status_code == 400
    logprobs(server, WRITTEN, erin, memory_write="book")
    num_chunks = written(server, "book", **erin)["num_chunks"]
    without = logprobs(server, ASKED, erin)
    assert logprobs(server, ASKED, {"x-team": "erin"}, memory_read=["book"]) != pytest.approx(without, abs=1e-2)
    assert post(server, ASKED, frank, cache_salt=others, memory_read=["book"]).status_code == 404
    assert names(server, **frank, **salt(others)) == []
    logprobs(server, WRITTEN[:500], frank, cache_salt=others, memory_write="book")
    assert written(server, "book", **frank)["num_chunks"] < num_chunks
    assert server.http.delete(f"{MEMORIES}/book", headers=frank).status_code == 200
    assert names(server, **erin) == ["book"]
