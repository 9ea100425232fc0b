"""Routes of named memories: ``/memlong/memories``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from memlong_vllm.endpoints.errors import EndpointError
from memlong_vllm.endpoints.state import MemLongState

MAX_INDEX_BODY_BYTES = 1 << 16

router = APIRouter(prefix="/memlong/memories")


def _state(request: Request) -> MemLongState:
    return request.app.state.memlong


def _tenant(request: Request) -> str:
    return request.state.memlong_tenant  # The middleware's.


@router.get("")
async def list_memories(request: Request) -> dict[str, Any]:
    """The caller's memories, by name; ``chunk_size`` of the model."""
    answer = await _state(request).engine.perform("list", tenant=_tenant(request))
    return {"object": "list", "data": answer["memories"], "chunk_size": answer["chunk_size"]}


@router.get("/{name}")
async def show_memory(request: Request, name: str) -> dict[str, Any]:
    return await _state(request).engine.perform("show", tenant=_tenant(request), name=name)


@router.delete("/{name}")
async def delete_memory(request: Request, name: str) -> dict[str, Any]:
    await _state(request).engine.perform("delete", tenant=_tenant(request), name=name)
    return {"name": name, "deleted": True}


@router.put("/{name}", status_code=201)
async def import_memory(request: Request, name: str) -> dict[str, Any]:
    """Make a memory of an archive, the body."""
    state, tenant = _state(request), _tenant(request)
    if name not in (await state.engine.perform("missing", tenant=tenant, names=[name]))["missing"]:
        raise EndpointError(409, f"there is a memory named '{name}' already", "MemoryExistsError")
    length = request.headers.get("content-length", "")
    try:
        path, transfer = await state.archives.receive(
            tenant, request.stream(), int(length[:20]) if length.isdecimal() else 0
        )
    except ClientDisconnect:
        raise EndpointError(400, "the archive is not complete", "BadRequestError") from None
    with transfer:
        return await state.engine.perform("import_archive", tenant=tenant, name=name, path=str(path))


@router.get("/{name}/archive")
async def export_memory(request: Request, name: str) -> Response:
    state, tenant = _state(request), _tenant(request)
    await state.engine.perform("show", tenant=tenant, name=name)
    return await state.archives.send(tenant, name)


@router.post("/{name}/index")
async def set_index(request: Request, name: str) -> dict[str, Any]:
    """By which FAISS index a memory is searched: ``{"factory": "IVF256,Flat", "parameters": {"nprobe": 16}}``."""
    if int(request.headers.get("content-length") or MAX_INDEX_BODY_BYTES + 1) > MAX_INDEX_BODY_BYTES:
        raise EndpointError(413, f"the body must have at most {MAX_INDEX_BODY_BYTES} bytes", "BadRequestError")
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        raise EndpointError(400, "the body must be JSON", "BadRequestError") from None
    if not isinstance(body, dict) or set(body) - {"factory", "parameters"}:
        raise EndpointError(400, "the body must be an object with factory and parameters", "BadRequestError")
    return await _state(request).engine.perform(
        "set_index",
        tenant=_tenant(request),
        name=name,
        factory=body.get("factory"),
        parameters=body.get("parameters", {}),
    )
