"""``vllm serve`` over HTTP: the server a user starts, and the load a user puts on it."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.checkpoints import novel

OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
OPTIONS += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-batched-tokens", "256", "--served-model-name", "tiny"]
START_DEADLINE_S = 300


class Server:
    """``vllm serve`` in processes of its own.

    Args:
        log: file for what it prints.
        memlong: deployment settings.
    """

    def __init__(self, model: Path, log: Path, *arguments: str, memlong: dict[str, Any] | None = None) -> None:
        # Kept, so that nobody else is given the port; vLLM's server binds it as well.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._port.getsockname()[1]}"
        command = [str(Path(sys.executable).parent / "vllm"), "serve", *arguments, "--trust-remote-code", *OPTIONS]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        command += ["--additional-config", json.dumps({"memlong": {"bank_gib": 0.1} | (memlong or {})})]
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment |= {"VLLM_PLUGINS": "memlong,memlong_endpoints"}
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, max_retries=0)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self._log.read_text()[-5000:]}")

    def stats(self) -> dict[str, int]:
        return self.http.get("/memlong/stats").raise_for_status().json()

    def assert_becomes_empty(self) -> None:
        """The engine notices the end of a request a step later, so ask until a deadline."""
        names = ("running", "waiting", "sequences", "slots_used", "kv_blocks_used", "pending_embeddings")
        deadline = time.monotonic() + 30
        while any(self.stats()[name] for name in names) and time.monotonic() < deadline:
            time.sleep(0.1)
        stats = self.stats()
        assert {name: stats[name] for name in names} == dict.fromkeys(names, 0)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._port.close()


@pytest.fixture(scope="module")
def server(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = checkpoints.memlong()
    started = Server(model, tmp_path_factory.mktemp("server") / "log.txt", "--model", str(model))
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


def complete(server: Server, prompt: str, **options: Any) -> str:
    defaults = {"max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return server.client.completions.create(model="tiny", prompt=prompt, **(defaults | options)).choices[0].text


def test_completion_and_streaming_agree(server: Server) -> None:
    prompt = novel()[5000:6500]
    whole = complete(server, prompt)
    assert whole
    stream = server.client.completions.create(
        model="tiny", prompt=prompt, max_tokens=24, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [event.choices[0].text for event in stream]
    assert len(pieces) > 5
    assert "".join(pieces) == whole
    server.assert_becomes_empty()


def test_chat(server: Server) -> None:
    messages = [{"role": "user", "content": novel()[7000:8000]}]
    answer = server.client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 8
    stream = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, stream=True)
    assert sum(1 for _ in stream) > 1
    server.assert_becomes_empty()


def test_twenty_ragged_requests_at_once(server: Server) -> None:
    text = novel()
    prompts = [text[i * 900 : i * 900 + 150 + 97 * i] for i in range(20)]
    alone = [complete(server, prompt) for prompt in prompts[::5]]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt), prompts))
    assert together[::5] == alone
    server.assert_becomes_empty()


def test_a_client_that_hangs_up(server: Server) -> None:
    body = {"model": "tiny", "prompt": novel()[:1500], "max_tokens": 1200, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
        assert server.stats()["running"] == 1
        assert server.stats()["slots_used"] > 0
    server.assert_becomes_empty()


def test_settings_of_a_request(server: Server) -> None:
    """They reach the engine: another memory gives other probabilities, and what cannot be is named."""

    def likelihood(**settings: Any) -> float:
        options = {"vllm_xargs": settings, "ignore_eos": True}
        answer = server.client.completions.create(
            model="tiny", prompt=novel()[5000:6500], max_tokens=1, temperature=0, logprobs=1, extra_body=options
        )
        return answer.choices[0].logprobs.token_logprobs[0]

    by_default = likelihood()
    assert likelihood(memory_size=512, top_k=2) == pytest.approx(by_default, abs=1e-4)
    found = sorted([by_default, likelihood(top_k=1), likelihood(memory_size=0)])
    assert min(found[1] - found[0], found[2] - found[1]) > 1e-3
    for settings, message in (
        ({"memory_size": 8}, "memory_size"),
        ({"top_k": 99}, "top_k"),
        ({"memory_seize": 0}, "seize"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            likelihood(**settings)
    server.assert_becomes_empty()


def test_beam_search(server: Server) -> None:
    """As vLLM does it: every token of every beam is a request. They get no settings, so none are taken."""
    beams = {"use_beam_search": True, "ignore_eos": True}
    answer = server.client.completions.create(
        model="tiny", prompt=novel()[5000:6500], n=2, max_tokens=4, temperature=0, extra_body=beams
    )
    assert len({choice.text for choice in answer.choices}) == 2
    with pytest.raises(openai.BadRequestError, match=r"use_beam_search.*memory_write"):
        complete(server, novel()[:1500], extra_body=beams | {"vllm_xargs": {"memory_write": "book"}})
    with pytest.raises(openai.BadRequestError, match=r"use_beam_search.*top_k"):
        server.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}], extra_body=beams | {"vllm_xargs": {"top_k": 1}}
        )
    server.assert_becomes_empty()


def test_invalid_requests_change_nothing(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="2048"):
        complete(server, novel()[:50000])
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        complete(server, "a", max_tokens=-3)
    assert complete(server, novel()[:300])
    server.assert_becomes_empty()
