"""HTTP routes of a MemLong server: ``GET /memlong/stats``.

vLLM loads endpoint plugins only by name: ``VLLM_PLUGINS=memlong,memlong_endpoints vllm serve …``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI


class MemLongEndpoints:
    """vLLM's ``EndpointPlugin`` protocol (``vllm.plugins.endpoint_plugins.interface``)."""

    name = "memlong_endpoints"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        @app.get("/memlong/stats")
        async def stats() -> dict[str, int]:
            """:meth:`MemLongScheduler.memory_stats` of the engine."""
            engine_core = app.state.memlong_engine_client.engine_core
            return await engine_core.call_utility_async("memlong_stats")

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        state.memlong_engine_client = engine_client
