"""HTTP routes of a MemLong server: ``/memlong/stats``, ``/memlong/metrics``, ``/memlong/memories``.

vLLM loads endpoint plugins only by name: ``VLLM_PLUGINS=memlong,memlong_endpoints vllm serve …``.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request, Response

from memlong_vllm.config import ARCHITECTURE, GIB, DeploymentConfig, resolve
from memlong_vllm.endpoints import memories, metrics
from memlong_vllm.endpoints.archives import ArchiveTransfers
from memlong_vllm.endpoints.engine import EngineMemories
from memlong_vllm.endpoints.errors import EndpointError, handle_endpoint_error
from memlong_vllm.endpoints.middleware import MemLongMiddleware
from memlong_vllm.endpoints.state import MemLongState
from memlong_vllm.endpoints.tenants import ring_of, tenancy_of

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MemLongEndpoints:
    """vLLM's ``EndpointPlugin`` protocol (``vllm.plugins.endpoint_plugins.interface``)."""

    name = "memlong_endpoints"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        deployment = _deployment(engine_client.vllm_config)
        quota = deployment.memory_quota_gib
        archives = ArchiveTransfers(deployment.memory_dir, None if quota is None else int(quota * GIB))
        archives.remove_leftovers()
        state.memlong = MemLongState(
            engine=EngineMemories(engine_client.engine_core),
            tenancy=tenancy_of(deployment),
            # As vLLM's own middleware takes them.
            api_keys=ring_of(args.api_key or [os.environ.get("VLLM_API_KEY")]),
            archives=archives,
        )


def attach(app: FastAPI) -> None:
    """Add the routes and the middleware; ``app.state.memlong`` must be there at the first call."""
    # Inside all of vLLM's own, which are added later: it sees what the routes will see.
    app.add_middleware(MemLongMiddleware, state=app.state)
    app.add_exception_handler(EndpointError, handle_endpoint_error)
    app.include_router(memories.router)

    @app.get("/memlong/stats")
    async def stats(request: Request) -> dict[str, float]:
        """:meth:`MemLongScheduler.memory_stats` of the engine."""
        return await request.app.state.memlong.engine.stats()

    @app.get("/memlong/metrics")
    async def prometheus(request: Request) -> Response:
        """The same for Prometheus."""
        return Response(metrics.render(await request.app.state.memlong.engine.stats()), media_type=METRICS_TYPE)


def _deployment(vllm_config: Any) -> DeploymentConfig:
    if ARCHITECTURE not in vllm_config.model_config.architectures:
        return DeploymentConfig()
    _, deployment = resolve(vllm_config.model_config.hf_config, vllm_config.additional_config)
    return deployment
