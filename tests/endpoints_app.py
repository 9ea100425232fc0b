"""Our HTTP routes over a real library, beside routes that show what reaches vLLM's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from starlette.testclient import TestClient

from memlong_vllm.endpoints import attach
from memlong_vllm.endpoints.archives import ArchiveTransfers
from memlong_vllm.endpoints.engine import EngineMemories
from memlong_vllm.endpoints.state import MemLongState
from memlong_vllm.endpoints.tenants import OwnSalts, Tenancy, ring_of
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.operations import perform

MEMORIES = "/memlong/memories"
STATS = {"running": 1, "holds": 3, "held_seconds": 0.5, "something_new": 7}


class LibraryCore:
    """The engine's end of the wire."""

    def __init__(self, library: MemoryLibrary) -> None:
        self._library = library

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        if method == "memlong_stats":
            return STATS
        operation, arguments = json.loads(json.dumps(args))
        return json.loads(json.dumps(perform(self._library, operation, arguments)))


def make_app(
    library: MemoryLibrary,
    tenancy: Tenancy | None = None,
    memory_dir: Path | None = None,
    max_bytes: int | None = None,
    api_keys: tuple[str, ...] = (),
) -> FastAPI:
    app = FastAPI()

    async def echo(request: Request) -> dict[str, Any]:
        return {"body": await request.json(), "length": request.headers.get("content-length")}

    for path in ("/v1/completions", "/v1/chat/completions", "/invocations", "/generative_scoring"):
        app.post(path)(echo)

    @app.get("/health")
    @app.get("/v1/models")
    @app.get("/v1/responses/{name}")
    async def nothing(name: str = "") -> dict[str, Any]:
        return {}

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    attach(app)
    app.state.memlong = MemLongState(
        engine=EngineMemories(LibraryCore(library)),
        tenancy=tenancy or OwnSalts(),
        api_keys=ring_of(api_keys),
        archives=ArchiveTransfers(None if memory_dir is None else str(memory_dir), max_bytes),
    )
    return app


def make_client(library: MemoryLibrary, **options: Any) -> TestClient:
    return TestClient(make_app(library, **options))


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
