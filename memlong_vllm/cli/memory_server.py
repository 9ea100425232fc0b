"""The memories of a running server, for ``memlong-vllm memory --url``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from memlong_vllm.endpoints.tenants import CACHE_SALT_HEADER
from memlong_vllm.memories.errors import MemoryLibraryError, UnknownMemoryError
from memlong_vllm.named import Memory, error_of, memory_params, num_chunks, split, wait_until_written

MEMORIES = "/memlong/memories"
_BLOCK_BYTES = 1 << 20
# A long prompt takes as long as it takes; only a connection must come about soon.
_TIMEOUT = httpx.Timeout(None, connect=30.0)


class ServerMemories:
    """Memories over HTTP.

    Args:
        url: of the server, for example ``http://localhost:8000``.
        headers: that say who is calling.
        cache_salt: whose memories they are, where clients choose their salts.
    """

    def __init__(self, url: str, headers: dict[str, str], cache_salt: str | None) -> None:
        self._salt = cache_salt
        if cache_salt is not None:
            headers = headers | {CACHE_SALT_HEADER: cache_salt}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._http = httpx.Client(base_url=url, headers=encoded, timeout=_TIMEOUT)

    def __enter__(self) -> ServerMemories:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def list(self) -> list[Memory]:
        return self._call("GET", MEMORIES)["data"]

    def show(self, name: str) -> Memory:
        return self._call("GET", _path(name))

    def delete(self, name: str) -> None:
        self._call("DELETE", _path(name))

    def set_index(self, name: str, factory: str, parameters: dict[str, int]) -> Memory:
        return self._call("POST", _path(name) + "/index", json={"factory": factory, "parameters": parameters})

    def import_archive(self, name: str, source: Path) -> Memory:
        with source.open("rb") as file:
            size = {"Content-Length": str(source.stat().st_size)}
            return self._call("PUT", _path(name), content=file, headers=size)

    def export_archive(self, name: str, target: Path) -> None:
        """Write an archive to a file, which appears complete or not at all."""
        unfinished = target.with_name(target.name + ".part")
        try:
            with self._http.stream("GET", _path(name) + "/archive") as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise _error(answer)
                with unfinished.open("wb") as file:
                    for block in answer.iter_bytes(_BLOCK_BYTES):
                        file.write(block)
            unfinished.replace(target)
        except httpx.HTTPError as error:
            raise MemoryLibraryError(f"{self._http.base_url}: {error}") from error
        finally:
            unfinished.unlink(missing_ok=True)

    def import_text(self, name: str, text: str) -> Iterator[tuple[int, int]]:
        """Append a text to a memory, which its pieces join one after the other.

        Yields:
            Tokens sent so far, and of all of them.
        """
        model = self._call("GET", "/v1/models")["data"][0]["id"]
        tokens = self._call("POST", "/tokenize", json={"model": model, "prompt": text})
        chunk_size = self._call("GET", MEMORIES)["chunk_size"]
        pieces = split(tokens["tokens"], chunk_size, tokens["max_model_len"])
        before, sent, total = num_chunks(self._find(name)), 0, sum(map(len, pieces))
        for piece in pieces:
            yield sent, total
            body = {"model": model, "prompt": piece, "max_tokens": 1, "temperature": 0}
            body |= {"vllm_xargs": memory_params(write=name)} | ({"cache_salt": self._salt} if self._salt else {})
            self._call("POST", "/v1/completions", json=body)
            sent += len(piece)
        wait_until_written(lambda: self._find(name), name, before + total // chunk_size)
        yield sent, total

    def _find(self, name: str) -> Memory | None:
        try:
            return self.show(name)
        except UnknownMemoryError:
            return None

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise MemoryLibraryError(f"{self._http.base_url}: {error}") from error
        if answer.status_code >= 400:
            raise _error(answer)
        return answer.json()


def _path(name: str) -> str:
    return f"{MEMORIES}/{quote(name, safe='')}"


def _error(answer: httpx.Response) -> MemoryLibraryError:
    try:
        error = answer.json()["error"]
        return error_of(error["message"], error["type"])
    except (ValueError, KeyError, TypeError):
        reason = (
            "is VLLM_PLUGINS=memlong,memlong_endpoints set there?" if answer.status_code == 404 else answer.text[:200]
        )
        return MemoryLibraryError(f"{answer.request.url}: the server answered {answer.status_code}: {reason}")
