"""What every HTTP call passes before vLLM's routes and ours: its tenant is found and set.

Where the server tells tenants apart, a call gets through only if it is known here that it cannot
reach another tenant's memories: routes that generate text have their ``cache_salt`` replaced, and
routes that are not listed below are refused.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memlong_vllm.endpoints.errors import EndpointError
from memlong_vllm.endpoints.state import MemLongState
from memlong_vllm.endpoints.tenants import RawHeaders, header
from memlong_vllm.memories.names import tenant_folder
from memlong_vllm.request_settings import MAX_READ

MAX_BODY_BYTES = 64 << 20
# Of vLLM 0.32. The first are the generating routes whose bodies have a cache_salt that reaches
# the engine; the next neither generate nor show anything of another client.
SALTED = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages"}
)
HARMLESS = frozenset(
    {"/v1/models", "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/load"}
    | {"/docs", "/redoc", "/openapi.json", "/memlong/stats", "/memlong/metrics"}
)
OPEN = frozenset({"/health", "/ping", "/version", "/metrics", "/metrics/"})
MEMORIES = "/memlong/memories"
OURS = "/memlong/"


class _Disconnected(Exception):
    pass


class MemLongMiddleware:
    """Pure ASGI. Leaves ``memlong_tenant``, the tenant's folder, in the state of memory routes' requests.

    Args:
        app: what it wraps.
        state: of the application; :class:`MemLongState` is its attribute ``memlong`` by the time
            of the first call.
    """

    def __init__(self, app: ASGIApp, state: Any) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            receive = await self._admit(scope, receive)
        except EndpointError as error:
            await _refuse(error, scope, receive, send)
            return
        except _Disconnected:
            return
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """Let a call through, with its tenant set. Returns where its body is to be read from."""
        state: MemLongState = self._state.memlong
        path, headers = _route_path(scope), scope["headers"]
        is_ours, is_memories = path.startswith(OURS), path == MEMORIES or path.startswith(MEMORIES + "/")
        if path in OPEN and scope["type"] == "http":
            return receive
        # vLLM checks its own keys on its own routes only.
        if is_ours and not state.tenancy.needs_key and state.api_keys and state.api_keys.find(headers) is None:
            raise EndpointError(401, "a valid API key is required", "AuthenticationError")
        if state.tenancy.separates:
            return await self._admit_tenant(state, scope, receive, path, is_memories)
        if is_memories:
            _set_tenant(scope, state.tenancy.salt(headers))
        elif path in SALTED and scope.get("method") == "POST":
            body = await _read(receive, headers, None)
            await _check_body(state, body)
            return _replay(body, receive)
        return receive

    async def _admit_tenant(
        self, state: MemLongState, scope: Scope, receive: Receive, path: str, is_memories: bool
    ) -> Receive:
        headers = scope["headers"]
        salt = state.tenancy.salt(headers) if state.tenancy.needs_key else None
        if scope["type"] == "websocket":
            raise EndpointError(403, "web sockets are not available to tenants", "TenantError")
        if is_memories:
            _set_tenant(scope, salt or state.tenancy.salt(headers))
        elif path in SALTED and scope["method"] == "POST":
            salt = salt or state.tenancy.salt(headers)
            body = _salted(await _read(receive, headers, MAX_BODY_BYTES), headers, salt or "")
            await _check_named(state, body)
            data = _encoded(body)
            scope["headers"] = _with_length(headers, len(data))
            return _replay(data, receive)
        elif path not in HARMLESS:
            raise EndpointError(403, f"{path[:100]!r} is not available to tenants", "TenantError")
        return receive


def _route_path(scope: Scope) -> str:
    """The path as Starlette's router matches it."""
    path, root = scope["path"], scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) :].startswith("/"):
        return path[len(root) :]
    return path


def _set_tenant(scope: Scope, salt: str | None) -> None:
    scope.setdefault("state", {})["memlong_tenant"] = tenant_folder(salt)


async def _read(receive: Receive, headers: RawHeaders, limit: int | None) -> bytes:
    too_large = EndpointError(413, f"the body must have at most {limit} bytes", "BadRequestError")
    length = header(headers, "content-length") or ""
    if limit is not None and length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise _Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if limit is not None and size > limit:
            raise too_large
        more = message.get("more_body", False)
    return b"".join(parts)


def _salted(data: bytes, headers: RawHeaders, salt: str) -> dict[str, Any]:
    """A body with the tenant's salt. What is passed on is written anew, so that nobody can read
    it in another way."""
    media_type = (header(headers, "content-type") or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise EndpointError(415, "the body must be application/json", "BadRequestError")
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise EndpointError(400, "the body must be JSON", "BadRequestError") from None
    if not isinstance(body, dict):
        raise EndpointError(400, "the body must be a JSON object", "BadRequestError")
    if body.get("previous_response_id") is not None:
        raise EndpointError(400, "previous_response_id is not available to tenants", "TenantError")
    body["cache_salt"] = salt
    return body


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (ValueError, RecursionError):  # 1e999 is infinite.
        raise EndpointError(400, "the body has a number that is too large", "BadRequestError") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


async def _check_body(state: MemLongState, data: bytes) -> None:
    """:func:`_check_named` for a body that is passed on as it is."""
    if b"memory_read" not in data:
        return
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return  # vLLM says what is wrong with it.
    if isinstance(body, dict):
        await _check_named(state, body)


async def _check_named(state: MemLongState, body: dict[str, Any]) -> None:
    """Say here that there is no such memory; the engine could only end the request with an error."""
    arguments, salt = body.get("vllm_xargs"), body.get("cache_salt")
    names = arguments.get("memory_read") if isinstance(arguments, dict) else None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not isinstance(salt, str | None):
        return
    if len(names) > MAX_READ or not all(isinstance(name, str) for name in names):
        return  # vLLM's check of requests says so.
    tenant = tenant_folder(salt)
    missing = (await state.engine.perform("missing", tenant=tenant, names=names))["missing"]
    if missing:
        raise EndpointError(404, f"memory_read: there is no memory named {missing[0]!r}", "UnknownMemoryError")


def _with_length(headers: RawHeaders, length: int) -> RawHeaders:
    replaced = (b"content-length", b"transfer-encoding", b"content-type")
    kept = [(name, value) for name, value in headers if name.lower() not in replaced]
    return [*kept, (b"content-type", b"application/json"), (b"content-length", str(length).encode())]


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


async def _refuse(error: EndpointError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
    else:
        await error.response()(scope, receive, send)
